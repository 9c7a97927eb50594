"""The resident tier in Gluon: a program, or the programs of a cluster, hold all of W_hh in registers and shared memory.

    forward    barrier;   gather h[t-1];   rec = W_hh[own units] h + b_hh;
               (h, c), saved = cell(x_gates[t], rec, (h, c));   own h to shared memory
    backward   d_gates[t] = cell'(dh + dy[t], dc, saved[t]), of own units;   barrier;
               summand = W_hh[own units]^T d_gates[t];   barrier;   dh = sum of the summands' own columns + rest

Each program of a cluster (CTAS of them, one is a program alone) owns units of H, all their gates, and these rows of
W_hh: the same in both passes. Forward must see all of h, 16 bits a unit, and gathers it from the other programs' shared
memories. Backward multiplies by rows, which gives every program a summand of all of dh, and exchanges these: half of
the bytes that gathering the LSTM's four gate gradients would take. One cluster barrier a step either way.

W_hh of the first gates, IN_REGISTERS of them, stays in registers as operands of the tensor cores, the others' in shared
memory. Where columns are few for the warps, SHARES groups of warps share the sum over units, too: each product is
[shares, rows, columns]. Products pass through shared memory, also where there is one share: there, threads add the
shares of their own columns, a few neighbours of one row. x_gates, saved tiles and outputs are loaded and stored in that
layout. In the layout of the products a warp has 8 columns of 16 rows, so that each access meets 8 lines of L1, a cycle
each: 1.26 us a step instead of 0.65 (LSTM, H = 64, bf16, forward, measured on an H100).

The layout of tensors is in ../tile/tiles.py, sequences of their own lengths and resets in ../tile/sequences.py: their
helpers serve both dialects, since layouts come with the offsets.
Grid: (batch tiles, D), clusters. Source: as ../tile/resident.py.

Limit: the chain of dependent latencies of a step (barrier, ldmatrix, products, activations, store), and with clusters
the exchange; for 16 warps their issue slots come near. W_hh in registers costs nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

if hasattr(gl, "barrier"):  # Triton 3.7 and later
    from triton.experimental.gluon.language.nvidia.hopper import cluster as hopper

from ..metadata import of_launch
from ..tile.sequences import cut, find_rows, keep, load_starts, slot, within
from ..tile.tiles import (
    as_fp32,
    load_bias,
    load_inputs,
    load_state,
    load_step,
    load_tiles,
    step_backward,
    step_forward,
    store_state,
    store_tiles,
    with_dh,
)
from . import layouts
from .layouts import block_barrier


@gluon.jit
def cluster_barrier():
    """All programs of the cluster have written what they exchange in shared memory, and see it.

    gl.barrier(cluster=True) releases global memory too, and waits for every store that is on its way there: 1.88 us a
    step instead of 1.48 (LSTM, H = 256, bf16, forward, measured on an H100). Here the fence is of shared memory alone.
    """
    fence: gl.constexpr = "fence.release.sync_restrict::shared::cta.cluster;\n\tmov.u32 $0, $1;"
    gl.inline_asm_elementwise(fence, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)
    hopper.barrier(relaxed=True)


@gluon.jit
def place(B, D: gl.constexpr, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, LAYOUT: gl.constexpr):
    """This program's direction (of D), its first row (of B), and offsets and mask of its tile; scalars are int64."""
    direction = (gl.program_id(1) if D > 1 else gl.to_tensor(0)).to(gl.int64)
    first_row = gl.program_id(0).to(gl.int64) * BLOCK_B
    offs_b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, LAYOUT))
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(0, LAYOUT))
    mask = (first_row + offs_b < B)[:, None] & (offs_h < H)[None, :]
    return direction, first_row, offs_b, offs_h, mask


