"""Where an instruction may touch shared memory: what the compiled code says of an address, whatever the thread.

Addresses are sums of constants and of a thread's offset in a tile, put together by shifts, masks and xor. A Value is a
constant and the bits that may be added to it, modulo 2^32: enough to tell tiles of one allocation apart, since a
tile's offsets fill a power of two and its own place is a constant.

    >>> tile = binary("and", Value(0, 127), Value(0b1110000, 0))   # (tid & 0x70), 128 threads
    >>> binary("add", binary("shl", tile, Value(1, 0)), Value(4096, 0))
    Value(base=4096, spread=224)
"""

from typing import NamedTuple

from .ptx import Instruction

WORD = 0xFFFFFFFF


class Value(NamedTuple):
    """base + v modulo 2^32, for some v whose bits are among those of spread."""

    base: int
    spread: int


ANY = Value(0, WORD)
SPECIAL = {"%laneid": Value(0, 31), "%cluster_ctarank": Value(0, 15), "global_smem": Value(0, 0)}


def constant(operand: str) -> Value | None:
    """The value of an operand that is a number."""
    try:
        return Value(int(operand.removesuffix("U"), 0) & WORD, 0)
    except ValueError:
        return None


def hull(a: Value, b: Value) -> Value:
    """A value that is one of two."""
    if a == b:
        return a
    low = min(a.base, b.base)
    return _value(low, _filled(max(a.base + a.spread, b.base + b.spread) - low))


def truncated(a: Value, low: int) -> Value:
    """A value of which only the bits of the mask low are kept in mind."""
    return _value(a.base & low, a.spread | WORD ^ low)


def extent(place: Value, size: int) -> tuple[int, int]:
    """Return where size bytes at an address may lie: the first byte, and the one behind the last."""
    start = place.base - (1 << 32) if place.base >> 31 else place.base  # a negative constant on top of an offset
    end = start + place.spread + size
    return (start, end) if end <= 1 << 32 else (0, end)


def result(instruction: Instruction, sources: list[Value]) -> Value:
    """Return the low 32 bits that an instruction computes from its sources."""
    parts, name = instruction.parts, instruction.parts[0]
    wide = parts[-1][1:] == "64"
    if parts[-1][1:] not in ("32", "64") or (name in ("mul", "mad") and "hi" in parts):
        return ANY
    if name in ("mov", "cvta", "mapa") or (name == "cvt" and parts[-2][1:] in ("32", "64")):
        return sources[0]
    if name == "mad":
        return binary("add", binary("mul", *sources[:2]), sources[2])
    if name == "selp":
        return hull(sources[0], sources[1])
    if name == "bfe" and parts[-1] == "u32" and not sources[1].spread and not sources[2].spread:
        return binary("and", binary("shr", sources[0], sources[1]), Value((1 << sources[2].base) - 1, 0))
    if name == "shr" and (wide or (parts[-1] == "s32" and sum(_apart(sources[0])) >> 31)):
        return ANY
    return binary(name, *sources) if len(sources) == 2 else ANY


def binary(name: str, a: Value, b: Value) -> Value:
    """Apply add, sub, mul, and, or, xor, shl or shr to two values. Any other operation may give any value."""
    if name == "add":
        return _value(a.base + b.base, _sum(a.spread, b.spread))
    if name == "sub" and not b.spread:
        return _value(a.base - b.base, a.spread)
    if name == "mul" and not (a.spread and b.spread):
        a, b = (a, b) if a.spread else (b, a)
        return _value(a.base * b.base, _filled(a.spread * b.base))
    if name == "shl" and not b.spread:
        return _value(a.base << b.base, a.spread << b.base)
    a, b = _apart(a), _apart(b)
    spread = a.spread | b.spread
    if name == "shr" and not b.spread:
        return _value(a.base >> b.base, a.spread >> b.base)
    if name == "and":
        both = (a.base | a.spread) & (b.base | b.spread)
        return _value(a.base & b.base, both & ~(a.base & b.base))
    if name == "or":
        return _value(a.base | b.base, spread & ~(a.base | b.base))
    if name == "xor":
        return _value((a.base ^ b.base) & ~spread, spread)
    return ANY


def _value(base: int, spread: int) -> Value:
    spread &= WORD
    # Above the highest bit that cannot be set all is unknown, what the base has there too.
    return Value(base & (1 << (WORD ^ spread).bit_length()) - 1, spread)


def _filled(most: int) -> int:
    return (1 << most.bit_length()) - 1


def _sum(a: int, b: int) -> int:
    return a | b if not a & b else _filled(a + b)


def _apart(a: Value) -> Value:
    """The same with base and spread in bits of their own."""
    return _value(0, _filled(a.base + a.spread)) if a.base & a.spread else a
