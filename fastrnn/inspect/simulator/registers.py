"""Registers of all warps of a program, and what an instruction reads from them and writes to them.

A register's lanes are known or not; a result is known where all that it was computed from is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accesses import POINTER_BITS, SHARED_WINDOW
from .decode import Op, Operand
from .integers import MASK, MEANINGS, Array, joined, signed, unsigned

U = np.uint64
LANES = 32
FILES = {"R": 256, "UR": 256, "P": 8, "UP": 8}
FROM_CONSTANTS = ("LDC", "ULDC", "LDCU")


@dataclass(frozen=True)
class Block:
    """A program as its code sees it."""

    warps: int
    constants: dict[int, int]  # of the constant bank: parameters
    grid: tuple[int, int, int] = (1, 1, 1)
    rank: int = 0  # in its cluster

    @staticmethod
    def of(parameters: Sequence[tuple[int, int]], numbers: Sequence[int], **rest: Any) -> "Block":
        """With made-up pointers for parameters of 8 bytes, and the numbers, in order, for those of 4."""
        left = list(numbers)
        constants = {}
        for n, (offset, size) in enumerate(parameters):
            value = (n + 1) << POINTER_BITS if size == 8 else left.pop(0)
            constants[offset] = value & 0xFFFFFFFF
            if size == 8:
                constants[offset + 4] = value >> 32
        return Block(constants=constants, **rest)


class Inputs:
    """Sources of one instruction for a group of warps; `known` says where all that was read is known."""

    def __init__(self, registers: "Registers", op: Op, group: Array) -> None:
        self.registers, self.op, self.group = registers, op, group
        self.parts, self.count = op.parts, len(op.sources)
        self.sets_predicate = bool(op.results) and op.results[0].kind in ("P", "UP")
        self.known = np.ones((len(group), LANES), bool)

    def __call__(self, k: int) -> Array:
        return self.registers.read(self.op.sources[k], self)

    def wide(self, k: int) -> Array:
        one = self.op.sources[k]
        if one.kind in ("R", "UR"):
            found = self.pair(one.kind, one.number)
        elif one.kind == "constant":
            found = joined(*(self.registers.constant(one.number + n, self) for n in (0, 4)))
        else:
            return self(k)
        return U(0) - found if one.negated else found

    def pair(self, kind: str, number: int) -> Array:
        words = (Operand(kind, number + n if number >= 0 else -1) for n in (0, 1))
        return joined(*(self.registers.read(word, self) for word in words))

    def predicate(self, k: int) -> Array:
        return self.registers.read(self.op.sources[k], self)

    def carries(self, k: int) -> Array:
        one = self.op.sources[k]
        if not one.negated or "X" in self.parts:
            return self(k)
        return U(1 << 32) - self.registers.read(Operand(one.kind, one.number), self)


class Registers:
    """The registers of all warps."""

    def __init__(self, block: Block) -> None:
        self.block = block
        shape = (block.warps, LANES)
        self.values = {k: np.zeros((n, *shape), bool if "P" in k else np.uint64) for k, n in FILES.items()}
        self.known = {k: np.zeros((n, *shape), bool) for k, n in FILES.items()}

    def read(self, one: Operand, x: Inputs) -> Array:
        shape = x.known.shape
        if one.kind in FILES:
            if one.number < 0:
                value = np.full(shape, "P" in one.kind, bool if "P" in one.kind else np.uint64)
            else:
                value = self.values[one.kind][one.number][x.group]
                x.known &= self.known[one.kind][one.number][x.group]
        elif one.kind == "number":
            value = np.full(shape, one.number, np.uint64)
        elif one.kind == "constant":
            value = self.constant(one.number, x)
        else:
            x.known[:] = False
            return np.zeros(shape, np.uint64)
        if one.inverted:
            return ~value if value.dtype == bool else value ^ MASK
        if one.absolute:
            value = unsigned(np.abs(signed(value)))
        return U(1 << 32) - value & MASK if one.negated else value

    def constant(self, offset: int, x: Inputs) -> Array:
        if offset not in self.block.constants:
            x.known[:] = False
        return np.full(x.known.shape, self.block.constants.get(offset, 0), np.uint64)

    def special(self, name: str, x: Inputs) -> Array:
        if name == "SR_TID.X":
            return (x.group * LANES)[:, None].astype(np.uint64) + np.arange(LANES, dtype=np.uint64)
        if name == "SR_LANEID":
            return np.broadcast_to(np.arange(LANES, dtype=np.uint64), x.known.shape)
        numbers = {"SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CgaCtaId": self.block.rank, "SR_SWINHI": SHARED_WINDOW, "SRZ": 0}
        numbers |= {f"SR_CTAID.{axis}": 0 for axis in "XYZ"}
        numbers |= {f"SR_NCTAID.{axis}": size for axis, size in zip("XYZ", self.block.grid, strict=True)}
        if name not in numbers:
            x.known[:] = False
        return np.full(x.known.shape, numbers.get(name, 0), np.uint64)

    def write(self, to: Operand, value: Array, known: Array, lanes: Array, group: Array) -> None:
        if to.kind not in FILES or to.number < 0:
            return
        if to.kind[0] == "U":
            lanes = np.broadcast_to(lanes.any(axis=1, keepdims=True), lanes.shape)
        if to.kind in ("R", "UR"):
            value = value & MASK
        for file, new in ((self.values, value), (self.known, known)):
            register = file[to.kind][to.number]
            if len(group) == len(register) and lanes.all():
                register[:] = new
            else:
                register[group] = np.where(lanes, new, register[group])

    def compute(self, op: Op, x: Inputs, lanes: Array, maybe: Array) -> None:
        """Run an instruction that is no branch, in these lanes; maybe: in those that it is not known to run in."""
        if not op.results:
            return
        meaning = MEANINGS.get(op.base)
        if op.base in ("S2R", "S2UR", "CS2R"):
            values = [self.special(op.sources[0].text, x)]
        elif op.base in FROM_CONSTANTS and op.sources[0].kind == "constant":
            values = [self.constant(op.sources[0].number, x)]
        elif meaning is not None:
            values = meaning(x)
        else:
            values, x.known[:] = [], False
        known = x.known & ~maybe
        for n, to in enumerate(op.results):
            missing = np.zeros(x.known.shape, bool if "P" in to.kind else np.uint64)
            value = values[n] if n < len(values) else missing
            self.write(to, value, known if n < len(values) else known & False, lanes, x.group)
            if to.kind in ("R", "UR") and to.number >= 0:
                self._write_further(op, to, value, known, lanes, x)

    def _write_further(self, op: Op, to: Operand, value: Array, known: Array, lanes: Array, x: Inputs) -> None:
        """The registers after the first, of a result of several."""
        for n in range(1, op.registers):
            next_one = Operand(to.kind, to.number + n)
            if op.base in FROM_CONSTANTS and op.sources[0].kind == "constant":
                x.known[:] = True
                word = self.constant(op.sources[0].number + 4 * n, x)
                self.write(next_one, word, x.known, lanes, x.group)
            elif op.base in MEANINGS or op.base == "CS2R":
                self.write(next_one, value >> U(32), known, lanes, x.group)
            else:
                self.write(next_one, value, known, lanes, x.group)
