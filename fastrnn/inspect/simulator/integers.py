"""What the integer instructions compute, for the lanes of several warps at once.

Each function takes Sources and gives a value for each result, in their order. Values are arrays of uint64 that hold 32
bits; what is written is cut to them. A result of two registers is one number of 64 bits. Meaning of the instructions:
NVIDIA's CUDA Binary Utilities, and PTX that ptxas translates to each.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Array = Any  # of numpy: [warps, lanes]
U = np.uint64
MASK = U(0xFFFFFFFF)
SIGN = 0x80000000


class Sources(Protocol):
    """An instruction's inputs. Reading one that is not known makes the result unknown there."""

    parts: tuple[str, ...]
    count: int
    sets_predicate: bool  # as its first result

    def __call__(self, k: int) -> Array: ...  # 32 bits
    def wide(self, k: int) -> Array: ...  # 64 bits
    def predicate(self, k: int) -> Array: ...
    def carries(self, k: int) -> Array: ...  # as __call__, but a negated operand is its complement and 1 more


def signed(value: Array) -> Array:
    """Return 32 bits as a signed number, in two's complement."""
    return (value.astype(np.int64) ^ SIGN) - SIGN


def unsigned(value: Array) -> Array:
    return value.astype(np.uint64)


def joined(low: Array, high: Array) -> Array:
    return low | (high << U(32))


def move(x: Sources) -> list[Array]:
    return [x(0)]


def add3(x: Sources) -> list[Array]:
    """Add three terms, with up to two carries out, and with .X two in."""
    total = x.carries(0) + x.carries(1) + x.carries(2)
    if "X" in x.parts:
        for k in range(3, x.count):
            total = total + unsigned(x.predicate(k))
    high = total >> U(32)
    return [total, high > U(0), high > U(1)]


def add(x: Sources) -> list[Array]:
    if "16x2" in x.parts:
        low, high = U(0xFFFF), U(0xFFFF0000)
        return [((x(0) & high) + (x(1) & high) & high) | (x(0) + x(1) & low)]
    return [x.wide(0) + x.wide(1)] if "64" in x.parts else [x(0) + x(1)]


def multiply_add(x: Sources) -> list[Array]:
    if "WIDE" in x.parts or "HI" in x.parts:
        factors = (x(0), x(1))
        if "U32" not in x.parts:
            factors = tuple(unsigned(signed(factor)) for factor in factors)
        product = factors[0] * factors[1]
        if "HI" in x.parts:
            return [(product >> U(32)) + x(2)]
        total = product + x.wide(2)
        return [total, total < product]
    total = x(0) * x(1) + x(2)
    if "X" in x.parts and x.count > 3:
        total = total + unsigned(x.predicate(3))
    return [total]


def logic(x: Sources) -> list[Array]:
    """Combine three operands by a table of eight bits. The last operand is a predicate that is or'ed to "not zero"."""
    a, b, c, table = x(0), x(1), x(2), int(x(3).flat[0])
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            of_a, of_b, of_c = (v if row & bit else v ^ MASK for v, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | (of_a & of_b & of_c)
    if not x.sets_predicate:
        return [result]
    return [(result != 0) | x.predicate(4), result]


def funnel_shift(x: Sources) -> list[Array]:
    low, by, high = x(0), x(1), x(2)
    upper = "HI" in x.parts
    is_long = "U64" in x.parts or "S64" in x.parts
    if x.parts[1] == "L":
        shifted = joined(low, high) << np.minimum(by, U(63)) if upper or is_long else low << np.minimum(by, U(63))
    elif is_long:
        whole = joined(low, high)
        by = np.minimum(by, U(63))
        shifted = unsigned(whole.astype(np.int64) >> by.astype(np.int64)) if "S64" in x.parts else whole >> by
    else:
        upper, source = False, high if upper else low
        arithmetic = unsigned(signed(source) >> np.minimum(by, U(31)).astype(np.int64))
        shifted = arithmetic if "S32" in x.parts else source >> np.minimum(by, U(32))
    return [shifted >> U(32) if upper else shifted]


def shifted_add(x: Sources) -> list[Array]:
    """LEA: (a << n) + b; .HI: the upper word of the pair (c, a) << n, + b, with .X a carry in."""
    if "HI" not in x.parts:
        total = (x(0) << x(2) & MASK) + x(1)
        return [total, total >> U(32) > 0]
    if "SX32" in x.parts:
        upper, by, rest = np.where(signed(x(0)) < 0, MASK, U(0)), x(2), 3
    else:
        upper, by, rest = x(2), x(3), 4
    total = (joined(x(0), upper) << by >> U(32)) + x(1)
    if "X" in x.parts:
        for k in range(rest, x.count):
            total = total + unsigned(x.predicate(k))
    return [total, total >> U(32) > 0]


def permute(x: Sources) -> list[Array]:
    """Choose four bytes of eight by four nibbles. A nibble's upper bit asks for the byte's sign."""
    both, selector = joined(x(0), x(2)), x(1)
    result = np.zeros_like(both)
    for n in range(4):
        nibble = selector >> U(4 * n) & U(15)
        byte = both >> (nibble & U(7)) * U(8) & U(255)
        sign = np.where(byte & U(128), U(255), U(0))
        result = result | np.where(nibble & U(8), sign, byte) << U(8 * n)
    return [result]


def select(x: Sources) -> list[Array]:
    return [np.where(x.predicate(2), x(0), x(1))]


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "LT": np.less, "GT": np.greater, "LE": np.less_equal, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
    "F": lambda a, b: np.zeros_like(a, bool), "T": lambda a, b: np.ones_like(a, bool),
}  # fmt: skip
COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor
}  # fmt: skip


