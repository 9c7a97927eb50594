# Every target works alone on a fresh clone: it makes .venv first, or with VENV=no runs what PYTHON has, and says in one
# line what is missing there and what that leaves out.
PYTHON ?= python3
VENV ?= yes
JOBS ?= 2
# What `make test` hands on to pytest: TESTS="tests/ops/test_recurrence.py -k gru" runs a part.
TESTS ?=
MATRIX ?=

# The torch to install, and with which Triton: without one, that which this torch requires, or the newest if it requires
# none (a CPU build). `make test TORCH=2.14.1` installs another pair into the same .venv.
TORCH ?= 2.13.0
TRITON ?=
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PAIR := torch$(addprefix ==,$(TORCH)) $(addprefix triton==,$(TRITON))
INSTALLED := .venv/installed-torch-$(TORCH)-triton-$(TRITON)

ifeq ($(VENV),no)
RUN := $(PYTHON)
READY = @$(RUN) -m bench.needed $@
PARALLEL = $(if $(shell $(RUN) -c 'import xdist; print(1)' 2>/dev/null),-n $(JOBS) --dist worksteal)
export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
else
RUN := .venv/bin/python
READY :=
PARALLEL = -n $(JOBS) --dist worksteal
HERE := .venv
MODELS := .venv/models
SITE := .venv/docs
endif

EXAMPLES := classify forecast memory rollout xlstm_lm

.PHONY: demo $(EXAMPLES) test quick test-all matrix lint docs inspect snapshots bench bench-auto bench-gpu clean .venv

demo: $(HERE)
	$(READY)
	$(RUN) examples/char_lm.py --out runs/char_lm

# The other examples, each in nine minutes or less on a CPU core: metrics and a figure in runs/NAME.
$(EXAMPLES): $(HERE)
	$(READY)
	$(RUN) examples/$@.py --out runs/$@

test: $(HERE) $(MODELS)
	$(READY)
	$(RUN) -m pytest $(PARALLEL) $(TESTS)

# A case of each kind of check, in about a minute; TESTS as above.
quick: $(HERE)
	$(READY)
	$(RUN) -m pytest $(PARALLEL) --quick $(or $(TESTS),tests)

# More sizes, seeds, dtypes and architectures of the checks that `make test` makes, and those.
test-all: $(HERE) $(MODELS)
	$(READY)
	$(RUN) -m pytest $(PARALLEL) --wide=yes $(TESTS)

# The kernels with every Triton that a torch requires, each installed into a folder of its own; MATRIX=--quick
# runs a part, in some minutes.
matrix: $(HERE)
	$(READY)
	$(RUN) -m bench.matrix $(MATRIX)

lint: $(HERE)
	$(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

# The site, in site/: guide, measurements and a reference of every public name; strict, so that a broken link fails.
docs: $(HERE) $(SITE)
	$(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --site-dir site

# All kernels that the planner may pick, for every architecture (most of an hour on 2 cores), checked and written down.
inspect: $(HERE)
	$(READY)
	$(RUN) -m bench.inspect_table --full runs/inspect.jsonl --jobs $(JOBS)

# The committed part of that table, which the tests compare with: after a change to kernels or planner.
snapshots: $(HERE)
	$(READY)
	$(RUN) -m bench.inspect_table --jobs $(JOBS)

# Every implementation on the part of the table that a CPU can run, side by side, and a report; under 10 minutes.
RESULTS := bench/results/cpu-$(shell date +%F)
bench: $(HERE)
	$(READY)
	mkdir -p $(RESULTS)
	CUDA_VISIBLE_DEVICES= $(RUN) -m pytest bench/test_speed.py -q --benchmark-quiet --limit=540 \
		--out=$(RESULTS) --benchmark-json=$(RESULTS)/benchmark.json; \
	status=$$?; CUDA_VISIBLE_DEVICES= $(RUN) -m bench.host_table --out=$(RESULTS) && \
		$(RUN) -m bench.report $(RESULTS) && exit $$status

# What "auto" takes on a CPU costs no more than torch.nn: it fails with the rows that do; on an idle machine.
bench-auto: $(HERE)
	$(READY)
	CUDA_VISIBLE_DEVICES= $(RUN) -m bench.cpu --auto

# Correctness, modelled beside measured times, tuning and the whole table on the GPU at hand, under 9 minutes; again to
# go on where it stopped.
bench-gpu: $(HERE)
	$(READY)
	$(RUN) -m bench.gpu

# Made anew when what it holds changes; a failed or interrupted install leaves no stamp, so the next make repeats it.
.venv: $(INSTALLED)
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	rm -f .venv/installed* .venv/models .venv/docs
	$(PIP) $(PAIR) -e '.[dev,bench,examples]'
	touch $@

# Packages whose models the tests convert: nothing else needs them.
.venv/models: $(INSTALLED)
	$(PIP) $(PAIR) -e '.[models]'
	touch $@

# What builds the site.
.venv/docs: $(INSTALLED)
	$(PIP) $(PAIR) -e '.[docs]'
	touch $@

clean:
	rm -rf .venv runs site .pytest_cache .ruff_cache
