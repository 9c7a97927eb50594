"""Products of the resident kernels: [shares of the sum, rows, columns], W_hh in registers and shared memory.

Tensor cores take 16 rows of a left operand and 8 columns of a right one. A batch tile of 16 rows is the left operand,
and W_hh the right one. A tile of 8 rows is the right one, transposed, and W_hh's columns fill the 16 rows. Half of the
rows are half of a step's pointwise work, of its sums in shared memory and of what a cluster exchanges.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import layouts


class Layouts(NamedTuple):
    """What verbs must know of a Form, and the layouts that follow from it."""

    CTAS: Any
    NARROW: Any  # a tile of 8 rows: W_hh is the left operand
    SHARES: Any
    IN_REGISTERS: Any
    BIAS_KEPT: Any
    PRODUCT: Any
    A: Any
    W: Any
    IN_SHARED: Any  # of W_hh
    SUMMED: Any
    GATHERED: Any


@gluon.constexpr_function
def layouts_of(form, bits, ctas, warps, dim):
    """The layouts of a pass: dim is 2 in forward, where programs of a cluster split columns, 0 in backward."""
    block_b, block_h, shares, in_registers, bias_kept = form
    narrow = block_b < 16
    product = layouts.product(block_b, warps, shares, ctas, dim)
    summed = layouts.summed(shares * ctas if dim == 0 else shares, block_b, block_h, warps, ctas)
    a, w = (gl.DotOperandLayout(i, product, 32 // bits) for i in ((1, 0) if narrow else (0, 1)))
    gathered = layouts.gathered(bits, block_b, block_h, warps, ctas) if ctas > 1 else None
    # Rows of W_hh, as in memory: its units are n in forward and k in backward.
    depth, columns = (block_h // shares, 1 if narrow else 2) if dim == 2 else (block_h, 0)
    order = [2, 1, 0] if narrow == (dim == 2) else [1, 2, 0]
    in_shared = layouts.operand(bits, depth, order, ctas, columns)
    return Layouts(ctas, narrow, shares, in_registers, bias_kept, product, a, w, in_shared, summed, gathered)


@gluon.jit
def load_weights(
    K: gl.constexpr, F: gl.constexpr, W_hh_ptr, recurrence, BLOCK_H: gl.constexpr, SUMMANDS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """G operands [SUMMANDS, BLOCK_H // SUMMANDS of k, BLOCK_H of n]: W_hh[n, k], or W_hh[k, n] if TRANSPOSED.

    Left ones are [SUMMANDS, n, k].
    """
    DEPTH: gl.constexpr = BLOCK_H // SUMMANDS
    SHAPE: gl.constexpr = [SUMMANDS, BLOCK_H, DEPTH] if F.NARROW else [SUMMANDS, DEPTH, BLOCK_H]
    summands = gl.arange(0, SUMMANDS, gl.SliceLayout(1, gl.SliceLayout(2, F.W)))[:, None, None]
    second = gl.arange(0, SHAPE[1], gl.SliceLayout(0, gl.SliceLayout(2, F.W)))[None, :, None]
    third = gl.arange(0, SHAPE[2], gl.SliceLayout(0, gl.SliceLayout(1, F.W)))[None, None, :]
    offs_k = summands * DEPTH + (third if F.NARROW else second)
    offs_n = second if F.NARROW else third
    mask = (offs_k < K.H) & (offs_n < K.H)
    offsets = offs_k * K.H + offs_n if TRANSPOSED else offs_n * K.H + offs_k
    IN_SHARED: gl.constexpr = F.IN_SHARED
    operands = ()
    for g in gl.static_range(K.gates):
        tile = gl.load(W_hh_ptr + (recurrence * K.gates + g) * K.H * K.H + offsets, mask=mask, other=0.0)
        if g < F.IN_REGISTERS:
            operands = operands + (tile,)
        else:
            operands = operands + (gl.allocate_shared_memory(tile.dtype, SHAPE, IN_SHARED, tile),)
    return operands


@gluon.jit
def weight(W_hh, F: gl.constexpr, g: gl.constexpr):
    """A gate's operand, from where it is."""
    W: gl.constexpr = F.W
    if g < F.IN_REGISTERS:
        return W_hh[g]
    else:
        return W_hh[g].load(W)


@gluon.jit
def load_operand(tile, F: gl.constexpr):
    """A product's other operand, [shares, rows, k] in shared memory."""
    A: gl.constexpr = F.A
    if F.NARROW:
        return tile.permute([0, 2, 1]).load(A)
    else:
        return tile.load(A)


@gluon.jit
def multiply(K: gl.constexpr, F: gl.constexpr, tile, W_g, acc):
    """acc + tile W_g, or W_g tile where W_hh is the left operand."""
    if F.NARROW:
        return mma_v2(W_g, tile, acc, input_precision=K.precision)
    else:
        return mma_v2(tile, W_g, acc, input_precision=K.precision)


@gluon.jit
def zero_sums(F: gl.constexpr, SUMMANDS: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr):
    """What products are added to."""
    PRODUCT: gl.constexpr = F.PRODUCT
    SHAPE: gl.constexpr = [SUMMANDS, BLOCK_H, BLOCK_B] if F.NARROW else [SUMMANDS, BLOCK_B, BLOCK_H]
    return gl.zeros(SHAPE, gl.float32, PRODUCT)


@gluon.jit
def store_sums(F: gl.constexpr, shared, acc):
    """Products as [shares, rows, columns], whichever operand the rows were."""
    shared.store(acc.permute([0, 2, 1]) if F.NARROW else acc)


@gluon.jit
def in_shares(tile, SHARES: gl.constexpr):
    """[rows, columns] as [SHARES, rows, columns // SHARES]."""
    return tile.reshape([tile.shape[0], SHARES, tile.shape[1] // SHARES]).permute(1, 0, 2)
