"""How warps wait for one another: the program's barrier, the cluster's, fences, polls of global memory.

The other programs of a cluster or grid are taken to be in step with this one: they arrive when it does.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .accesses import Access
from .decode import Op
from .warps import Traces

REDUCTIONS = ("RED", "REDG", "ATOM", "ATOMG")

if TYPE_CHECKING:
    from .multiprocessor import Multiprocessor, Warp


@dataclass(frozen=True)
class Poll:
    """A loop in the step loop that loads a counter until it is high enough, or data until they have come."""

    load: int  # instructions
    first: int
    branch: int
    parameter: int  # of what it loads
    ahead: int  # arrivals, or data, of a step that come before its wait
    stores: int = 0  # of data: how many all warps store a step; 0: a counter
    others: tuple[int, ...] = ()  # of data: branches of further loops, whose data have come with the first one's


def find_poll(ops: Sequence[Op], loop: tuple[int, int], traces: Traces) -> Poll | None:
    """How the programs of a grid wait: a loop around a load of what reductions add to, or strong stores store."""
    parameters: dict[int, int] = {}
    arrivals: set[int] = set()
    stores: Counter[int] = Counter()
    for ran in traces.ran:
        for op, _, access, _ in ran:
            if access is not None and access.lines:
                parameters[op.index] = access.parameter
                if op.name in REDUCTIONS:
                    arrivals.add(access.parameter)
                elif op.name == "STG" and op.is_strong:
                    stores[access.parameter] += 1
    first, last = loop
    found: list[Poll] = []
    for branch in ops[first : last + 1]:
        start = branch.code.target
        if branch.name != "BRA" or start is None or not first < start < branch.index:
            continue
        for load in ops[start : branch.index]:
            of = parameters.get(load.index, -1)
            if load.name not in ("LDG", "ATOM", "ATOMG") or not load.is_strong or of not in arrivals | stores.keys():
                continue
            steps = len(traces.begins[0]) - 1
            names = ("RED", "REDG") if of in arrivals else ("STG",)
            before = any(op.name in names and op.is_strong for op in ops[first : load.index])
            found.append(Poll(load.index, start, branch.index, of, int(before), stores[of] // steps))
            break
    if not found or not found[0].stores:
        return found[0] if found else None
    return replace(found[0], others=tuple(poll.branch for poll in found[1:]))


class Barriers:
    """Of the programs on one multiprocessor."""

    def __init__(self, whole: "Multiprocessor", programs_on_grid: int, poll: Poll | None) -> None:
        self.whole, self.figures, self.poll = whole, whole.figures, poll
        self.programs_on_grid = programs_on_grid
        self.free: defaultdict[int, float] = defaultdict(float)  # by program: when the barrier takes the next warp
        self.count: Counter[tuple[int, str]] = Counter()
        self.complete: list[float] = [0.0]  # the grid's barrier: when each round is, at L2
        self.seen: dict[int, bool] = {}  # by program, of data by warp: whether the last poll found it so
        self.stores: list[float] = []  # of data: when each of a round has reached L2

    def begin(self, warp: "Warp", op: Op) -> None:
        """At issue: what a warp waits for from now on."""
        if op.name == "BAR":
            if len(op.sources) > 1 or "RED" in op.parts:
                raise NotImplementedError(f"simulation of {op.text} is missing: a barrier of a part of the warps")
            if "ARV" not in op.parts:
                warp.block("barrier")
        elif op.name == "UCGABAR_ARV":
            warp.passed_cluster = False
        elif op.name == "UCGABAR_WAIT":
            if not warp.passed_cluster:
                warp.block("cluster barrier")
        elif op.is_far_fence or (op.code.releases is None and op.code.releases_read is None):
            warp.block("fence")

    def arrive(self, time: float, warp: "Warp", op: Op) -> None:
        """Out of the address stage."""
        if op.name in ("MEMBAR", "FENCE"):
            return self._fence(time, warp, op)
        program, figures = warp.program, self.figures
        self.free[program] = max(time, self.free[program]) + figures.barrier_warp
        kind = "barrier" if op.name == "BAR" else "cluster barrier"
        self.count[program, kind] += 1
        if self.count[program, kind] == self.whole.warps_a_program:
            self.count[program, kind] = 0
            last = self.free[program] - figures.barrier_warp
            if kind == "barrier":
                self.whole.calendar.at(last + figures.barrier, self._open, program, kind)
            else:
                self.whole.calendar.at(last + figures.cluster_barrier - 2, self._open, program, kind)

    def _open(self, time: float, program: int, kind: str) -> None:
        for warp in self.whole.warps:
            if warp.program == program:
                if warp.blocked == kind:
                    warp.unblock(time)
                elif kind == "cluster barrier":
                    warp.passed_cluster = True

    def _fence(self, time: float, warp: "Warp", op: Op) -> None:
        figures = self.figures
        of_block = figures.fence_block if op.name == "MEMBAR" else figures.fence_shared
        done = time - 2 + (figures.fence_device if op.is_far_fence else of_block)
        if op.is_far_fence:
            done = max(done, warp.stored)
        for board in (op.code.releases, op.code.releases_read):
            if board is not None:
                self.whole.calendar.at(done, self.whole.release, warp, board)
        self.whole.calendar.at(done, self._end_fence, warp)

    def _end_fence(self, time: float, warp: "Warp") -> None:
        if warp.blocked == "fence":
            warp.unblock(time)

    # The grid's barrier.

    def reduction(self, time: float, access: Access) -> None:
        """This program's arrival: the round is complete when all programs' have been added."""
        if self.poll and access.parameter == self.poll.parameter:
            figures = self.figures
            self.complete.append(time + figures.reduction_travel + figures.reduction_each * self.programs_on_grid)

    def stored(self, time: float, access: Access) -> None:
        """A strong store: a round of data is complete when all of its stores are at L2."""
        if self.poll and self.poll.stores and access.parameter == self.poll.parameter:
            self.stores.append(time + self.figures.reduction_travel)
            if len(self.stores) == self.poll.stores:
                self.complete.append(max(self.stores))
                self.stores.clear()

    def polled(self, warp: "Warp", op: Op, begins: float, done: float) -> None:
        poll = self.poll
        if poll is None:
            return
        wanted, at_l2 = warp.rounds + poll.ahead, (begins + done) / 2
        is_there = len(self.complete) > wanted and self.complete[wanted] <= at_l2
        if poll.stores and poll.first <= op.index < poll.branch and op.is_strong:
            self.seen[warp.number] = self.seen.get(warp.number, True) and is_there
        elif op.index == poll.load:
            self.seen[warp.program] = is_there

    def must_poll_again(self, warp: "Warp", op: Op) -> bool:
        """At the branch that ends a polling loop."""
        if self.poll is None or op.index != self.poll.branch:
            return False
        found = self.seen.pop(warp.number, True) if self.poll.stores else self.seen.get(warp.program, True)
        warp.rounds += found
        return not found
