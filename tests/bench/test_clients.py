"""The stage of a visit that times cells of other packages, converted, beside their own code."""

import json
import sys

import pytest
import torch

from bench import clients, clock, gpu, needed, processes, visit
from bench.adapters import Missing

from .test_bench import setup

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
@pytest.mark.parametrize(("client", "count", "furthest"), (("tirex", 1, 0.1), ("xlstm", 2, 1e-4)))
def test_a_dry_run_times_both(client, count, furthest, tmp_path):
    """tirex-ts's own loop is rounded to bfloat16."""
    (item,) = (item for item in visit.clients(setup(tmp_path)) if item.key == client)
    records = item.work(100)
    assert len(records) == count and not any(map(gpu.failed, records)), records
    for record in records:
        assert record["client"] == client and record["on"] == "cpu"
        assert record["ours_ms"] > 0 and record["theirs_ms"] > 0 and record["x"] > 0 and record["apart"] < furthest
    assert item.work(100) == records, "nothing is timed twice"


def test_what_is_not_installed_is_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(needed, "is_missing", lambda module: True)
    records = [record for item in visit.clients(setup(tmp_path)) for record in item.work(10)]
    assert records == [
        {"client": "converted cells", "missing": "tirex-ts and xlstm are not installed"},
        {"client": "tirex", "missing": "tirex-ts and statsmodels are not installed"},
        {"client": "xlstm", "missing": "xlstm is not installed"},
    ]
    assert not any(map(gpu.failed, records))


def test_with_one_package_its_tests_run(tmp_path, monkeypatch):
    """In place of theirs, a process that says what it was asked."""
    ran = []
    monkeypatch.setattr(visit, "run", lambda command, *_: ran.append(command) or processes.Done(0, "3 passed", "", 1.0))
    monkeypatch.setattr(needed, "is_missing", lambda module: module == "tirex")
    tests, tirex, _ = visit.clients(setup(tmp_path))
    assert tests.work(10) == [{"tests": "converted cells", "exit status": 0, "s": 1, "passed": 3}]
    assert "tests/nn/test_foreign.py" in ran[0]
    assert tirex.work(10) == [{"client": "tirex", "missing": "tirex-ts is not installed"}]


def pair(ours: float, theirs: float, key: int = 0) -> clients.Pair:
    """Two calls that take no time, of results so far apart."""

    def results(value: float) -> clients.Results:
        return torch.tensor([1.0, 3.0]), torch.tensor([1.0, value])

    return clients.Pair({"n": key}, lambda: {"ours": lambda: results(ours), "theirs": lambda: results(theirs)})


def test_results_that_differ_are_seen():
    assert clients.measured(pair(3.0, 3.0), 3, clock.WallClock())["apart"] == 0.0
    assert clients.measured(pair(4.5, 3.0), 3, clock.WallClock())["apart"] == 1.5


def test_which_is_how_many_times_as_fast():
    class Times:
        """A clock by which calls take 2 seconds and 6, in the order in which they come."""

        now, taken = 0.0, 2.0

        def prepare(self):
            pass

        def __call__(self):
            self.now += self.taken
            return self.now

    timer = Times()

    def call(seconds: float):
        def work():
            timer.taken = seconds
            return (torch.tensor([0.0, 1.0]),)

        return work

    slow = clients.Pair({}, lambda: {"ours": call(2.0), "theirs": call(6.0)})
    found = clients.measured(slow, 4, timer)
    assert (found["ours_ms"], found["theirs_ms"], found["x"]) == (2000.0, 6000.0, 3.0)


def raising(error: Exception):
    def build():
        raise error

    return build


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ModuleNotFoundError("No module", name="ninja"), {"missing": "ninja is not installed"}),
        (Missing("nvcc is not installed"), {"missing": "nvcc is not installed"}),
        (RuntimeError("no"), {"error": "RuntimeError: no"}),
    ],
    ids=repr,
)
def test_what_one_cannot_does_not_end_the_rest(error, found, tmp_path, monkeypatch):
    monkeypatch.setattr(clients.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "x.jsonl"), "--rounds", "2", "--dry-run"])
    args = clients.options("x").parse_args()
    pairs = [clients.Pair({"n": 1}, raising(error)), pair(3.0, 3.0, 2)]
    clients.measure(processes.Log(args.out, 100), pairs, args, clock.WallClock())
    first, second = map(json.loads, args.out.read_text().splitlines())
    assert found.items() <= first.items() and second["n"] == 2 and "x" in second
    assert gpu.failed(first) == ("error" in found)


@NO_GPU
def test_their_cuda_is_not_compiled_without_a_gpu():
    with pytest.raises(Missing, match="a GPU is not there"):
        clients.needs_nvcc()
