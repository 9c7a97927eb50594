"""The time of a step, measured on the GPU at hand."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from ..device import DeviceSpec
from .compile import Problem, call_backward, call_forward

STEPS = (64, 1088)  # two lengths: what a launch costs beside its steps is in both, and drops out of the difference
WARM_UPS, RUNS = 3, 21
# Of multiplying before anything is timed, and of idling after which it takes that again: an H100 that has nothing to do
# stands at 345 MHz of 1980.
WARM_UP_S, IDLE_S = 1.0, 10.0
_last_used = -IDLE_S


def us_per_step(problem: Problem, passes: Sequence[str]) -> dict[str, float]:
    """Microseconds a step of each pass's kernel: the difference of two lengths, each the median of several runs.

    Raises RuntimeError without a GPU, ValueError if the problem is for another architecture.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measuring needs a GPU, and torch finds none here")
    found = DeviceSpec.of(torch.device("cuda")).arch
    if found != problem.arch:
        raise ValueError(f"arch: expected {found}, that of the GPU here, to measure; got {problem.arch}")
    backend = problem.plan().backend
    warm_up()
    medians: dict[str, list[float]] = {which: [] for which in passes}
    with mock.patch("fastrnn.planning.planner.torch_precision", lambda: problem.precision):
        for steps in STEPS:
            tensors = tensors_of(replace(problem, seq_len=steps))
            outputs = call_forward(problem.cell, tensors, backend)
            calls: dict[str, Callable[[], object]] = {
                "forward": lambda: call_forward(problem.cell, tensors, backend),  # noqa: B023
                "backward": lambda: call_backward(problem.cell, tensors, outputs, backend, needs_sums=False),  # noqa: B023
            }
            for which in passes:
                medians[which].append(median_us(calls[which]))
    return {which: (longer - shorter) / (STEPS[1] - STEPS[0]) for which, (shorter, longer) in medians.items()}


def warm_up() -> None:
    """Bring the GPU's clocks up, unless it was busy just before."""
    global _last_used
    if time.monotonic() - _last_used > IDLE_S:
        a, start = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), time.monotonic()
        while time.monotonic() - start < WARM_UP_S:
            torch.mm(a, a)
            torch.cuda.synchronize()
    _last_used = time.monotonic()


def tensors_of(problem: Problem) -> Any:
    """A problem's tensors on the GPU, kept for the last two problems: they take longer to make than to time."""
    return _tensors(replace(problem, backend="auto", arch="sm_90"))


@functools.lru_cache(maxsize=2)
def _tensors(problem: Problem) -> Any:
    return problem.tensors("cuda")


def median_us(call: Callable[[], object]) -> float:
    """Return the median of a call's time on the GPU in microseconds, after a few calls that do not count."""
    times = []
    for run in range(WARM_UPS + RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if run >= WARM_UPS:
            times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)
