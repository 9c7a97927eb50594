"""Operands of what other programs send, read until they have come (../exchange.py).

A warp polls its own share of the columns: nobody tells the others that it has come. A thread reads all its chunks at
once, and again while any of their numbers is missing. The loop is PTX, since one of Triton's ends for all warps of a
program together, at the price of a sum over them.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .operands import chunk, product_layout, weight

# Registers of a thread that one loop polls, if that is all, and else: LSTM, H=2048, sm_90, backward spills with 64.
ALL_WORDS, SOME_WORDS = 64, 48


@dataclass(frozen=True)
class Loop:
    """What one loop polls, pieces of one size in all gates. No tuple: Triton before 3.8 loses constants in a tuple."""

    start: int  # pieces
    stop: int
    size: int  # columns of a piece
    words: int  # registers of a chunk
    places: tuple[int, ...]  # bytes from a thread's first chunk to each


@dataclass(frozen=True)
class Loops:
    """Those of a step, in order."""

    each: tuple[Loop, ...]


@gluon.constexpr_function
def loops_of(K_TILES, block_b, columns, gates, dtype):
    """As many pieces at once as registers are taken for."""
    width = dtype.primitive_bitwidth
    tiles, loops, start = [(int(first), int(size)) for first, size in K_TILES], [], 0
    words = [min(size // 4, 128 // width) * width // 32 for _, size in tiles]
    rows = block_b // 8 * gates
    limit = ALL_WORDS if rows * sum(words) <= ALL_WORDS else SOME_WORDS
    while start < len(tiles):
        size, stop = tiles[start][1], start + 1
        most = start + limit // (rows * words[start])
        while stop < min(len(tiles), most) and tiles[stop][1] == size:
            stop += 1
        places = [(g * columns + first) * width // 8 for first, _ in tiles[start:stop] for g in range(gates)]
        loops.append(Loop(start, stop, size, words[start], tuple(places)))
        start = stop
    return Loops(tuple(loops))


@gluon.constexpr_function
def count(loops):
    return len(loops.each)


@gluon.constexpr_function
def one_of(loops, n):
    return loops.each[n]


@gluon.constexpr_function
def chunks_layout(WARPS):
    """Of pointers [WARPS, rows, 4] at the chunks of operands.load_layout."""
    return gl.BlockedLayout([1, 1, 1], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def polling_code(loop, rows):
    """PTX that loads a loop's chunks of so many rows of a thread until no word is MISSING.

    That is the largest word. A vector's words are loads of their own, as wide as the stores that they meet.
    """
    words = loop.words * len(loop.places) * rows
    largest, loads = f"${words}", []
    for n, offset in enumerate(loop.places):
        for row in range(rows):
            into = ", ".join(f"${(n * loop.words + word) * rows + row}" for word in range(loop.words))
            loads.append(f"ld.relaxed.gpu.global.v{loop.words}.b32 {{{into}}}, [${words + rows + row}+{offset}];")
    maxima = [f"max.u32 {largest}, $0, $1;"] + [f"max.u32 {largest}, {largest}, ${n};" for n in range(2, words)]
    again = [f"setp.eq.u32 %q0, {largest}, {0xFFFFFFFF};", "@%q0 bra POLL_${:uid};"]
    return "\n".join(["{", ".reg .pred %q<1>;", "POLL_${:uid}:", *loads, *maxima, *again, "}"])


@gluon.constexpr_function
def constraints(loop, rows):
    return ",".join(["=&r"] * ((loop.words * len(loop.places) + 1) * rows) + ["l"] * rows)


@gluon.constexpr_function
def outputs(loop):
    """The words of a row and, in that of the first row, the largest."""
    return (gl.int32,) * (loop.words * len(loop.places) + 1)


@gluon.jit
def numbers(word, dtype: gl.constexpr):
    """What words of 32 bits hold: [..., 2] if it is two numbers each."""
    if dtype.primitive_bitwidth == 32:
        return word.to(dtype, bitcast=True)
    else:
        lower = (word & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
        return gl.join(lower, ((word >> 16) & 0xFFFF).to(gl.int16).to(dtype, bitcast=True))


@gluon.jit
def assembled(words, n: gl.constexpr, LOOP: gl.constexpr, WARPS: gl.constexpr, dtype: gl.constexpr):
    """The right operand [WARPS, K, rows] of chunk n, two words or four; operands.as_operand has their order."""
    E: gl.constexpr = 32 // dtype.primitive_bitwidth
    if LOOP.words == 4:
        even = gl.join(numbers(words[4 * n], dtype), numbers(words[4 * n + 2], dtype))
        odd = gl.join(numbers(words[4 * n + 1], dtype), numbers(words[4 * n + 3], dtype))
        pairs = gl.join(even, odd).permute([0, 1, 4, 5, 2, 3] if E == 2 else [0, 1, 3, 4, 2])
    else:
        pairs = gl.join(numbers(words[2 * n], dtype), numbers(words[2 * n + 1], dtype)).permute([0, 1, 4, 2, 3])
    operand = pairs.reshape([WARPS, words[0].shape[1], LOOP.size]).permute([0, 2, 1])
    return gl.convert_layout(operand, gl.DotOperandLayout(1, product_layout(WARPS), E), assert_trivial=True)


@gluon.jit
def poll(ptr, held, F: gl.constexpr, GATES: gl.constexpr, LOOP: gl.constexpr):
    """Operands of a loop's pieces and all gates, from ptr [rows, GATES, columns], when all have come."""
    dtype: gl.constexpr = held.W_hh[0].dtype
    LAYOUT: gl.constexpr = chunks_layout(F.WARPS)
    ROWS: gl.constexpr = held.piece_rows.shape[0] // 8  # of a thread
    warps = gl.arange(0, F.WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lanes = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    first = warps * (F.COLUMNS // F.WARPS) + lanes * chunk(LOOP.size, dtype)
    at = held.piece_rows[None, :, None] * (GATES * F.COLUMNS) + first
    words = gl.inline_asm_elementwise(
        polling_code(LOOP, ROWS), constraints(LOOP, ROWS), [(ptr + at).to(gl.int64)], outputs(LOOP), False, ROWS
    )
    COUNT: gl.constexpr = (LOOP.stop - LOOP.start) * GATES
    operands = ()
    for n in gl.static_range(COUNT):
        operands = operands + (assembled(words, n, LOOP, F.WARPS, dtype),)
    return operands


@gluon.jit
def multiply(held, K: gl.constexpr, F: gl.constexpr, ptr, GATES: gl.constexpr, sums):
    """Sums of all gates, each with its W_hh times what is sent to ptr: one state for all of them, or a gate each."""
    LOOPS: gl.constexpr = loops_of(F.K_TILES, F.BLOCK_B, F.COLUMNS, GATES, held.W_hh[0].dtype)
    for n in gl.static_range(count(LOOPS)):
        sums = multiply_some(held, K, F, ptr, GATES, one_of(LOOPS, n), sums)
    return sums


@gluon.jit
def multiply_some(held, K: gl.constexpr, F: gl.constexpr, ptr, GATES: gl.constexpr, LOOP: gl.constexpr, sums):
    """The pieces of one loop."""
    START: gl.constexpr = LOOP.start
    STOP: gl.constexpr = LOOP.stop
    sent = poll(ptr, held, F, GATES, LOOP)
    for i in gl.static_range(START, STOP):
        longer = ()
        for g in gl.static_range(K.gates):
            W_g = weight(held.W_hh[i * K.gates + g], F.WARPS, i * K.gates + g < F.IN_REGISTERS)
            of = sent[(i - START) * GATES + g % GATES]
            longer = longer + (mma_v2(W_g, of, sums[g], input_precision=K.precision),)
        sums = longer
    return sums
