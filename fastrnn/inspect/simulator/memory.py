"""The way of an access to memory: a queue and an address stage a scheduler, one data stage, and what lies behind it.

Shared memory answers out of the data stage; other programs' shared memory over a link of its own; global memory out of
L1, L2 or the device's memory. Stores are done when they are handed on, but a fence of the device waits for them.
"""

from collections import Counter, deque
from typing import TYPE_CHECKING

from .accesses import NOTHING, Access
from .decode import RETURNS_DATA, SHARED, STORES, Op
from .events import Resource
from .warps import Executed

if TYPE_CHECKING:
    from .multiprocessor import Multiprocessor, Warp

SCHEDULERS = 4
WARP_BYTES = 32  # of one byte a lane
LINE_BYTES = 128
OPERANDS_READ = 4  # cycles behind the address stage until a store's operands have been read; assumed
AWAY = 4  # cycles until a store has left the data stage; assumed
WITHOUT_ADDRESSES = ("S2R", "S2UR", "LDC")
WIDE_ADDRESSES = ("LDG", "STG", "LD", "ST", "RED", "REDG", "ATOM", "ATOMG", "LDGSTS", "CCTL")


class Memory:
    """Of one multiprocessor."""

    def __init__(self, whole: "Multiprocessor", loaded_before: set[int], written: set[int]) -> None:
        self.whole, self.figures = whole, whole.figures
        self.waiting = [0] * SCHEDULERS  # between issue and address stage
        self.queues: list[deque] = [deque() for _ in range(SCHEDULERS)]
        self.at_work = [False] * SCHEDULERS
        self.address = [Resource() for _ in range(SCHEDULERS)]
        self.link = [Resource() for _ in range(SCHEDULERS)]
        self.data, self.to_l2, self.from_l2, self.dsmem = (Resource() for _ in range(4))
        self.l1 = dict.fromkeys(loaded_before, 0.0)  # a line, and when it is there
        self.l2 = dict.fromkeys(loaded_before, 0.0)
        self.written = written

    def is_full(self, scheduler: int) -> bool:
        return self.waiting[scheduler] >= self.figures.queue

    def enqueue(self, time: float, warp: "Warp", executed: Executed) -> None:
        """Hand on what a scheduler has issued: accesses, and what barriers and fences send the same way."""
        scheduler = warp.scheduler
        self.waiting[scheduler] += 1
        self.queues[scheduler].append((self._service(executed.op), warp, executed))
        if not self.at_work[scheduler]:
            self.at_work[scheduler] = True
            self.whole.calendar.at(time + 1, self._next, scheduler)

    def _service(self, op: Op) -> float:
        """Cycles in the address stage."""
        if op.pipe == "barrier":
            return 1
        if op.name in WITHOUT_ADDRESSES:
            return 2
        moved = WARP_BYTES * (8 if op.name in WIDE_ADDRESSES else 4)
        if op.name in STORES | RETURNS_DATA:
            moved += WARP_BYTES * max(4, op.width)
        return max(self.figures.address, moved / self.figures.link)

    def _next(self, time: float, scheduler: int) -> None:
        """The address stage takes the next, unless too much waits for the data stage."""
        if not self.queues[scheduler]:
            self.at_work[scheduler] = False
            return
        late = self.data.free - self.figures.buffer
        if late > time:
            return self.whole.calendar.at(late, self._next, scheduler)
        service, warp, executed = self.queues[scheduler].popleft()
        self.waiting[scheduler] -= 1
        self.address[scheduler].take(time, service)
        self.whole.calendar.at(time + service, self._dispatch, warp, executed, 1 + service)
        self.whole.calendar.at(time + service, self._next, scheduler)

    def _dispatch(self, time: float, warp: "Warp", executed: Executed, spent: float) -> None:
        """Out of the address stage; spent: cycles since issue, had nothing been in the way."""
        op, figures, whole = executed.op, self.figures, self.whole
        if op.pipe == "barrier":
            return whole.barriers.arrive(time, warp, op)
        if op.code.releases_read is not None:
            whole.calendar.at(time + OPERANDS_READ, whole.release, warp, op.code.releases_read)
        fixed = {
            "S2R": figures.register_latency, "S2UR": figures.register_latency, "LDC": figures.constant_latency,
            "SYNCS": figures.mbarrier_latency,
        }.get(op.name)  # fmt: skip
        if fixed is not None:
            done = time + fixed - spent
        elif op.address is None:  # shuffles and the like
            done = self.data.take(time, 1) + figures.shuffle_latency - spent
        elif not executed.lanes or executed.access is NOTHING:
            done = time + figures.address
        else:
            access = executed.access or self._unknown(op)
            serve = self._shared if access.is_shared else self._global
            done = serve(time, warp, op, access, spent)
        if op.code.releases is not None:
            whole.calendar.at(done, whole.release, warp, op.code.releases)

    def _unknown(self, op: Op) -> Access:
        """An address that is not known: no bank twice, no line but its own."""
        size = WARP_BYTES * op.width
        if op.name in SHARED:
            return Access(size, wavefronts=max(1, size // LINE_BYTES))
        return Access(size, sectors=max(1, size // 32))

    def _shared(self, time: float, warp: "Warp", op: Op, access: Access, spent: float) -> float:
        figures = self.figures
        passes = access.wavefronts * LINE_BYTES / figures.shared_bytes
        begins = self.data.take(time, passes)
        if op.name in STORES:
            return begins + access.wavefronts
        further = figures.wavefront_latency * (access.wavefronts - 1)
        if access.remote:
            # In step with it the others of the cluster read as much of this program's shared memory.
            size = access.bytes * access.remote
            self.data.take(begins + passes, size / LINE_BYTES)
            cycles = size / figures.dsmem_bytes
            arrives = max(begins + 1, self.dsmem.take(begins, cycles) + cycles)
            return arrives - 1 + figures.dsmem_latency - spent + further
        if access.by_address:
            return begins + figures.dsmem_own_latency - spent + further
        each = LINE_BYTES / figures.link
        returns = self.link[warp.scheduler].take(begins + 1, each * access.wavefronts)
        return returns - 1 + figures.shared_latency - spent + max(further, each * (access.wavefronts - 1))

    def _global(self, time: float, warp: "Warp", op: Op, access: Access, spent: float) -> float:
        figures = self.figures
        sets = Counter(line % figures.tag_sets for line in access.lines)
        passes = max(1, *sets.values(), access.bytes / LINE_BYTES) if sets else 1
        begins = self.data.take(time, passes)
        size = access.sectors * 32
        if op.name in STORES:
            if op.name in ("RED", "REDG"):
                self.whole.barriers.reduction(begins, access)
                return begins + AWAY
            sent = self.to_l2.take(begins, size / figures.l2_bytes) + size / figures.l2_bytes
            warp.stored = max(warp.stored, sent + figures.l2_latency)
            if op.is_strong:
                self.whole.barriers.stored(begins, access)
            for line in access.lines:
                self.l2.setdefault(line, begins)
            return begins + AWAY
        if op.is_prefetch:
            for line in access.lines:
                self.l2.setdefault(line, begins + figures.hbm_latency)
            return begins + AWAY
        if op.name in RETURNS_DATA:
            return begins + figures.atomic_latency - spent
        done, level = self._loaded(begins, op, access, spent)
        if op.code.releases is not None:
            warp.causes[op.code.releases] = level
        self.whole.barriers.polled(warp, op, begins, done)
        return done

    def _loaded(self, begins: float, op: Op, access: Access, spent: float) -> tuple[float, str]:
        """When a load is done, and where its last line came from."""
        figures = self.figures
        done, level = begins + figures.l1_latency - spent, "L1"
        missing = [line for line in access.lines if op.is_strong or line not in self.l1]
        for line in access.lines:
            if line not in missing and self.l1[line] > done:
                done, level = self.l1[line], "data in flight"
        if access.lines and not missing:
            return done, level
        size = access.sectors * 32 / figures.l2_bytes
        queued = self.from_l2.take(begins, size) + size - begins
        if not access.lines:
            return begins + figures.l2_latency - spent + queued, "L2"
        for line in missing:
            if line not in self.l2:
                is_written = access.parameter in self.written
                latency = figures.l2_latency if is_written else figures.hbm_latency
                self.l2[line] = begins + latency - spent
            arrives = max(begins + figures.l2_latency - spent, self.l2[line]) + queued
            if not op.is_strong:
                self.l1[line] = arrives
            if arrives > done:
                done = arrives
                level = "L2" if arrives <= begins + figures.l2_latency - spent + queued else "device memory"
        return done, level

    def used(self) -> dict[str, float]:
        """Busy cycles so far, of one scheduler's or of the only one."""
        return {
            "address stage": sum(one.busy for one in self.address) / SCHEDULERS,
            "shared memory and L1": self.data.busy,
            "to L2": self.to_l2.busy,
            "from L2": self.from_l2.busy,
            "distributed shared memory": self.dsmem.busy,
        }
