"""Time of every implementation on every row of the table, side by side; only of what agrees with the reference.

python -m pytest bench/test_speed.py --benchmark-json=FILE --out=DIR     then python -m bench.report DIR
"""

from dataclasses import asdict

import pytest
import torch

from fastrnn import FallbackWarning
from fastrnn.inspect.memory import memory_of
from fastrnn.tiers import TIERS

from . import clock
from .adapters import IMPLEMENTATIONS, Built, Missing
from .agreement import disagreement
from .cases import table
from .workload import PASSES, Data, Workload

DEVICE = clock.device()
CLOCK = clock.EventClock() if DEVICE == "cuda" else clock.WallClock()
TABLE = table(DEVICE)
MOST_ROUNDS, LEAST_ROUNDS = 200, 3
LEAST_PAIRS, MOST_BATCHES = 15, 8
MOST_OVERHEAD = 1.05  # of "auto" over torch.nn on a CPU

pytestmark = [
    pytest.mark.benchmark(timer=CLOCK, disable_gc=True),
    pytest.mark.filterwarnings(f"default::{FallbackWarning.__module__}.{FallbackWarning.__name__}"),
    pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),  # where something disagrees
    pytest.mark.filterwarnings("default:::torchrl"),
    pytest.mark.filterwarnings("default:::tensordict"),
]


def call_of(built: Built, data: Data, which: str):
    """What is timed: a forward pass without gradients, or with those of the input and all parameters."""
    if which == "forward":
        return torch.no_grad()(lambda: built.call(data.input))
    input = data.input.detach().requires_grad_()
    return lambda: torch.autograd.grad(built.call(input), [input, *built.leaves], data.dy)


def built_and_checked(name: str, workload: Workload) -> tuple[Built, Data]:
    """An implementation on a workload; skips where it is missing, fails where it computes something else."""
    try:
        if wrong := _wrong(name, workload):
            pytest.fail(f"not timed: {name} disagrees with the reference: {wrong}")
        data = Data(workload, DEVICE)
        return IMPLEMENTATIONS[name](data), data
    except (Missing, torch.cuda.OutOfMemoryError) as reason:
        pytest.skip(str(reason).splitlines()[0])


_checked: dict[tuple[str, Workload], dict[str, str]] = {}


def _wrong(name: str, workload: Workload) -> dict[str, str]:
    key = name, workload.shortened()
    if key not in _checked:
        _checked[key] = disagreement(name, workload, DEVICE)
    return _checked[key]


def rounds_of(call, budget: float) -> int:
    """How often a call fits the time that one measurement is given; its two calls warm up."""
    call()
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / clock.seconds(call, CLOCK))))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU auto is a kernel of ours where there is one")
@pytest.mark.parametrize("workload", [w for w in TABLE if w.kind == "plain"], ids=str)
def test_auto_costs_what_torch_does(pytestconfig, workload):
    """On a CPU, forward, by calls in turn; the fastest of each, since what is slower waited for something else.

    On a busy machine that takes many: both are measured again, the fastest kept, before it counts as slower.
    """
    calls = [call_of(*built_and_checked(name, workload), "forward") for name in ("torch.nn", "fastrnn auto")]
    rounds = max(LEAST_PAIRS, *(rounds_of(call, 2 * pytestconfig.getoption("--seconds")) for call in calls))
    fastest, ratio = [float("inf")] * 2, float("inf")
    for _ in range(MOST_BATCHES):
        for _ in range(rounds):
            fastest = [min(least, clock.seconds(call, CLOCK)) for least, call in zip(fastest, calls, strict=True)]
        ratio = fastest[1] / fastest[0]
        if ratio <= MOST_OVERHEAD:
            break
    pytestconfig.notes["auto_over_torch"][str(workload)] = ratio
    assert ratio <= MOST_OVERHEAD, f"{MOST_BATCHES} x {rounds} rounds"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)  # the first varies fastest: side by side
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("workload", TABLE, ids=str)
def test_speed(benchmark, pytestconfig, name, workload, which):
    if DEVICE == "cpu" and name.removeprefix("fastrnn ") in TIERS:
        pytest.skip("kernels are for GPUs: a CPU has them in Triton's interpreter only, whose time says nothing")
    built, data = built_and_checked(name, workload)
    call = call_of(built, data, which)
    rounds = rounds_of(call, pytestconfig.getoption("--seconds"))
    benchmark.group = f"{workload}, {which}"
    benchmark.extra_info |= {"workload": asdict(workload), "id": str(workload), "implementation": name, "pass": which}
    if which == PASSES[1]:
        benchmark.extra_info["peak_bytes"] = memory_of(call, torch.device(DEVICE))[1].peak
    benchmark.pedantic(call, setup=CLOCK.prepare, rounds=rounds)
