"""The resident tier in Gluon: one program holds all of W_hh in registers, as operands of the tensor cores.

    forward    barrier;   h = tile[step];   rec = W_hh h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               tile[step + 1] = h
    backward   d_gates[t] = cell'(dh + dy[t], dc, saved[t]);   tile[step] = d_gates[t];   barrier;
               dh = W_hh^T tile[step] + rest

Each warp owns columns of the product: its part of W_hh, [BLOCK_H, 8 or 16 units] of every gate, stays in its registers
for the whole sequence, and all it reads a step is h, which every warp needs whole and finds in shared memory. x_gates,
saved tiles and outputs are loaded and stored in the product's own layout: nothing is converted. The shared tile is
double, so that one barrier a step is enough; Triton 3.9, which does not tell the slots apart, adds one in backward.

The layout of tensors is in ../tile/tiles.py, whose helpers serve both dialects: layouts come with the offsets.
Grid: (batch tiles, D). Source: as ../tile/resident.py.

Limit: the chain of dependent latencies of a step (ldmatrix, BLOCK_H / 16 products, activations, store, barrier); for 16
warps also their issue slots. W_hh costs nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..tile.tiles import as_fp32, load_bias, load_state, load_step, load_tiles, store_state, store_tiles, time_index


@gluon.jit
def place(B, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, LAYOUT: gl.constexpr):
    """This program's direction (of D), its first row (of B), and offsets and mask of its tile; scalars are int64."""
    direction = gl.program_id(1).to(gl.int64)
    first_row = gl.program_id(0).to(gl.int64) * BLOCK_B
    offs_b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, LAYOUT))
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(0, LAYOUT))
    mask = (first_row + offs_b < B)[:, None] & (offs_h < H)[None, :]
    return direction, gl.num_programs(1), B.to(gl.int64), first_row, offs_b, offs_h, mask


@gluon.jit
def load_weights(
    W_hh_ptr, direction, G: gl.constexpr, H: gl.constexpr, BLOCK_H: gl.constexpr, LAYOUT: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """G operands [BLOCK_H of k, BLOCK_H of n]: W_hh[n, k], or W_hh[k, n] if TRANSPOSED."""
    offs_k = gl.arange(0, BLOCK_H, gl.SliceLayout(1, LAYOUT))[:, None]
    offs_n = gl.arange(0, BLOCK_H, gl.SliceLayout(0, LAYOUT))[None, :]
    mask = (offs_k < H) & (offs_n < H)
    tiles = ()
    for g in gl.static_range(G):
        block_ptr = W_hh_ptr + (direction * G + g) * H * H
        if TRANSPOSED:
            tiles = tiles + (gl.load(block_ptr + offs_k * H + offs_n, mask=mask, other=0.0),)
        else:
            tiles = tiles + (gl.load(block_ptr + offs_n * H + offs_k, mask=mask, other=0.0),)
    return tiles


@gluon.jit(do_not_specialize=["T", "B"])
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr,
    T, B,
    CELL: gl.constexpr, G: gl.constexpr, S: gl.constexpr, HAS_C: gl.constexpr, ACTIVATIONS: gl.constexpr,
    H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = W_hh_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, gl.num_warps()], [16, 8])
    K_WIDTH: gl.constexpr = 32 // dtype.primitive_bitwidth
    H_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, K_WIDTH)
    direction, D, rows, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H, LAYOUT)
    W_hh = load_weights(W_hh_ptr, direction, G, H, BLOCK_H, gl.DotOperandLayout(1, LAYOUT, K_WIDTH), False)
    b_hh = load_bias(b_hh_ptr, direction, G, H, offs_h, mask)

    own_rows = (direction * rows + first_row) * H  # of this program in [D, B, H]
    state = load_state(h_0_ptr, c_0_ptr, own_rows, HAS_C, H, offs_b, offs_h, mask)
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4 * K_WIDTH, 1, min(8, BLOCK_H // (4 * K_WIDTH)), [1, 0])
    h_tile = gl.allocate_shared_memory(dtype, [2, BLOCK_B, BLOCK_H], SWIZZLED)
    h_tile.index(0).store(state[0].to(dtype))

    start = (time_index(0, T, direction) * rows + first_row) * D + direction
    x_next = load_tiles(x_gates_ptr + start * G * H, D * G * H, G, H, offs_b, offs_h, mask)
    for step in range(T):
        x = as_fp32(x_next, G)
        ahead = (time_index(gl.minimum(step + 1, T - 1), T, direction) * rows + first_row) * D + direction
        x_next = load_tiles(x_gates_ptr + ahead * G * H, D * G * H, G, H, offs_b, offs_h, mask)

        gl.barrier()
        h = h_tile.index(step % 2).load(H_LAYOUT)
        rec = ()
        for g in gl.static_range(G):
            rec = rec + (mma_v2(h, W_hh[g], b_hh[g], input_precision=PRECISION),)
        state, saved = CELL(x, rec, state, ACTIVATIONS)
        h_tile.index((step + 1) % 2).store(state[0].to(dtype))

        now = (time_index(step, T, direction) * rows + first_row) * D + direction
        store_tiles(y_ptr + now * H, D * H, state, 1, H, offs_b, offs_h, mask)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (state[1],), 1, H, offs_b, offs_h, mask)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_h, mask)

    store_state(h_n_ptr, c_n_ptr, own_rows, state, HAS_C, H, offs_b, offs_h, mask)


