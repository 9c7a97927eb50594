"""The second pass: the warps of a program on the four schedulers of a multiprocessor, cycle by cycle.

A scheduler issues an instruction a cycle, of the warp that it issued from last or else of the youngest that can [H]. A
warp can when the stall count of its last instruction has passed, the scoreboards that it awaits are free, and a pipe
takes its next. Results of fixed latency need no more than the stall counts, which the compiler set for them.
"""

import math
from collections.abc import Sequence
from typing import Any

from ..timing import multiply_adds_of
from .barriers import Barriers, Poll
from .decode import STORES, Op
from .events import NEVER, Calendar
from .figures import Figures
from .memory import SCHEDULERS, Memory
from .warps import Executed, Traces

MMA = 16 * 8 * 16  # multiply-adds of the instruction that Figures.tensor is about
READ_SPECIAL = 4  # cycles until a special function has read its operand; assumed
MOST_CYCLES = 2_000_000
INTEGER, FIRST, SECOND, UNIFORM, TENSOR, SPECIAL = range(6)  # pipes of a scheduler; two of fp32
PIPES = ("integer", "fp32", "fp32", "uniform", "tensor cores", "special functions")
LOADS = {
    "LDS": "shared memory", "LDSM": "shared memory", "LD": "distributed shared memory", "SHFL": "shuffle",
    "S2R": "special register", "S2UR": "special register", "LDC": "constant bank",
}  # fmt: skip


class Warp:
    """Where a warp is in what it runs, and what it waits for."""

    def __init__(self, number: int, program: int, ran: Sequence[Executed], begins: Sequence[int]) -> None:
        self.number, self.program, self.ran = number, program, ran
        self.scheduler = number % SCHEDULERS
        self.begins, self.began = set(begins), []  # type: ignore[var-annotated]
        self.at = self.issued_at = self.ready = self.rounds = 0
        self.next_try: int = 0  # NEVER: until something wakes it
        self.pending, self.causes, self.freed = [0] * 6, [""] * 6, [0] * 6
        self.blocked: str | None = None
        self.was_blocked, self.opened = "", 0
        self.passed_cluster = False
        self.stored = 0.0  # when its stores have reached L2
        self.busy_pipe, self.busy_cycles, self.after_branch = "", 0, False
        self.issues: list[tuple[int, int]] = []  # (cycle, instruction)
        self.waits: list[tuple[int, int, str]] = []  # (from, to, cause)

    @property
    def is_done(self) -> bool:
        return self.at >= len(self.ran)

    def block(self, cause: str) -> None:
        self.blocked = self.was_blocked = cause

    def unblock(self, time: float) -> None:
        self.blocked, self.opened = None, math.ceil(time)
        self.next_try = max(self.ready, self.opened)

    def account(self, time: int) -> None:
        """Divide the cycles since the last issue among their causes, in the order in which they ended."""
        now = self.issued_at + 1

        def until(end: int, cause: str) -> None:
            nonlocal now
            end = min(end, time)
            if end > now:
                self.waits.append((now, end, cause))
                now = end

        if self.was_blocked:
            until(self.opened, self.was_blocked)
        until(self.ready, "branch" if self.after_branch else "stall count")
        awaits = sorted(self.ran[self.at].op.code.awaits, key=lambda board: self.freed[board])
        for board in awaits:
            until(self.freed[board], self.causes[board])
        until(now + self.busy_cycles, self.busy_pipe)
        until(time, "another warp issued")
        self.was_blocked, self.busy_cycles = "", 0


