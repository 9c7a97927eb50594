"""What goes before a time is taken: kernels compiled side by side, clocks brought up; and the kernel that is asked for.

Compiling takes most of a visit's time if it is left to the process that measures: here every core compiles, without a
GPU, into Triton's cache on disk, where the measuring process finds what it launches.
"""

import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from fastrnn.device import DeviceSpec
from fastrnn.inspect import measure
from fastrnn.inspect.compile import PASSES, Problem, call_backward, call_forward, compile_problem
from fastrnn.planning import cluster, tuning
from fastrnn.planning.kernel_plan import GridTooLargeError
from fastrnn.planning.planner import Plan

from . import clock
from .processes import jobs
from .stages import Record
from .tune import trying


class Job(NamedTuple):
    """A kernel to time: "auto" or a tier; ctas asks for clusters of so many programs."""

    cell: str
    hidden: int
    backend: str = "auto"
    ctas: int = 0

    @property
    def key(self) -> Record:
        return {"cell": self.cell, "H": self.hidden, "asked": f"{self.backend} {self.ctas or ''}".strip()}

    def problem(self, arch: str) -> Problem:
        tiny = arch == "interpreter"
        sizes = (8, 2, 2) if tiny else (self.hidden,)
        dtype = torch.float32 if tiny else torch.bfloat16
        return Problem(self.cell, *sizes, dtype=dtype, arch=arch, backend=self.backend)


@contextlib.contextmanager
def planned(job: Job, problem: Problem) -> Iterator[Plan]:
    """The plan of a job, by which launches in the block go; NotImplementedError where there is no such kernel."""
    tuned = tuning.of(problem.arch)
    if job.ctas > 1:
        tiles = -(-problem.batch_size // cluster.BLOCK_B)
        key = tuning.cluster_key(problem.request, tiles)
        tuned = tuning.Tuned(tuned.forms, {**tuned.ctas, key: job.ctas})
    with trying(problem.arch, tuned):
        try:
            plan = problem.plan()
        except GridTooLargeError as reason:
            raise NotImplementedError(str(reason)) from None
        if plan.kernel is not None and job.ctas > 1 and plan.kernel.ctas != job.ctas:
            raise NotImplementedError(f"clusters of {job.ctas} do not hold this")
        yield plan


def modelled(job: Job, arch: str) -> Record:
    """Compile both passes of a job, and a step's microseconds by the six bounds and by simulation; or why not."""
    from fastrnn.inspect.simulator.simulate import of_launch
    from fastrnn.inspect.timing import RATES
    from fastrnn.inspect.timing import modelled as model

    try:
        problem = job.problem(arch)
        with planned(job, problem):
            found = compile_problem(problem).launches
        times = {which: model(launch) for which, launch in found.items()}
    except Exception as reason:  # measuring says more
        return {"not compiled": f"{type(reason).__name__}: {str(reason)[:200]}"}
    record = {f"modelled_{which}": round(time.us, 4) for which, time in times.items() if time is not None}
    try:
        cycles = {which: of_launch(launch, is_cached=True).cycles for which, launch in found.items()}
    except NotImplementedError as reason:
        return record | {"not simulated": str(reason)}
    return record | {f"simulated_{which}": round(each / RATES[arch].ghz / 1000, 4) for which, each in cycles.items()}


@contextlib.contextmanager
def side_by_side(work: Callable[..., Any], arguments: Sequence[tuple]) -> Iterator[Iterator[Any]]:
    """What work gives for each, in order and as it comes, in processes that compile whatever this one does."""
    if not arguments:
        yield iter(())
        return
    here = os.environ.get("TRITON_INTERPRET", "0")
    os.environ["TRITON_INTERPRET"] = "0"  # read when a process starts
    pool = ProcessPoolExecutor(jobs(len(arguments)), multiprocessing.get_context("spawn"))
    try:
        results = pool.map(work, *zip(*arguments, strict=True))
        os.environ["TRITON_INTERPRET"] = here
        yield results
    finally:
        os.environ["TRITON_INTERPRET"] = here
        pool.shutdown(wait=False, cancel_futures=True)


def spec(dry: bool) -> DeviceSpec:
    return DeviceSpec.of(torch.device("cpu" if dry else "cuda"))


def warm_up(dry: bool) -> None:
    """Bring the GPU's clocks up."""
    if not dry:
        measure.warm_up()


def median_ms(call: Callable[[], object], runs: int = 11, warm_ups: int = 3) -> float:
    """Of so many calls, each after the first few."""
    timer = clock.EventClock() if torch.cuda.is_available() else clock.WallClock()
    return round(statistics.median([clock.seconds(call, timer) for _ in range(warm_ups + runs)][warm_ups:]) * 1e3, 4)


def one_launch(problem: Problem, backend: str, device: str, passes: Sequence[str] = PASSES) -> Record:
    """Run passes once; the outputs by name."""
    tensors: Any = problem.tensors(device)
    outputs = call_forward(problem.cell, tensors, backend)
    if "backward" in passes:
        outputs |= call_backward(problem.cell, tensors, outputs, backend, needs_sums=False)
    return outputs
