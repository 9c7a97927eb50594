# `make demo` and `make test` work alone on a fresh clone: each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test lint inspect snapshots clean .venv

demo: .venv
	$(BIN)/python examples/char_lm.py --out runs/char_lm

test: .venv .venv/models
	$(BIN)/python -m pytest -n $(JOBS)

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# All kernels that the planner may pick, for every architecture (most of an hour on 2 cores), checked and written down.
inspect: .venv
	$(BIN)/python -m tests.inspect_table --full runs/inspect.jsonl --jobs $(JOBS)

# The committed part of that table, which the tests compare with: after a change to kernels or planner.
snapshots: .venv
	$(BIN)/python -m tests.inspect_table --jobs $(JOBS)

# Made anew when what it holds changes; a failed or interrupted install leaves no stamp, so the next make repeats it.
.venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench,examples]'
	touch $@

# Packages whose models the tests convert: nothing else needs them.
.venv/models: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[models]'
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
