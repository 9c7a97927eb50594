"""Times taken in turns, what a report makes of them, and peers that cannot run."""

import json
import random
import statistics

import pytest
import torch

from bench import adapters, agreement, report, turns
from bench.adapters import IMPLEMENTATIONS, PEERS, Built, Missing
from bench.workload import Workload
from tests.support.cases import Case

WORKLOAD = Workload("t", "gru", Case(5, 3, 4, 1))


class Machine:
    """A clock of a machine that other work makes up to 50 times slower for a while; a call costs what it says."""

    def __init__(self, spell: float) -> None:
        self.now, self.spell, self.noise = 0.0, spell, random.Random(1)
        self.slow_until, self.slower = 0.0, 1.0

    def prepare(self) -> None:
        pass

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        if self.now >= self.slow_until:
            self.slow_until, self.slower = self.now + self.spell, self.noise.choice((1, 1, 10, 50))
        self.now += seconds * self.slower


def test_pairs_hold_on_a_busy_machine():
    """Twice as fast, by what was measured in turns; one after the other says anything."""
    machine = Machine(spell=0.3)
    calls = {"ours": lambda: machine.work(0.01), "theirs": lambda: machine.work(0.02)}
    found = turns.Turns(seconds=turns.in_turns(calls, 200, machine))
    low, median, high = found.pairs("ours")["theirs"]
    assert low == pytest.approx(2) and median == pytest.approx(2) and high == pytest.approx(2)
    apart = []
    for _ in range(20):
        alone = {name: turns.in_turns({name: call}, 20, machine)[name] for name, call in calls.items()}
        apart.append(statistics.median(alone["theirs"]) / statistics.median(alone["ours"]))
    assert max(apart) > 4 or min(apart) < 1


def test_every_round_has_each_once_in_changing_order():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = turns.in_turns(calls, 30, Machine(1.0))
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 3
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", 30)


def test_pytest_benchmark_records_what_was_taken_before():
    replay = turns.Replay().of([1.0, 2.0])
    assert [-replay() + replay() for _ in range(2)] == [1.0, 2.0]
    replay.of([4.0])
    assert -replay() + replay() == 4.0


@pytest.mark.parametrize(
    "error", (RuntimeError("no\nkernel"), ImportError("x"), SystemExit(1), ValueError(), OSError(2))
)
@pytest.mark.parametrize("when", ("built", "called", "backward"))
def test_a_peer_that_cannot_run_is_left_out_with_its_reason(monkeypatch, when, error):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise error

    def build(data):
        if when == "built":
            raise error

        def call(x):
            if when == "called":
                raise error
            return Fails.apply(x)

        return call, []

    monkeypatch.setitem(PEERS, "peer", adapters.peer(build))
    monkeypatch.setitem(IMPLEMENTATIONS, "peer", PEERS["peer"])
    with pytest.raises(Missing, match="."):
        agreement.disagreement("peer", WORKLOAD, "cpu")
    for which in ("forward", "forward+backward"):
        found = turns.measure(WORKLOAD, which, ["torch.nn", "peer"], "cpu", turns.clock.WallClock(), 0.0)
        assert set(found.seconds) == {"torch.nn"} and set(found.left_out) == {"peer"} and not found.wrong
        assert "\n" not in found.left_out["peer"]


def test_a_peer_that_is_wrong_is_left_out_and_ours_fails(monkeypatch):
    def wrong(data):
        built = adapters.torch_nn(data)
        return built.call, built.leaves, lambda gradients: [g * 1.01 for g in gradients]

    monkeypatch.setitem(PEERS, "peer", adapters.peer(wrong))
    monkeypatch.setitem(IMPLEMENTATIONS, "peer", PEERS["peer"])
    monkeypatch.setitem(IMPLEMENTATIONS, "fastrnn auto", lambda data: Built(*wrong(data)))
    found = turns.measure(WORKLOAD, "forward", ["peer", "fastrnn auto"], "cpu", turns.clock.WallClock(), 0.0)
    assert "disagrees" in found.left_out["peer"] and "disagrees" in found.wrong["fastrnn auto"] and not found.seconds
    turns._checked.clear()


@pytest.mark.parametrize("name", PEERS)
def test_peers_warnings_are_not_ours(name):
    """Under pytest's -W error, too, a peer runs or says why not."""
    try:
        agreement.disagreement(name, WORKLOAD, "cpu")
    except Missing as reason:
        assert "Warning" not in str(reason)


def results_in(folder, rows) -> None:
    """As bench/test_speed.py has them: of each workload, pass and name, a median, pairs and what ran."""
    benchmarks = []
    for (group, kind, H), name, which, median, pairs, runs in rows:
        workload = {"group": group, "cell": "gru", "shape": [4, 2, H, 1], "dtype": "float32", "kind": kind}
        extra = {"workload": workload, "implementation": name, "pass": which, "pairs": pairs, "runs": runs}
        benchmarks.append({"extra_info": extra, "stats": {"median": median}})
    machine = {"machine_info": {"bench": {"device": "cpu"}}, "datetime": "now", "benchmarks": benchmarks}
    (folder / "benchmark.json").write_text(json.dumps(machine))
    (folder / "notes.json").write_text(json.dumps({"left_out": {"test_speed[x]": "no"}, "auto_over_torch": {}}))


def test_a_report_begins_with_the_gist(tmp_path):
    """Ratios of pairs, not of medians; one line a pass for all that is torch's own kernel; pictures before tables."""
    rows = []
    for which in ("forward", "forward+backward"):
        for workload, ratio, runs in (
            (("reset", "reset", 8), [1.9, 2.0, 2.2], "torch"),
            (("over H", "plain", 8), [0.98, 0.99, 1.0], "torch"),
            (("over H", "plain", 16), [1.0, 1.01, 1.02], "torch"),
            (("over B", "plain", 4), [1.0, 1.0, 1.02], "torch"),
        ):
            rows.append((workload, "torch.nn", which, 59.0, {}, ""))
            rows.append((workload, "fastrnn auto", which, 1.0, {"torch.nn": ratio}, runs))
    results_in(tmp_path, rows)
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "59.00x" not in text
    gist = text.split("##")[1]
    assert gist.startswith(" The gist") and "resets: 2.00x (2.00 to 2.00) as fast as torch.nn over 1 workloads" in gist
    assert "On 3 others it is torch.nn's own kernel: 1.00x" in gist and "1 measurements were left out" in gist
    glance = text.split("## At a glance")[1].split("##")[0]
    assert glance.count("where it is torch.nn's own kernel") == 2 and "over" not in glance.split("|---")[1]
    assert "| reset | forward | 2.00x (2.00 to 2.00) |" in glance
    assert "(0.99x, 0.98 to 1.00)" in text
    headings = [line for line in text.splitlines() if line.startswith(("## ", "!["))]
    pictures = [place for place, line in enumerate(headings) if line.startswith("![")]
    assert not pictures or max(pictures) < headings.index("## At a glance")
