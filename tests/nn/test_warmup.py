"""fastrnn.warmup: the first call compiles nothing; what others compile is what this process loads."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.compat import ahead, spills
from fastrnn.nn.warmup import cpus

from ..support import children
from ..support.versions import NEEDS_CLUSTERS

# How many kernels each case of tests/support/warmed.py needs: forward and backward, by alignment of states.
KERNELS = {
    "two layers": 4,
    "bfloat16": 2,
    "lengths": 2,
    "resets": 2,
    "heads": 2,
    "tied": 2,
    "inference": 1,
    "cooperative": 2,
    "model": 2,
}
# What is broken, and the case that notices.
BROKEN = {
    "alignment": "two layers",
    "dtype": "bfloat16",
    "options": "lengths",
    "gradients": "resets",
    "nothing": "inference",
}


def warmed(folder, *arguments: str) -> list[dict]:
    """By processes that begin without a compiled kernel."""
    done = children.run(["-m", "tests.support.warmed", str(folder), *arguments], errors="--broken" not in arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def right(record: dict, kernels: int) -> bool:
    """Compiled ahead, once; launched at the calls only; the second call goes past Triton's binder, as ever."""
    compiled = [record[when]["compiled"] for when in ("ahead", "first", "second", "third")]
    launched = [record[when]["launched"] for when in ("ahead", "first", "second")]
    found = record["returned"] == kernels and compiled == [kernels, 0, 0, 0] and record["again"] == 0
    found = found and launched[0] == 0 < launched[1] == launched[2] and record["unchanged"]
    return found and record["third"]["bound"] == 0


def test_the_first_call_compiles_nothing(tmp_path):
    records = warmed(tmp_path, *KERNELS)
    assert {record["case"]: record for record in records if not right(record, KERNELS[record["case"]])} == {}
    assert len(records) == len(KERNELS)
    loaded = warmed(tmp_path, "bfloat16", "model")  # another process finds them on disk
    assert [record["first"]["compiled"] for record in loaded] == [0, 0]
    # Before 3.8, Triton's name of a kernel on disk depends on what the process compiled before it.
    in_any_order = spills.triton_version() >= (3, 8)
    assert sum(record["returned"] for record in loaded) <= (0 if in_any_order else 1)


@NEEDS_CLUSTERS
def test_nor_by_a_cluster(tmp_path):
    assert [right(record, 2) for record in warmed(tmp_path, "cluster")] == [True]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_kernel_that_the_call_does_not_need_is_noticed(broken, tmp_path):
    [record] = warmed(tmp_path, "--broken", broken, BROKEN[broken])
    assert record["first"]["compiled"] > 0 and not right(record, KERNELS[BROKEN[broken]])


OTHERS = """
import json, os, sys, time
from collections import deque
from unittest import mock
import torch, triton, fastrnn
from bench.host_cost import launching_nothing
from fastrnn.compat import ahead, spills

@triton.jit
def step(x):
    return x

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
forms = []
with launching_nothing():
    compile_all = ahead.compile_all
    with mock.patch.object(ahead, "compile_all", lambda kernels, processes: forms.extend(kernels)):
        fastrnn.warmup(fastrnn.GRU(3, 24, backend="resident"), (4, 2, 3))
    forms = [(kernel, kernel.asked.choices[0]) for kernel in forms]
    shared = deque((form, ahead._pickled(*form)) for form in forms)
    if sys.argv[2:]:
        shared = deque([(None, b"no pickle")])
    kernel, choice = forms[0]
    try:  # as a cell of one's own that is in __main__
        ahead._pickled(kernel._replace(asked=kernel.asked._replace(arguments=(step,))), choice)
    except ahead.pickle.PicklingError as error:
        assert "cannot import step from __main__" in str(error)
    else:
        raise AssertionError("another process would look for it in its own __main__")
    before = [ahead._is_cached(*form) for form in forms]
    other = ahead._Other(shared)
    while other.is_alive() and (shared or other.busy):
        time.sleep(0.05)
    other.finish()
    print(json.dumps([before, [ahead._is_cached(*form) for form in forms], other.failed]))
"""


def by_others(tmp_path, *arguments: str) -> tuple:
    (tmp_path / "others.py").write_text(OTHERS)
    done = children.run([str(tmp_path / "others.py"), str(tmp_path / "cache"), *arguments])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_another_process_compiles_what_this_one_loads(tmp_path):
    assert by_others(tmp_path) == [[False, False], [True, True], ""]


