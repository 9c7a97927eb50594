"""What `auto` takes on a CPU costs no more than torch.nn's call: time and memory, in every row of the table of cases.

    python -m bench.cpu --auto    print the table, and fail with the rows that are slower or larger (six minutes)

Times are of one thread, of calls in turns whose order changes: a ratio is the median of pairs. What is slower than MOST
is measured again before it counts, for on a busy machine a median of few pairs may be chance. Peaks are those of
torch's allocator in one call, from which memory that earlier calls left for later ones is taken away first.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastrnn.cells import CELLS
from fastrnn.cpu import memory
from fastrnn.inspect.memory import memory_of
from tests.support.cases import Case

from . import clock
from .adapters import IMPLEMENTATIONS
from .cases import table as cases
from .turns import call_of, checked, quartiles
from .workload import PASSES, Data, Workload

MOST = 1.02  # of torch.nn's time
# Or so much more: what Python between the module and torch's own kernel takes of calls that last 20 to 100 us.
PYTHON = 3e-6  # seconds
BATCHES, LEAST_PAIRS = 6, 9
NAMES = ("torch.nn", "fastrnn auto")


@dataclass
class Found:
    """What a row costs, torch.nn's call and ours; of each pass in the order of PASSES."""

    workload: Workload
    runs: str  # ours: the backend
    seconds: list[tuple[float, float, float]] = field(default_factory=list)  # theirs, ours, and the ratio
    peaks: list[tuple[int, int]] = field(default_factory=list)  # bytes

    @property
    def wrong(self) -> list[str]:
        """What costs more than it may."""
        found = [
            f"{self.workload}, {which}: {ratio:.3f} of torch.nn's time, {1e6 * theirs:.0f} us"
            for which, (theirs, own, ratio) in zip(PASSES, self.seconds, strict=True)
            if slower(theirs, own, ratio)
        ]
        found += [
            f"{self.workload}, {which}: {own} bytes at the peak, torch.nn's call {theirs}"
            for which, (theirs, own) in zip(PASSES, self.peaks, strict=True)
            if own > theirs + self.spare(which)
        ]
        return found

    def spare(self, which: str) -> float:
        """Bytes that a peak may be larger.

        Inference copies W_hh in another order: of few sequences it is larger than what the steps of all of time need.
        torch.nn's packed batches are without padding, which the tensors of x_gates and y have.
        """
        workload = self.workload
        if workload.kind != "plain":
            return float("inf")
        weights = CELLS[workload.cell].gates * workload.units**2 * workload.shape.D * 4
        return weights if which == PASSES[0] and self.runs == "cpu" else 0


def slower(theirs: float, own: float, ratio: float) -> bool:
    return ratio > MOST and own - theirs > PYTHON


def rows() -> list[Workload]:
    """Of the table of cases, the part for CPUs that torch.nn has, and the rows of bench/cpu.py."""
    from .cpu import SHAPES

    issue = [Workload("cpu", cell, Case(*shape, 1)) for cell in ("gru", "rnn_tanh", "lstm") for shape in SHAPES]
    return [*(w for w in cases("cpu") if CELLS[w.cell].of_torch and w.heads == 1), *issue]


def in_turns(calls: list[Callable[[], Any]], seconds: float) -> tuple[float, float, float]:
    """Medians of both, and the median of the ratios of pairs."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    collects = gc.isenabled()
    gc.disable()
    try:
        while len(found[0]) < LEAST_PAIRS or time.perf_counter() < end:
            for place in (0, 1) if len(found[0]) % 2 else (1, 0):
                start = now()
                calls[place]()
                found[place].append(now() - start)
    finally:
        if collects:
            gc.enable()
    theirs, own = (quartiles(times)[1] for times in found)
    return theirs, own, quartiles(b / a for a, b in zip(*found, strict=True))[1]


def compared(workload: Workload, seconds: float) -> Found:
    """A row's time and memory; raises AssertionError where results differ from the reference's."""
    for name in NAMES:
        wrong = checked(name, workload, "cpu")
        assert not wrong, f"{workload}: {name} disagrees with the reference: {wrong}"
    data = Data(workload, "cpu")
    built = [IMPLEMENTATIONS[name](data) for name in NAMES]
    found = Found(workload, built[1].runs)
    for which in PASSES:
        calls = [call_of(one, data, which) for one in built]
        found.peaks.append((peak(calls[0]), peak(calls[1])))
        best = in_turns(calls, seconds)
        for _ in range(BATCHES - 1):
            if not slower(*best):
                break
            best = min(best, in_turns(calls, 2 * seconds), key=lambda times: times[2])
        found.seconds.append(best)
    return found


def peak(call: Callable[[], Any]) -> int:
    """Bytes at most in a call, of a process that has run it before and has kept no memory since."""
    call()
    gc.collect()
    memory.forget()
    return memory_of(call, torch.device("cpu"))[1].peak


def table(seconds: float, workloads: Iterable[Workload], wrong: list[str]) -> Iterator[str]:
    """Lines of the table; what costs more than it may is added to wrong."""
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, llvmlite {clock.installed('llvmlite')}"
    yield f"Measured on one {clock.cpu()}, one thread; {versions}."
    yield ""
    yield f"| row | auto takes | {' | '.join(f'{which}: torch.nn, us | time | peak' for which in PASSES)} |"
    yield "|---|---|---|---|---|---|---|---|"
    for workload in workloads:
        found = compared(workload, seconds)
        columns = [str(workload), found.runs]
        for (theirs, _, ratio), (their_peak, own_peak) in zip(found.seconds, found.peaks, strict=True):
            columns += [f"{1e6 * theirs:.0f}", f"{ratio:.2f}x", f"{own_peak / their_peak:.2f}x"]
        yield f"| {' | '.join(columns)} |"
        wrong += found.wrong