def compare(x: Sources) -> list[Array]:
    """Compare 32 bits or 64. With .EX compare the upper halves, given the result of the lower ones."""
    name = x.parts[1]
    if "S64" in x.parts or "U64" in x.parts:
        a, b = x.wide(0), x.wide(1)
        a, b = (a.astype(np.int64), b.astype(np.int64)) if "S64" in x.parts else (a, b)
    else:
        a, b = x(0), x(1)
        a, b = (a, b) if "U32" in x.parts else (signed(a), signed(b))
    if "EX" in x.parts:
        lower = x.predicate(3)
        strict = {"LE": "LT", "GE": "GT", "EQ": "F"}.get(name, name)
        found = COMPARE[strict](a, b) | ((a == b) & lower)
    else:
        found = COMPARE[name](a, b)
    combine = next(COMBINE[part] for part in x.parts if part in COMBINE)
    other = x.predicate(2)
    return [combine(found, other), combine(~found, other)]


def _least(a: Array, b: Array, wants_least: Array, is_unsigned: bool) -> Array:
    below = a < b if is_unsigned else signed(a) < signed(b)
    return np.where(below == wants_least, a, b)


def minimum(x: Sources) -> list[Array]:
    return [_least(x(0), x(1), x.predicate(2), "U32" in x.parts)]


def add_minimum(x: Sources) -> list[Array]:
    return [_least(x(0) + x(1) & MASK, x(2), x.predicate(3), "U32" in x.parts)]


def absolute(x: Sources) -> list[Array]:
    return [unsigned(np.abs(signed(x(0))))]


def extend_sign(x: Sources) -> list[Array]:
    """The lower n bits, with their sign unless .U32."""
    bits = np.minimum(x(1), U(32))
    keep = (U(1) << bits) - U(1)
    cut = x(0) & keep
    if "U32" in x.parts:
        return [cut]
    negative = x(0) >> np.maximum(bits, U(1)) - U(1) & U(1)
    return [np.where(negative, cut | MASK ^ keep, cut)]


def bit_mask(x: Sources) -> list[Array]:
    return [(U(1) << np.minimum(x(1), U(32))) - U(1) << np.minimum(x(0), U(32))]


def predicate_logic(x: Sources) -> list[Array]:
    row = x.predicate(0) * 4 + x.predicate(1) * 2 + x.predicate(2)
    tables = [int(x(k).flat[0]) if k < x.count else 0 for k in (3, 4)]
    return [(table >> row & 1).astype(bool) for table in tables]


# By an opcode's first part, without the U of the uniform datapath.
MEANINGS: dict[str, Callable[[Sources], list[Array]]] = {
    "MOV": move, "R2UR": move, "IADD3": add3, "IADD": add, "VIADD": add, "IMAD": multiply_add, "LOP3": logic,
    "SHF": funnel_shift, "LEA": shifted_add, "PRMT": permute, "SEL": select, "ISETP": compare, "VIMNMX": minimum,
    "IMNMX": minimum, "VIADDMNMX": add_minimum, "IABS": absolute, "SGXT": extend_sign, "BMSK": bit_mask,
    "PLOP3": predicate_logic,
}  # fmt: skip
