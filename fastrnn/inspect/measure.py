"""The time of a step, measured on the GPU at hand."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import mock

import torch

from ..device import DeviceSpec
from .compile import Problem, call_backward, call_forward

STEPS = (64, 1088)  # two lengths: what a launch costs beside its steps is in both, and drops out of the difference
WARM_UPS, RUNS = 3, 21


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
    medians: dict[str, list[float]] = {which: [] for which in passes}
    with mock.patch("fastrnn.planner.torch_precision", lambda: problem.precision):
        for steps in STEPS:
            tensors = replace(problem, seq_len=steps).tensors("cuda")
            outputs = call_forward(problem.cell, tensors, backend)
            calls: dict[str, Callable[[], object]] = {
                "forward": lambda: call_forward(problem.cell, tensors, backend),  # noqa: B023
                "backward": lambda: call_backward(problem.cell, tensors, outputs, backend, needs_sums=False),  # noqa: B023
            }
            for which in passes:
                medians[which].append(median_us(calls[which]))
    return {which: (longer - shorter) / (STEPS[1] - STEPS[0]) for which, (shorter, longer) in medians.items()}


def median_us(call: Callable[[], object]) -> float:
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