@gluon.jit
def load_weights(
    W_hh_ptr, direction, G: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr, SHARES: gl.constexpr,
    LAYOUT: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """G operands [SHARES, BLOCK_H // SHARES of k, BLOCK_H of n]: W_hh[n, k], or W_hh[k, n] if TRANSPOSED."""
    DEPTH: gl.constexpr = BLOCK_H // SHARES
    shares = gl.arange(0, SHARES, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    offs_k = gl.arange(0, DEPTH, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None] + shares * DEPTH
    offs_n = gl.arange(0, BLOCK_H, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    mask = (offs_k < H) & (offs_n < H)
    offsets = offs_k * H + offs_n if TRANSPOSED else offs_n * H + offs_k
    operands = ()
    for g in gl.static_range(G):
        tile = gl.load(W_hh_ptr + (direction * G + g) * H * H + offsets, mask=mask, other=0.0)
        if g < IN_REGISTERS:
            operands = operands + (tile,)
        else:
            operands = operands + (gl.allocate_shared_memory(tile.dtype, [SHARES, DEPTH, BLOCK_H], SHARED, tile),)
    return operands


@gluon.jit
def operand(W_hh, g: gl.constexpr, IN_REGISTERS: gl.constexpr, LAYOUT: gl.constexpr):
    if g < IN_REGISTERS:
        return W_hh[g]
    else:
        return W_hh[g].load(LAYOUT)


@gluon.jit
def in_shares(tile, SHARES: gl.constexpr):
    """[rows, columns] as [SHARES, rows, columns // SHARES]."""
    return tile.reshape([tile.shape[0], SHARES, tile.shape[1] // SHARES]).permute(1, 0, 2)


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr, rows_ptr, reset_ptr, reset_h_ptr, reset_c_ptr,
    T, B,
    CELL: gl.constexpr, G: gl.constexpr, S: gl.constexpr, HAS_C: gl.constexpr, ACTIVATIONS: gl.constexpr,
    RAGGED: gl.constexpr, BY_STEP: gl.constexpr,
    D: gl.constexpr, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, PRECISION: gl.constexpr,
    SHARES: gl.constexpr, IN_REGISTERS: gl.constexpr, BIAS_KEPT: gl.constexpr,
):  # fmt: skip
    CTAS: gl.constexpr = gl.num_ctas()
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = W_hh_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    PRODUCT: gl.constexpr = layouts.product(WARPS, SHARES, CTAS, 2)
    A: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 32 // BITS)
    W: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 32 // BITS)
    SUMMED: gl.constexpr = layouts.summed(SHARES, BLOCK_B, BLOCK_H, WARPS, CTAS)
    direction, first_row, offs_b, offs_h, mask = place(B, D, H, BLOCK_B, BLOCK_H, gl.SliceLayout(0, SUMMED))
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, offs_b, RAGGED)
    T, offs_b = where[1], where[4]
    W_hh = load_weights(
        W_hh_ptr, direction, G, H, BLOCK_H, SHARES, W,
        layouts.operand(BITS, BLOCK_H // SHARES, [1, 2, 0], CTAS, 2), False, IN_REGISTERS,
    )  # fmt: skip
    b_hh = load_bias(b_hh_ptr, direction, G, H, offs_h, mask)
    state = load_state(h_0_ptr, c_0_ptr, own_row, HAS_C, H, offs_state, offs_h, mask)
    if reset_ptr is not None:
        restart, starts = load_starts(
            reset_ptr, reset_h_ptr, reset_c_ptr, where, 0, D, own_row, offs_state, BY_STEP, HAS_C, H, offs_h, mask
        )
        state = keep(restart, starts, state, 1 + HAS_C)
    h_tile = gl.allocate_shared_memory(
        dtype, [2, SHARES, BLOCK_B, BLOCK_H // SHARES], layouts.operand(BITS, BLOCK_H // SHARES, [2, 1, 0], CTAS, None)
    )
    if CTAS > 1:
        own_h = gl.allocate_shared_memory(
            dtype, [2, BLOCK_B, BLOCK_H], layouts.operand(BITS, BLOCK_H // CTAS, [1, 0], CTAS, 1)
        )
        own_h.index(0).store(state[0].to(dtype))
    else:
        h_tile.index(0).store(in_shares(state[0].to(dtype), SHARES))
    shape: gl.constexpr = [G, SHARES, BLOCK_B, BLOCK_H]
    summands = gl.allocate_shared_memory(gl.float32, shape, layouts.partial(BLOCK_H, CTAS, 2))
    zeros = gl.zeros([SHARES, BLOCK_B, BLOCK_H], gl.float32, PRODUCT)

    x_next = load_inputs(x_gates_ptr, rows_ptr, where, 0, D, G, H, offs_h, mask)
    for step in range(T):
        x = as_fp32(x_next, G)
        if not BIAS_KEPT:  # its registers are W_hh's: it comes from L1 every step
            b_hh = load_bias(b_hh_ptr, direction, G, H, offs_h, mask)
        if CTAS > 1:
            cluster_barrier()
            whole = own_h.index(step % 2).load(layouts.gathered(BITS, BLOCK_H, WARPS, CTAS))
            h_tile.index(0).store(in_shares(whole, SHARES))
        block_barrier()
        h = h_tile.index(0 if CTAS > 1 else step % 2).load(A)
        # In flight while the products wait for h, and its registers are free before.
        x_next = load_inputs(x_gates_ptr, rows_ptr, where, gl.minimum(step + 1, T - 1), D, G, H, offs_h, mask)
        if reset_ptr is not None:
            restart, starts = load_starts(
                reset_ptr, reset_h_ptr, reset_c_ptr, where, step + 1, D, own_row, offs_state, BY_STEP, HAS_C,
                H, offs_h, mask,
            )  # fmt: skip
        for g in gl.static_range(G):
            summands.index(g).store(mma_v2(h, operand(W_hh, g, IN_REGISTERS, W), zeros, input_precision=PRECISION))
        block_barrier()
        rec = ()
        for g in gl.static_range(G):
            rec = rec + (gl.sum(summands.index(g).load(SUMMED), 0) + b_hh[g],)
        live = within(mask, rows_ptr, where, step)
        after, saved = step_forward(CELL, x, rec, state, live, rows_ptr, HAS_C, ACTIVATIONS)
        state = after
        if reset_ptr is not None:
            state = keep(restart, starts, after, 1 + HAS_C)
        if CTAS > 1:
            own_h.index((step + 1) % 2).store(state[0].to(dtype))
        else:
            h_tile.index((step + 1) % 2).store(in_shares(state[0].to(dtype), SHARES))

        now = slot(where, step, D)
        store_tiles(y_ptr + now * H, D * H, after, 1, H, offs_b, offs_h, live)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (after[1],), 1, H, offs_b, offs_h, live)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_h, live)

    store_state(h_n_ptr, c_n_ptr, own_row, state, HAS_C, H, offs_state, offs_h, mask)
    if CTAS > 1:
        gl.barrier(cluster=True)  # no program ends while others read its shared memory


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, dc_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr, d_reset_h_ptr, d_reset_c_ptr,
    T, B,
    CELL: gl.constexpr, G: gl.constexpr, S: gl.constexpr, HAS_C: gl.constexpr, ACTIVATIONS: gl.constexpr,
    RAGGED: gl.constexpr, BY_STEP: gl.constexpr,
    D: gl.constexpr, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, PRECISION: gl.constexpr,
    SHARES: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    CTAS: gl.constexpr = gl.num_ctas()
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = W_hh_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    SUMMANDS: gl.constexpr = SHARES * CTAS
    DEPTH: gl.constexpr = BLOCK_H // SUMMANDS
    PRODUCT: gl.constexpr = layouts.product(WARPS, SHARES, CTAS, 0)
    A: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 32 // BITS)
    W: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 32 // BITS)
    SUMMED: gl.constexpr = layouts.summed(SUMMANDS, BLOCK_B, BLOCK_H, WARPS, CTAS)
    direction, first_row, offs_b, offs_h, mask = place(B, D, H, BLOCK_B, BLOCK_H, gl.SliceLayout(0, SUMMED))
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, offs_b, RAGGED)
    T, offs_b = where[1], where[4]
    W_hh = load_weights(
        W_hh_ptr, direction, G, H, BLOCK_H, SUMMANDS, W,
        layouts.operand(BITS, BLOCK_H, [2, 1, 0], CTAS, 0), True, IN_REGISTERS,
    )  # fmt: skip

    d_state = load_state(dh_n_ptr, dc_n_ptr, own_row, HAS_C, H, offs_state, offs_h, mask)
    d_tile = gl.allocate_shared_memory(
        dtype, [G, SUMMANDS, BLOCK_B, DEPTH], layouts.operand(BITS, DEPTH, [2, 1, 0], CTAS, 0)
    )
    shape: gl.constexpr = [2, SUMMANDS, BLOCK_B, BLOCK_H]
    summands = gl.allocate_shared_memory(gl.float32, shape, layouts.partial(BLOCK_H, CTAS, 0))
    end = kept_ptr + slot(where, T - 1, D) * H
    kept = as_fp32(load_tiles(end, D * H, 1, H, offs_b, offs_h, within(mask, rows_ptr, where, T - 1)), 1)[0]
    following = load_step(
        dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
        where, T - 1, D, own_row, offs_state, S, H, BY_STEP, offs_h, mask,
    )  # fmt: skip
    for back in range(T):
        step, tiles = T - 1 - back, following
        following = load_step(
            dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
            where, gl.maximum(step - 1, 0), D, own_row, offs_state, S, H, BY_STEP, offs_h, mask,
        )  # fmt: skip
        live = within(mask, rows_ptr, where, step)
        d_x, d_rec, d_state, kept = step_backward(
            CELL, d_state, tiles, kept, live, dc_ptr, rows_ptr, reset_ptr, G, S, HAS_C, ACTIVATIONS
        )
        for g in gl.static_range(G):
            d_tile.index(g).store(in_shares(d_rec[g].to(dtype), SUMMANDS))
        block_barrier()
        acc = gl.zeros([SUMMANDS, BLOCK_B, BLOCK_H], gl.float32, PRODUCT)
        for g in gl.static_range(G):
            acc = mma_v2(d_tile.index(g).load(A), operand(W_hh, g, IN_REGISTERS, W), acc, input_precision=PRECISION)
        summands.index(back % 2).store(acc)
        if CTAS > 1:
            cluster_barrier()
        else:
            block_barrier()
        dh = gl.sum(summands.index(back % 2).load(SUMMED), 0)
        d_state = with_dh(d_state, d_state[0] + dh, HAS_C)
        if reset_ptr is not None:
            restart = tiles[len(tiles) - 1]
            d_state = cut(d_state, restart, d_reset_h_ptr, d_reset_c_ptr, where, step, D, HAS_C, H, offs_h, mask)

        now = slot(where, step, D)
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_h, live)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_h, live)

    store_state(dh_0_ptr, dc_0_ptr, own_row, d_state, HAS_C, H, offs_state, offs_h, mask)
    if CTAS > 1:
        gl.barrier(cluster=True)
