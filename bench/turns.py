"""Implementations of one workload timed in turns: every round calls each once, in an order of its own.

What slows a machine down for a while slows all of them. So ratios are of pairs, two calls of one round: their median
and quartiles hold on a busy machine, where medians of times that were taken one after the other do not.
"""

import gc
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastrnn.inspect.memory import memory_of

from . import clock
from .adapters import IMPLEMENTATIONS, PEERS, Built, Missing, or_missing
from .agreement import disagreement
from .workload import PASSES, Data, Workload

MOST_ROUNDS, LEAST_ROUNDS = 200, 5
Call = Callable[[], object]


@dataclass
class Turns:
    """What was found of one pass of a workload, by implementation."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each round
    peak_bytes: dict[str, int] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)  # of ours: the backend
    left_out: dict[str, str] = field(default_factory=dict)  # why
    wrong: dict[str, str] = field(default_factory=dict)  # where ours or torch's disagrees with the reference

    def pairs(self, name: str) -> dict[str, list[float]]:
        """How many times as fast as each other one it is: quartiles and, between them, the median."""
        own = self.seconds[name]
        return {other: quartiles(map(_ratio, times, own)) for other, times in self.seconds.items() if other != name}


def _ratio(other: float, own: float) -> float:
    return other / own


def quartiles(values: Iterable[float]) -> list[float]:
    """Return low quartile, median and high quartile.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    [2.0, 3.0, 4.0]
    """
    values = list(values)
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def call_of(built: Built, data: Data, which: str) -> Call:
    """What is timed: a forward pass without gradients, or with those of the input and all parameters."""
    if which == PASSES[0]:
        return torch.no_grad()(lambda: built.call(data.input))
    input = data.input.detach().requires_grad_()
    return lambda: torch.autograd.grad(built.call(input), [input, *built.leaves], data.dy)


_checked: dict[tuple[str, Workload, str], dict[str, str]] = {}


def checked(name: str, workload: Workload, device: str) -> dict[str, str]:
    """Where an implementation disagrees with the reference; raises Missing where it does not run."""
    key = name, workload.shortened(), device
    if key not in _checked:
        _checked[key] = disagreement(name, workload, device)
    return _checked[key]


def in_turns(calls: dict[str, Call], rounds: int, timer: Any) -> dict[str, list[float]]:
    """Seconds of every call of each, a list a name: round by round, in a shuffled order."""
    names, order = list(calls), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                found[name].append(clock.seconds(calls[name], timer))
    finally:
        if collects:
            gc.enable()
    return found


def measure(workload: Workload, which: str, names: Iterable[str], device: str, timer: Any, seconds: float) -> Turns:
    """Time implementations of a workload; seconds is for the rounds of each. What cannot run is left out, and why."""
    turns, calls, data = Turns(), {}, Data(workload, device)
    once: dict[str, float] = {}
    for name in names:
        try:
            if wrong := checked(name, workload, device):
                turns.wrong[name] = f"disagrees with the reference: {wrong}"
                continue
            built = IMPLEMENTATIONS[name](data)
            call = call_of(built, data, which)
            or_missing(call) if name in PEERS else call()
            once[name] = clock.seconds(call, timer)
            if which == PASSES[1]:
                turns.peak_bytes[name] = memory_of(call, torch.device(device))[1].peak
            calls[name], turns.runs[name] = call, built.runs
        except (Missing, torch.cuda.OutOfMemoryError) as reason:
            turns.left_out[name] = str(reason).splitlines()[0]
    if calls:
        fit = int(len(calls) * seconds / sum(once[name] for name in calls))
        turns.seconds = in_turns(calls, max(LEAST_ROUNDS, min(MOST_ROUNDS, fit)), timer)
    return turns


class Replay:
    """A clock for pytest-benchmark, which then records times that were taken before."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.now, self.inside = 0.0, False

    def of(self, times: Iterable[float]) -> "Replay":
        self.times, self.inside = list(times), False
        return self

    def __call__(self) -> float:
        if self.inside:
            self.now += self.times.pop(0)
        self.inside = not self.inside
        return self.now
