"""Time of every implementation on every row of the table, in turns; only of what agrees with the reference.

python -m pytest bench/test_speed.py --benchmark-json=FILE --out=DIR     then python -m bench.report DIR
"""

import functools
from dataclasses import asdict

import pytest

from fastrnn import FallbackWarning
from fastrnn.cells import CELLS
from fastrnn.planning.tiers import TIERS

from . import clock
from .adapters import IMPLEMENTATIONS
from .cases import table
from .cpu_auto import PYTHON
from .turns import LEAST_ROUNDS, MOST_ROUNDS, Call, Replay, Turns, call_of, checked, measure
from .workload import PASSES, Data, Workload

DEVICE = clock.device()
CLOCK = clock.EventClock() if DEVICE == "cuda" else clock.WallClock()
REPLAY = Replay()
TABLE = table(DEVICE)
LEAST_PAIRS, MOST_BATCHES = 15, 8
MOST_OVERHEAD = 1.05  # of "auto" over torch.nn on a CPU, where that is more than PYTHON

pytestmark = [
    pytest.mark.benchmark(timer=REPLAY),
    pytest.mark.filterwarnings(f"default::{FallbackWarning.__module__}.{FallbackWarning.__name__}"),
    pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),  # where something disagrees
    pytest.mark.filterwarnings("default:::torchrl"),
    pytest.mark.filterwarnings("default:::tensordict"),
]


def rounds_of(call: Call, budget: float) -> int:
    """How often a call fits the time that one measurement is given; its two calls warm up."""
    call()
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / clock.seconds(call, CLOCK))))


def is_torchs(workload: Workload) -> bool:
    """Whether torch.nn has this very layer, so that auto on a CPU is its kernel."""
    return workload.kind == "plain" and workload.heads == 1 and CELLS[workload.cell].of_torch


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU auto is a kernel of ours where there is one")
@pytest.mark.parametrize("workload", [w for w in TABLE if is_torchs(w)], ids=str)
def test_auto_costs_what_torch_does(pytestconfig, workload):
    """On a CPU, forward, by calls in turn; the fastest of each, since what is slower waited for something else.

    On a busy machine that takes many: both are measured again, the fastest kept, before it counts as slower.
    """
    data, names = Data(workload, DEVICE), ("torch.nn", "fastrnn auto")
    assert not any(checked(name, workload, DEVICE) for name in names)
    calls = [call_of(IMPLEMENTATIONS[name](data), data, "forward") for name in names]
    rounds = max(LEAST_PAIRS, *(rounds_of(call, 2 * pytestconfig.getoption("--seconds")) for call in calls))
    fastest, slower = [float("inf")] * 2, True
    for _ in range(MOST_BATCHES):
        for _ in range(rounds):
            fastest = [min(least, clock.seconds(call, CLOCK)) for least, call in zip(fastest, calls, strict=True)]
        slower = fastest[1] > MOST_OVERHEAD * fastest[0] and fastest[1] - fastest[0] > PYTHON
        if not slower:
            break
    pytestconfig.notes["auto_over_torch"][str(workload)] = fastest[1] / fastest[0]
    assert not slower, f"{fastest[1] / fastest[0]:.3f} times as long, {MOST_BATCHES} x {rounds} rounds"


@functools.lru_cache(maxsize=1)  # the names of one pass of a workload come one after the other
def turns_of(workload: Workload, which: str, names: tuple[str, ...], seconds: float) -> Turns:
    return measure(workload, which, names, DEVICE, CLOCK, seconds)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)  # the first varies fastest: those that take turns
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("workload", TABLE, ids=str)
def test_speed(benchmark, pytestconfig, name, workload, which):
    """The first of the names that were asked for times them all; each records its own."""
    if is_interpreted(name):
        pytest.skip("kernels are for GPUs: a CPU has them in Triton's interpreter only, whose time says nothing")
    names = tuple(n for n in pytestconfig.names[workload, which] if not is_interpreted(n))
    turns = turns_of(workload, which, names, pytestconfig.getoption("--seconds"))
    if name in turns.wrong:
        pytest.fail(f"not timed: {name} {turns.wrong[name]}")
    if name in turns.left_out:
        pytest.skip(turns.left_out[name])
    benchmark.group = f"{workload}, {which}"
    benchmark.extra_info |= {"workload": asdict(workload), "id": str(workload), "implementation": name, "pass": which}
    benchmark.extra_info |= {"pairs": turns.pairs(name), "runs": turns.runs[name]}
    if name in turns.peak_bytes:
        benchmark.extra_info["peak_bytes"] = turns.peak_bytes[name]
    times = turns.seconds[name]
    REPLAY.of(times)
    benchmark.pedantic(lambda: None, rounds=len(times))


def is_interpreted(name: str) -> bool:
    return DEVICE == "cpu" and name.removeprefix("fastrnn ") in TIERS
