"""Simulate a compiled kernel: both passes, and what they say of a step."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

from .. import sass
from ..compile import Launch
from .barriers import Poll, find_poll
from .decode import Op, decoded, parameters, step_loop
from .figures import Figures, figures
from .memory import LINE_BYTES
from .multiprocessor import SCHEDULERS, Multiprocessor
from .registers import Block
from .warps import Machine, Traces

STEPS, WARM_UP = 8, 3  # simulated, and of these not counted
LENGTH = 64  # the kernel's T: more than is simulated


@dataclass(frozen=True)
class Kernel:
    """Machine code and how it is launched: what a simulation needs to know."""

    cubin: bytes
    warps: int
    numbers: tuple[int, ...] = ()  # its parameters of 4 bytes, in order
    ctas: int = 1  # of a cluster
    grid: tuple[int, int, int] = (1, 1, 1)

    @staticmethod
    def of(launch: Launch) -> "Kernel":
        """That of a compiled launch, with a longer sequence."""
        given = launch.arguments | {"T": LENGTH}
        numbers = tuple(int(value) for value in given.values() if not isinstance(value, Tensor))
        return Kernel(launch.asm["cubin"], launch.warps, numbers, launch.ctas, launch.grid)


@dataclass(frozen=True)
class Prepared:
    """What the first pass found."""

    ops: list[Op]
    traces: Traces
    poll: Poll | None


@lru_cache(maxsize=8)
def prepared(kernel: Kernel, steps: int = STEPS) -> Prepared:
    """Run the integer code of a kernel; of a cluster that of its second program, whose neighbours are on both sides."""
    code = sass.read(sass.disassemble(kernel.cubin))
    ops = decoded(code)
    loop = step_loop(code)
    rank = 1 if kernel.ctas > 1 else 0
    block = Block.of(parameters(kernel.cubin), kernel.numbers, warps=kernel.warps, grid=kernel.grid, rank=rank)
    traces = Machine(ops, loop, block).run(steps)
    if any(len(begins) <= steps for begins in traces.begins):
        raise RuntimeError(f"simulation: expected {steps} steps, but the loop over time ended earlier")
    return Prepared(ops, traces, find_poll(ops, loop, traces))


@dataclass(frozen=True)
class Conflict:
    """An instruction of the step loop whose accesses to shared memory meet a bank twice."""

    text: str
    wavefronts: int  # passes through the banks, of the warp that takes most
    least: int  # for so many bytes

    @property
    def is_ldmatrix(self) -> bool:
        return self.text.split()[0].startswith(("LDSM", "STSM"))


def conflicts(kernel: Kernel, steps: int = 2) -> list[Conflict]:
    """Those of a kernel, in the order of its code."""
    found: dict[int, tuple[int, int]] = {}
    first = prepared(kernel, steps)
    for ran in first.traces.ran:
        for op, _, access, _ in ran:
            if access is not None and access.is_shared:
                least = max(1, -(-access.bytes // LINE_BYTES))
                found[op.index] = max(found.get(op.index, (0, 0)), (access.wavefronts, least))
    return [Conflict(first.ops[i].text, *found[i]) for i in sorted(found) if found[i][0] > found[i][1]]


@dataclass(frozen=True)
class Simulated:
    """A step in the steady state, by simulation: nothing here is measured."""

    machine: Multiprocessor
    ops: list[Op]
    steps: int
    warm_up: int
    unknown: tuple[str, ...]  # instructions whose address or branch the first pass did not know

    @cached_property
    def ends(self) -> list[int]:
        """When the last warp begins each step, and ends the last."""
        return [max(warp.began[step] for warp in self.machine.warps) for step in range(self.steps + 1)]

    @property
    def cycles(self) -> float:
        """Of a step."""
        return (self.ends[-1] - self.ends[self.warm_up]) / (self.steps - self.warm_up)

    @cached_property
    def waits(self) -> dict[str, float]:
        """A warp's cycles of a step by what it waits for, the longest first; "issue" is what it works."""
        total: Counter[str] = Counter()
        for warp in self.machine.warps:
            first, last = warp.began[self.warm_up], warp.began[-1]
            total["issue"] += sum(first <= time < last for time, _ in warp.issues)
            for start, end, cause in warp.waits:
                total[cause] += max(0, min(end, last) - max(start, first))
        scale = len(self.machine.warps) * (self.steps - self.warm_up)
        return {cause: cycles / scale for cause, cycles in total.most_common() if cycles}

    @cached_property
    def uses(self) -> dict[str, float]:
        """Cycles of a step that each resource is busy, the longest first; of what a scheduler has, of one."""
        issued = sum(len(warp.issues) for warp in self.machine.warps) / SCHEDULERS
        used = self.machine.used(issued)
        ordered = sorted(used.items(), key=lambda item: -item[1])
        return {name: cycles / self.steps for name, cycles in ordered if cycles}

    @property
    def instructions(self) -> float:
        """A warp and step."""
        return sum(len(warp.issues) for warp in self.machine.warps) / len(self.machine.warps) / self.steps


def simulate(
    kernel: Kernel,
    arch: str,
    *,
    programs: int = 1,
    is_cached: bool = False,
    of: Figures | None = None,
    steps: int = STEPS,
) -> Simulated:
    """Simulate a kernel's step loop on a multiprocessor that runs so many of its programs.

    is_cached: what a step reads for the first time is in L2 already. of: other figures than the architecture's.
    Raises NotImplementedError for an architecture without figures, and for an instruction that is missing here.
    """
    known = of or figures(arch)
    if is_cached:
        known = replace(known, hbm_latency=known.l2_latency)
    first = prepared(kernel, steps)
    machine = Multiprocessor(known, first.traces, programs, kernel.grid[0], first.poll)
    machine.run()
    polls = {first.poll.branch, *first.poll.others} if first.poll else set()
    unknown = sorted(first.traces.unknown - polls)
    return Simulated(machine, first.ops, steps, min(WARM_UP, steps - 1), tuple(first.ops[i].text for i in unknown))


def of_launch(launch: Launch, *, programs: int = 1, is_cached: bool = False, of: Figures | None = None) -> Simulated:
    """Simulate a compiled launch, as `simulate` does."""
    figures(launch.spec.arch)
    return simulate(Kernel.of(launch), launch.spec.arch, programs=programs, is_cached=is_cached, of=of)
