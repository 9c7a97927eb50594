"""Operands of what other programs send, read until they have come (../exchange.py).

A warp polls its own share of the columns: nobody tells the others that it has come. A thread reads all its chunks at
once, and again while any of their numbers is missing. The loop is PTX, since one of Triton's ends for all warps of a
program together, at the price of a sum over them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..exchange import columns_of
from .operands import chunk, product_layout

# Registers of a thread that one loop polls, if that is all, and else: LSTM, H=2048, sm_90, backward spills with 64.
ALL_WORDS, SOME_WORDS = 64, 48


@gluon.constexpr_function
def chunks_layout(WARPS):
    """Of pointers [WARPS, rows, 4] at the chunks of operands.load_layout."""
    return gl.BlockedLayout([1, 1, 1], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def words_of(K_TILES, i, dtype):
    """Registers that a chunk of piece i takes."""
    return chunk(K_TILES[i][1], dtype) * dtype.primitive_bitwidth // 32


@gluon.constexpr_function
def polling_code(places, rows):
    """PTX that loads (bytes from the pointer, words) of so many rows of a thread until no word is MISSING.

    That is the largest word. A vector's words are loads of their own, as wide as the stores that they meet.
    """
    words = sum(count for _, count in places)
    largest, loads, first = f"${words * rows}", [], 0
    for offset, count in places:
        for row in range(rows):
            into = ", ".join(f"${(first + word) * rows + row}" for word in range(count))
            loads.append(f"ld.relaxed.gpu.global.v{count}.b32 {{{into}}}, [${(words + 1) * rows + row}+{offset}];")
        first += count
    maxima = [f"max.u32 {largest}, ${0}, ${1};"] + [
        f"max.u32 {largest}, {largest}, ${n};" for n in range(2, words * rows)
    ]
    again = [f"setp.eq.u32 %q0, {largest}, {0xFFFFFFFF};", "@%q0 bra POLL_${:uid};"]
    return "\n".join(["{", ".reg .pred %q<1>;", "POLL_${:uid}:", *loads, *maxima, *again, "}"])


@gluon.constexpr_function
def constraints(outputs, rows):
    return ",".join(["=&r"] * (outputs * rows) + ["l"] * rows)


@gluon.constexpr_function
def places_of(F, start, stop, gates, dtype):
    """(bytes, words) of each chunk of some pieces and all gates, of a thread's row."""
    size, row, K_TILES = dtype.primitive_bitwidth // 8, columns_of(F), F.K_TILES
    return tuple(
        ((g * row + K_TILES[i][0]) * size, words_of(K_TILES, i, dtype))
        for i in range(start, stop)
        for g in range(gates)
    )


@gluon.constexpr_function
def int32s(count):
    return (gl.int32,) * count


@gluon.constexpr_function
def total(places):
    return sum(count for _, count in places)


@gluon.jit
def numbers(word, dtype: gl.constexpr):
    """What words of 32 bits hold: [..., 2] if it is two numbers each."""
    if dtype.primitive_bitwidth == 32:
        return word.to(dtype, bitcast=True)
    else:
        lower = (word & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
        return gl.join(lower, ((word >> 16) & 0xFFFF).to(gl.int16).to(dtype, bitcast=True))


@gluon.jit
def assembled(words, n: gl.constexpr, K: gl.constexpr, WARPS: gl.constexpr, dtype: gl.constexpr):
    """The right operand [WARPS, K, rows] of chunk n, two words or four; operands.as_operand has their order."""
    E: gl.constexpr = 32 // dtype.primitive_bitwidth
    if chunk(K, dtype) == 4 * E:
        even = gl.join(numbers(words[4 * n], dtype), numbers(words[4 * n + 2], dtype))
        odd = gl.join(numbers(words[4 * n + 1], dtype), numbers(words[4 * n + 3], dtype))
        pairs = gl.join(even, odd).permute([0, 1, 4, 5, 2, 3] if E == 2 else [0, 1, 3, 4, 2])
    else:
        pairs = gl.join(numbers(words[2 * n], dtype), numbers(words[2 * n + 1], dtype)).permute([0, 1, 4, 2, 3])
    operand = pairs.reshape([WARPS, words[0].shape[1], K]).permute([0, 2, 1])
    return gl.convert_layout(operand, gl.DotOperandLayout(1, product_layout(WARPS), E), assert_trivial=True)


@gluon.constexpr_function
def together(F, i, gates, dtype):
    """(start, stop) of the pieces that one loop polls with piece i: of one size, as many as registers are taken for."""
    K_TILES, start, stop = F.K_TILES, 0, 0
    rows = F.BLOCK_B // 8 * gates
    all_words = rows * sum(words_of(K_TILES, n, dtype) for n in range(len(K_TILES)))
    while stop <= i:
        start = stop
        most = (ALL_WORDS if all_words <= ALL_WORDS else SOME_WORDS) // (rows * words_of(K_TILES, start, dtype))
        while stop < min(len(K_TILES), start + max(1, most)) and K_TILES[stop][1] == K_TILES[start][1]:
            stop += 1
    return start, stop


@gluon.jit
def poll(ptr, held, F: gl.constexpr, GATES: gl.constexpr, together: gl.constexpr):
    """Operands of some pieces and all gates, from ptr [rows, GATES, columns], when all have come."""
    start: gl.constexpr = together[0]
    stop: gl.constexpr = together[1]
    dtype: gl.constexpr = held.W_hh[0].dtype
    K_TILES: gl.constexpr = F.K_TILES
    LAYOUT: gl.constexpr = chunks_layout(F.WARPS)
    ROW: gl.constexpr = columns_of(F)
    PER_THREAD: gl.constexpr = held.piece_rows.shape[0] // 8
    places: gl.constexpr = places_of(F, start, stop, GATES, dtype)
    outputs: gl.constexpr = total(places) + 1
    warps = gl.arange(0, F.WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lanes = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    at = (
        held.piece_rows[None, :, None] * (GATES * ROW)
        + warps * (ROW // F.WARPS)
        + lanes * chunk(K_TILES[start][1], dtype)
    )
    words = gl.inline_asm_elementwise(
        polling_code(places, PER_THREAD), constraints(outputs, PER_THREAD),
        [(ptr + at).to(gl.int64)], int32s(outputs), False, PER_THREAD,
    )  # fmt: skip
    operands = ()
    for i in gl.static_range(start, stop):
        for g in gl.static_range(GATES):
            operands = operands + (assembled(words, (i - start) * GATES + g, K_TILES[i][1], F.WARPS, dtype),)
    return operands