def test_another_process_that_fails_says_why(tmp_path):
    _, after, why = by_others(tmp_path, "broken")
    assert after == [False, False] and "UnpicklingError" in why


class Stub:
    """A kernel of which it is known how many registers each form spills."""

    def __init__(self, *spilled: int):
        self.spilled, self.compiled_forms = spilled, []
        self.asked = SimpleNamespace(choices=tuple(range(len(spilled))))

    def compiled(self, choice: int):
        self.compiled_forms.append(choice)
        return self.spilled[choice]


@pytest.fixture
def compiled(monkeypatch):
    """Forms that _compile was asked for, round by round."""
    rounds = []
    monkeypatch.setattr(ahead, "_compile", lambda forms, _: rounds.append([c for _, c in forms]) or len(forms))
    monkeypatch.setattr(ahead.spills, "is_chosen", lambda asked: False)
    monkeypatch.setattr(ahead.spills, "spilled_registers", lambda compiled: compiled)
    monkeypatch.setattr(ahead.spills, "first_without_spills", lambda *asked: None)
    monkeypatch.setattr(ahead.torch.cuda, "is_available", lambda: False)
    return rounds


def with_asked(kernel: Stub) -> Stub:
    kernel.asked = ahead.spills.Asked(None, None, kernel.asked.choices, (), (), {})
    return kernel


def test_other_forms_are_compiled_at_once_where_the_first_one_spills(compiled):
    kernels = [with_asked(Stub(0, 0)), with_asked(Stub(8, 4, 0)), with_asked(Stub(2))]
    assert ahead.compile_all(kernels, 2) == 5
    assert compiled == [[0, 0, 0], [1, 2]]


def test_forms_that_nobody_needs_are_noticed(compiled, monkeypatch):
    monkeypatch.setattr(ahead.spills, "spilled_registers", lambda compiled: 1)
    with pytest.raises(AssertionError):
        test_other_forms_are_compiled_at_once_where_the_first_one_spills(compiled)


class Failing:
    """A process that did, and one that did not, end well."""

    def __init__(self, shared):
        self.failed = "no memory"

    def finish(self): ...


@pytest.mark.parametrize("processes", (1, 2))
def test_a_failure_elsewhere_is_no_success(processes, monkeypatch):
    monkeypatch.setattr(ahead, "_Other", Failing)
    monkeypatch.setattr(ahead, "_is_cached", lambda *form: False)
    monkeypatch.setattr(ahead, "_pickled", lambda *form: b"")
    forms = [(Stub(0), 0)] * ahead.STARTS_IN
    if processes == 1:
        assert ahead._compile(forms, processes) == len(forms)
        return
    with pytest.raises(RuntimeError, match="failed: no memory"):
        ahead._compile(forms, processes)


@pytest.mark.parametrize(("allowed", "load", "jobs"), ((8, 0.2, 8), (8, 12.6, 3), (4, 3.0, 4), (8, 40.0, 1)), ids=str)
def test_processes_are_as_many_as_idle_cpus(allowed, load, jobs, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(allowed), raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert cpus() == jobs


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    (
        ((torch.zeros(3), (4, 2, 3)), {}, "module: expected a torch.nn.Module, got Tensor"),
        ((fastrnn.GRU(3, 4), (4, 2, 3)), {"jobs": 0}, "jobs: expected a positive int, got 0"),
        ((nn.Tanh(), (4, 2, 3)), {}, r"expected parameters, .* \(4, 2, 3\) takes their device; got none"),
        ((fastrnn.GRU(3, 4).requires_grad_(False), (4, 2, 3)), {}, "training: expected a result with a gradient"),
    ),
)
def test_bad_input(arguments, options, expected, monkeypatch):
    monkeypatch.setattr("fastrnn.compat.interpreter.ENABLED", False)
    with pytest.raises(ValueError, match=expected):
        fastrnn.warmup(*arguments, **options)


def test_torchs_kernels_need_none(monkeypatch):
    monkeypatch.setattr("fastrnn.compat.interpreter.ENABLED", False)
    layer = fastrnn.LSTM(3, 4, 2, dropout=0.5)
    before = torch.random.get_rng_state()
    assert fastrnn.warmup(layer, (4, 2, 3), ((2, 2, 4), (2, 2, 4)), loss=lambda result: result[1][0].sum()) == 0
    assert torch.equal(torch.random.get_rng_state(), before) and layer.weight_hh_l0.grad is None
