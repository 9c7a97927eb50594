"""The first pass: the integer code of all warps of a program, to know what they run and access in the step loop.

A kernel's parameters get made-up pointers; what comes from memory is not known, nor what is computed from it. Warps
that are at the same instruction run it together. Lanes that part at a branch run one after the other until BSYNC.
Where a branch hangs on what is not known it is not taken, so that a loop that polls is left at once; but the step loop
goes on, whose length a kernel may read from memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .accesses import Access, accesses
from .decode import GLOBAL, SHARED, STORES, Op, Operand
from .integers import MASK, Array
from .registers import LANES, Block, Inputs, Registers

U = np.uint64
MOST_INSTRUCTIONS = 200_000  # of a group of warps, until the step loop has come round


class Executed(NamedTuple):
    """An instruction as one warp ran it."""

    op: Op
    lanes: int
    access: Access | None  # None: no memory, or an address that is not known
    taken: bool  # a branch


@dataclass
class Traces:
    """What each warp ran from the loop's first instruction on, and where in it each step begins."""

    ran: list[list[Executed]]
    begins: list[list[int]]
    loaded_before: set[int] = field(default_factory=set)  # lines of global memory
    unknown: set[int] = field(default_factory=set)  # instructions of the loop whose address or branch is not known


class Machine:
    """Where each warp is, and what it has run."""

    def __init__(self, ops: Sequence[Op], loop: tuple[int, int], block: Block) -> None:
        self.ops, self.block = ops, block
        self.first, self.last = loop
        shape = (block.warps, LANES)
        self.registers = Registers(block)
        self.at = np.zeros(block.warps, np.int64)
        self.rounds = np.zeros(block.warps, np.int64)
        self.running = np.ones(block.warps, bool)
        self.active = np.ones(shape, bool)
        self.aside: list[list[tuple[int, Array]]] = [[] for _ in range(block.warps)]  # lanes that jumped elsewhere
        self.arrived = np.zeros(shape, bool)  # lanes that wait at BSYNC
        self.traces = Traces([[] for _ in range(block.warps)], [[] for _ in range(block.warps)])

    # Running.

    def run(self, steps: int) -> Traces:
        """Run until every warp has gone through the step loop so often; RuntimeError if a pass does not end."""
        for _ in range(MOST_INSTRUCTIONS):
            if not self.running.any():
                return self.traces
            key = np.where(self.running, self.rounds * len(self.ops) + self.at, np.iinfo(np.int64).max)
            group = np.flatnonzero(key == key.min())
            at = int(self.at[group[0]])
            if at == self.first:
                group = self._begin_step(group, steps)
            if len(group):
                self._step(self.ops[at], group)
        raise RuntimeError(f"simulation: one pass of the time loop did not end within {MOST_INSTRUCTIONS} instructions")

    def _begin_step(self, group: Array, steps: int) -> Array:
        for warp in group:
            self.traces.begins[warp].append(len(self.traces.ran[warp]))
        self.rounds[group] += 1
        self.running[group] = self.rounds[group] <= steps
        return group[self.running[group]]

    def _step(self, op: Op, group: Array) -> None:
        x = Inputs(self.registers, op, group)
        active = self.active[group]
        lanes = active & self.registers.read(op.guard, x) if op.guard else active
        maybe = active & ~x.known if op.guard else np.zeros_like(active)
        if op.pipe == "branch":
            return self._branch(op, group, lanes, maybe)
        executed = lanes | maybe
        found: Sequence[Access | None] = [None] * len(group)
        if op.address is not None:
            found = self._access(op, group, executed, maybe)
        x.known[:] = True
        self.registers.compute(op, x, executed, maybe)
        self._record(op, group, executed, found, np.zeros(len(group), bool))
        self.at[group] += 1

    def _access(self, op: Op, group: Array, lanes: Array, maybe: Array) -> Sequence[Access | None]:
        x = Inputs(self.registers, op, group)
        address = np.zeros(lanes.shape, np.uint64)
        assert op.address is not None
        for kind, number, wide, factor in op.address:
            if kind == "number":
                address = address + U(number & 0xFFFFFFFFFFFFFFFF)
            else:
                term = x.pair(kind, number) if wide else self.registers.read(Operand(kind, number), x)
                address = address + term * U(factor)
        if op.name in SHARED:
            address = address & MASK
        clear = (x.known | ~lanes).all(axis=1)
        found: list[Access | None] = [None] * len(group)
        if clear.any():
            for n, access in zip(
                np.flatnonzero(clear), accesses(op, address[clear], lanes[clear], self.block.rank), strict=True
            ):
                found[n] = access
                if op.name in GLOBAL and op.name not in STORES and not self.rounds[group[n]]:
                    self.traces.loaded_before.update(access.lines)
        if not clear.all() and self.rounds[group].any():
            self.traces.unknown.add(op.index)
        return found

    def _record(self, op: Op, group: Array, lanes: Array, found: Sequence[Access | None], taken: Array) -> None:
        counts = lanes.sum(axis=1)
        for n, warp in enumerate(group.tolist()):
            if self.rounds[warp]:
                self.traces.ran[warp].append(Executed(op, int(counts[n]), found[n], bool(taken[n])))

    def _branch(self, op: Op, group: Array, lanes: Array, maybe: Array) -> None:
        if op.name == "BRA":
            x = Inputs(self.registers, op, group)
            for one in op.sources:
                if one.kind in ("P", "UP"):
                    lanes = lanes & self.registers.read(one, x)
            maybe = maybe | (self.active[group] & ~x.known)
            if maybe.any() and self.rounds[group].any():
                self.traces.unknown.add(op.index)
            lanes = self.active[group] if maybe.any() and op.index == self.last else lanes & ~maybe
        taken = lanes.any(axis=1) if op.name == "BRA" else np.zeros(len(group), bool)
        whole = (lanes == self.active[group]).all(axis=1)
        self._record(op, group, lanes | maybe, [None] * len(group), taken & whole)
        for n, warp in enumerate(group.tolist()):
            self._go_on(op, warp, lanes[n], bool(taken[n]), bool(whole[n]))

    def _go_on(self, op: Op, warp: int, lanes: Array, taken: bool, whole: bool) -> None:
        """Where one warp goes from a branch."""
        self.at[warp] += 1
        target = op.code.target
        if op.name == "BRA" and taken and target is not None:
            if whole:
                self.at[warp] = target
            else:
                self.aside[warp].append((target, lanes.copy()))
                self.active[warp] &= ~lanes
        elif op.name == "EXIT" and lanes.any():
            self.active[warp] &= ~lanes
            if not self.active[warp].any():
                self._switch(warp)
        elif op.name == "BSYNC":
            self.arrived[warp] |= self.active[warp]
            if self.aside[warp]:
                self._switch(warp)
            else:
                self.active[warp] = self.arrived[warp]
                self.arrived[warp] = False

    def _switch(self, warp: int) -> None:
        if self.aside[warp]:
            self.at[warp], self.active[warp] = self.aside[warp].pop()
        else:
            self.running[warp] = False
