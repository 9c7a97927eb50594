"""What `auto` takes on a CPU beside torch.nn: that a row which is slower, or takes more memory, is named.

`python -m bench.cpu --auto` asserts 1.02 for every row, with nothing beside it. Here other tests run at the same time,
so the real row is held to twice torch.nn's time only: it shows that what is compared runs, not how fast it is.
"""

import time

import pytest
import torch

from bench import cpu, cpu_auto
from bench.adapters import IMPLEMENTATIONS, Built
from bench.turns import _checked
from bench.workload import PASSES, Workload
from tests.support.cases import Case

pytest.importorskip("llvmlite")
SMALL = Workload("t", "gru", Case(40, 16, 32, 1))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def worse(monkeypatch):
    """Replace ours by the same with something before each call, until the test ends."""

    def replace(before):
        built = IMPLEMENTATIONS["fastrnn auto"]

        def build(data):
            own = built(data)
            return Built(lambda input: (before(), own.call(input))[1], own.leaves, runs=own.runs)

        monkeypatch.setitem(IMPLEMENTATIONS, "fastrnn auto", build)

    monkeypatch.setattr(cpu_auto, "BATCHES", 2)
    yield replace
    _checked.clear()


def test_a_row_costs_what_it_may(monkeypatch):
    monkeypatch.setattr(cpu_auto, "MOST", 2.0)
    found = cpu_auto.compared(SMALL, 0.1)
    assert found.runs == "cpu" and not found.wrong
    assert all(0 < own <= theirs for theirs, own in found.peaks)


def test_a_slow_row_is_named(worse):
    def busy():
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    worse(busy)
    wrong = cpu_auto.compared(SMALL, 0.0).wrong
    assert len(wrong) == 2 and all(str(SMALL) in row and "torch.nn's time" in row for row in wrong)


def test_a_large_row_is_named(worse):
    kept = []
    worse(lambda: kept.append(torch.ones(1 << 20)))
    wrong = cpu_auto.compared(SMALL, 0.0).wrong
    assert [row for row in wrong if "bytes at the peak" in row and PASSES[1] in row]


def test_the_command_fails_with_the_row(worse, monkeypatch, capsys):
    monkeypatch.setattr(cpu_auto, "rows", lambda: [SMALL])
    monkeypatch.setattr("sys.argv", ["bench.cpu", "--auto", "--seconds", "0"])
    monkeypatch.setattr(cpu_auto, "slower", lambda theirs, own, ratio: ratio > 100)
    assert cpu.main() == 0
    monkeypatch.setattr(cpu_auto, "slower", lambda theirs, own, ratio: True)
    assert cpu.main() == 1
    out = capsys.readouterr().out
    assert f"costs more than it may: {SMALL}, forward" in out and f"| {SMALL} | cpu |" in out


@pytest.mark.parametrize(
    ("theirs", "own", "expected"), ((1e-3, 1.015e-3, False), (1e-3, 1.03e-3, True), (2e-5, 2.2e-5, False))
)
def test_what_counts_as_slower(theirs, own, expected):
    """A fiftieth; of calls that last microseconds, what Python takes before torch's kernel."""
    assert cpu_auto.slower(theirs, own, own / theirs) is expected


def test_training_keeps_nothing_that_it_has_read(mutate):
    """The GRU's last gate: freed before dx is allocated, or a training step at its end takes more than torch.nn's."""
    workload = Workload("t", "gru", Case(64, 4, 128, 1))
    assert not [row for row in cpu_auto.compared(workload, 0.0).wrong if "bytes" in row]
    mutate({"fastrnn.ops.layer._by_launch": ("del into, d_last", "")})
    assert [row for row in cpu_auto.compared(workload, 0.0).wrong if "bytes" in row and PASSES[1] in row]


def test_all_rows_of_torchs_cells_are_compared():
    rows = cpu_auto.rows()
    assert {"gru", "lstm", "rnn_tanh", "rnn_relu"} == {row.cell for row in rows}
    assert {"plain", "ragged", "reset"} == {row.kind for row in rows}
    assert all(Workload("cpu", "gru", Case(*shape, 1)) in rows for shape in cpu.SHAPES)