@gluon.jit(do_not_specialize=["T", "B"])
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr,
    T, B,
    CELL: gl.constexpr, G: gl.constexpr, S: gl.constexpr, HAS_C: gl.constexpr, ACTIVATIONS: gl.constexpr,
    H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = W_hh_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, gl.num_warps()], [16, 8])
    K_WIDTH: gl.constexpr = 32 // dtype.primitive_bitwidth
    D_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, K_WIDTH)
    direction, D, rows, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H, LAYOUT)
    W_hh = load_weights(W_hh_ptr, direction, G, H, BLOCK_H, gl.DotOperandLayout(1, LAYOUT, K_WIDTH), True)

    own_rows = (direction * rows + first_row) * H
    d_state = load_state(dh_n_ptr, dc_n_ptr, own_rows, HAS_C, H, offs_b, offs_h, mask)
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4 * K_WIDTH, 1, min(8, BLOCK_H // (4 * K_WIDTH)), [1, 0])
    d_tile = gl.allocate_shared_memory(dtype, [2 * G, BLOCK_B, BLOCK_H], SWIZZLED)
    end = (time_index(T - 1, T, direction) * rows + first_row) * D + direction
    kept = load_tiles(kept_ptr + end * H, D * H, 1, H, offs_b, offs_h, mask)[0].to(gl.float32)
    following = load_step(
        0, T, rows, first_row, direction, D, dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask, S, H
    )
    for step in range(T):
        tiles = as_fp32(following, S + 2)
        following = load_step(
            gl.minimum(step + 1, T - 1), T, rows, first_row, direction, D,
            dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask, S, H,
        )  # fmt: skip
        kept_prev = tiles[0]
        saved = ()
        for n in gl.static_range(S):
            saved = saved + (tiles[n + 2],)

        if HAS_C:
            d_state = (d_state[0] + tiles[1], d_state[1])
        else:
            d_state = (d_state[0] + tiles[1],)
        d_x, d_rec, d_state = CELL(d_state, saved, kept, kept_prev, ACTIVATIONS)
        kept = kept_prev
        slot = step % 2 * G
        for g in gl.static_range(G):
            d_tile.index(slot + g).store(d_rec[g].to(dtype))
        gl.barrier()
        dh = d_state[0]
        for g in gl.static_range(G):
            dh = mma_v2(d_tile.index(slot + g).load(D_LAYOUT), W_hh[g], dh, input_precision=PRECISION)
        if HAS_C:
            d_state = (dh, d_state[1])
        else:
            d_state = (dh,)

        now = (time_index(T - 1 - step, T, direction) * rows + first_row) * D + direction
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_h, mask)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_h, mask)

    store_state(dh_0_ptr, dc_0_ptr, own_rows, d_state, HAS_C, H, offs_b, offs_h, mask)