class Multiprocessor:
    """One multiprocessor, on which the given number of programs of a kernel run."""

    def __init__(self, figures: Figures, traces: Traces, programs: int, on_grid: int, poll: Poll | None) -> None:
        self.figures, self.calendar = figures, Calendar()
        self.warps_a_program = len(traces.ran)
        self.warps = [
            Warp(program * len(traces.ran) + n, program, ran, begins)
            for program in range(programs)
            for n, (ran, begins) in enumerate(zip(traces.ran, traces.begins, strict=True))
        ]
        self.schedulers = [[w for w in self.warps if w.scheduler == s] for s in range(SCHEDULERS)]
        written = {
            executed.access.parameter
            for ran in traces.ran
            for executed in ran
            if executed.op.name in STORES and executed.access is not None and executed.access.lines
        }
        self.memory = Memory(self, traces.loaded_before, written)
        self.barriers = Barriers(self, on_grid, poll)
        self.free = [[0.0] * len(PIPES) for _ in range(SCHEDULERS)]
        self.busy = [0.0] * len(PIPES)
        self.uses: dict[int, Any] = {}  # by instruction: pipes, of which it takes any or all, and for how long
        self.last: list[Warp | None] = [None] * SCHEDULERS

    def release(self, time: float, warp: Warp, board: int) -> None:
        """An instruction's result is there, or its operands are read."""
        warp.pending[board] -= 1
        warp.freed[board] = math.ceil(time)
        if warp.next_try == NEVER and not warp.blocked:
            warp.next_try = max(warp.ready, warp.freed[board])

    def hold(self, warp: Warp, board: int | None, cause: str) -> None:
        if board is not None:
            warp.pending[board] += 1
            warp.causes[board] = cause

    def pipes(self, op: Op) -> tuple[tuple[int, ...], bool, float]:
        found = self.uses.get(op.index)
        if found is None:
            figures = self.figures
            both = (FIRST, SECOND) if figures.fma_pipes > 1 else (SECOND,)
            weight = multiply_adds_of(op.code.opcode) / MMA if op.pipe == "tensor" else 0
            found = self.uses[op.index] = {
                "integer": ((INTEGER,), False, figures.alu),
                "fp32": (both, False, figures.fma),
                "one fp32": ((SECOND,), False, figures.fma),
                "both fp32": ((FIRST, SECOND), True, figures.fma),
                "uniform": ((UNIFORM,), False, figures.uniform),
                "tensor": ((TENSOR,), False, figures.tensor * weight),
                "special": ((SPECIAL,), False, figures.special),
            }.get(op.pipe, ((), False, 0.0))
        return found

    def wakes(self, warp: Warp, time: int) -> int:
        """Return when to look at a warp again: at once if its next instruction can issue."""
        op = warp.ran[warp.at].op
        if warp.blocked or any(warp.pending[board] for board in op.code.awaits):
            return NEVER
        if op.pipe in ("memory", "barrier"):
            full = op.name != "UCGABAR_WAIT" and self.memory.is_full(warp.scheduler)
            return self._busy(warp, time, time + 1, "memory") if full else time
        pipes, takes_all, _ = self.pipes(op)
        if not pipes:
            return time
        free = self.free[warp.scheduler]
        until = (max if takes_all else min)(free[pipe] for pipe in pipes)
        if op.pipe == "special":
            until -= self.figures.special_queue * self.figures.special
        return self._busy(warp, time, math.ceil(until), PIPES[pipes[-1]]) if until > time else time

    def _busy(self, warp: Warp, time: int, until: int, pipe: str) -> int:
        warp.busy_pipe = f"pipe: {pipe}"
        warp.busy_cycles += until - time
        return until

    def issue(self, warp: Warp, time: int) -> None:
        """A warp's next instruction."""
        executed = warp.ran[warp.at]
        op, code = executed.op, executed.op.code
        warp.account(time)
        if warp.at in warp.begins:
            warp.began.append(time)
        warp.issues.append((time, op.index))
        warp.at += 1
        warp.issued_at, warp.after_branch = time, False
        warp.ready = warp.next_try = time + max(1, code.stall)
        if op.pipe == "memory":
            self.hold(warp, code.releases, LOADS.get(op.name, "memory"))
            self.hold(warp, code.releases_read, "operands read")
            self.memory.enqueue(time, warp, executed)
        elif op.pipe == "barrier":
            self.barriers.begin(warp, op)
            if op.name != "UCGABAR_WAIT":
                if op.name in ("MEMBAR", "FENCE"):
                    self.hold(warp, code.releases, "fence")
                    self.hold(warp, code.releases_read, "fence")
                self.memory.enqueue(time, warp, executed)
        elif op.pipe == "branch":
            self._branch(warp, executed, time)
        elif op.name == "CCTL" and "IVALL" in op.parts:
            self.memory.l1.clear()
        else:
            self._compute(warp, op, time)

    def _compute(self, warp: Warp, op: Op, time: int) -> None:
        pipes, takes_all, cycles = self.pipes(op)
        free = self.free[warp.scheduler]
        taken = pipes if takes_all else pipes[:1] if pipes and free[pipes[0]] <= time else pipes[-1:]
        for pipe in taken:
            begins = max(time, free[pipe])
            free[pipe] = begins + cycles
            self.busy[pipe] += cycles
            if pipe == SPECIAL:
                for board, cause, latency in (
                    (op.code.releases, "special function", self.figures.special_latency),
                    (op.code.releases_read, "operands read", READ_SPECIAL),
                ):
                    self.hold(warp, board, cause)
                    if board is not None:
                        self.calendar.at(begins + latency, self.release, warp, board)

    def _branch(self, warp: Warp, executed: Executed, time: int) -> None:
        again = self.barriers.must_poll_again(warp, executed.op)
        if again:  # go round the polling loop once more: back in what the warp ran
            assert self.barriers.poll is not None
            warp.at -= 1
            while warp.ran[warp.at].op.index != self.barriers.poll.first:
                warp.at -= 1
        if again or executed.taken:
            warp.ready = warp.next_try = time + max(executed.op.code.stall, int(self.figures.branch))
            warp.after_branch = True

    def run(self) -> int:
        """Run until all warps have run everything, and return that cycle."""
        time, left = 0, len(self.warps)
        while left:
            self.calendar.until(time)
            following = NEVER
            chosen: list[Warp] = []
            for scheduler, warps in enumerate(self.schedulers):
                warp, wakes = self._choose(self.last[scheduler], warps, time)
                following = min(following, wakes)
                if warp is not None:
                    chosen.append(warp)
            for warp in chosen:
                self.issue(warp, time)
                self.last[warp.scheduler] = warp
                if warp.is_done:
                    left -= 1
                    warp.began.append(time + 1)
                following = min(following, warp.next_try)
            if not left:
                break
            following = min(following, math.ceil(self.calendar.next))
            if following >= NEVER or time > MOST_CYCLES:
                stuck = next(warp for warp in self.warps if not warp.is_done)
                raise RuntimeError(
                    f"simulation: at cycle {time} warp {stuck.number} waits for ever: {stuck.blocked or 'a result'}, "
                    f"before {stuck.ran[stuck.at].op.text}"
                )
            time = max(time + 1, following)
        return time + 1

    def _choose(self, last: Warp | None, warps: Sequence[Warp], time: int) -> tuple[Warp | None, int]:
        """The warp that a scheduler issues from now, and when the others are to be looked at."""
        order = [last] if last is not None else []
        order += [warp for warp in reversed(warps) if warp is not last]
        following, found = NEVER, None
        for warp in order:
            if warp.is_done:
                continue
            if found is not None:  # it may issue in the next cycle
                following = min(following, max(warp.next_try, time + 1))
                continue
            if warp.next_try > time:
                following = min(following, warp.next_try)
                continue
            wakes = self.wakes(warp, time)
            if wakes <= time:
                found = warp
            else:
                warp.next_try = wakes
                following = min(following, wakes)
        return found, following

    def used(self, cycles_issued: float) -> dict[str, float]:
        """Return the busy cycles of each resource. If every scheduler has one, they are those of one scheduler."""
        found = {"issue": cycles_issued}
        for pipe, busy in zip(PIPES, self.busy, strict=True):
            found[pipe] = found.get(pipe, 0.0) + busy / SCHEDULERS / PIPES.count(pipe)
        return found | self.memory.used()
