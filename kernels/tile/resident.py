"""The resident tier: one program holds all of W_hh for one batch tile and one direction, and walks all of time.

    forward    for t in time:    rec = W_hh h + b_hh;  (h, c), saved = cell(x_gates[t], rec, (h, c));  y[t] = h
    backward   for t reversed:   dh += dy[t];  d_gates[t] = cell'(dh, dc, saved[t]);  dh = W_hh^T d_gates[t] + rest

Source: section 3 of Appleyard et al. 2016 (arXiv:1604.01946) for the split of the input product from the recurrent
one; Diamos et al. 2016 (persistent RNNs) for weights that stay on chip.

The layout of every tensor is in tiles.py.

Grid: (batch tiles, D). W_hh is read before the loop, once; x_gates (backward: everything a step reads) of the next
step is loaded before this step's product, so that its latency hides behind it. The state is fp32 from step to step
and is rounded where it is stored or multiplied. Forward saves the cell's saved tiles and c of every step, and only
if saved_ptr is given (or c_ptr: the RNN needs nothing but y). dW_hh and db_hh are left to one product and one sum
after the loop: accumulators for them would take the registers that hold W_hh.

Limit: one SM's shared-memory bandwidth (W_hh passes through it every step) and the chain product, activations,
state; more batch tiles or directions only fill more SMs.
"""

import triton
import triton.language as tl

from .tiles import (
    as_fp32,
    load_bias,
    load_state,
    load_step,
    load_tiles,
    place,
    store_state,
    store_tiles,
    time_index,
)


@triton.jit(do_not_specialize=["T", "B"])
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    direction, D, rows, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H)
    square = (offs_h < H)[:, None] & (offs_h < H)[None, :]

    W_hh = ()  # G tiles [BLOCK_H of k, BLOCK_H of n]
    for g in tl.static_range(G):
        block_ptr = W_hh_ptr + (direction * G + g) * H * H
        W_hh = W_hh + (tl.load(block_ptr + offs_h[None, :] * H + offs_h[:, None], mask=square, other=0.0),)
    b_hh = load_bias(b_hh_ptr, direction, G, H, offs_h, mask)

    own_rows = (direction * rows + first_row) * H  # of this program in [D, B, H]
    state = load_state(h_0_ptr, c_0_ptr, own_rows, HAS_C, H, offs_b, offs_h, mask)

    start = (time_index(0, T, direction) * rows + first_row) * D + direction
    x_next = load_tiles(x_gates_ptr + start * G * H, D * G * H, G, H, offs_b, offs_h, mask)
    for step in tl.range(0, T, num_stages=1):
        x = as_fp32(x_next, G)
        ahead = (time_index(tl.minimum(step + 1, T - 1), T, direction) * rows + first_row) * D + direction
        x_next = load_tiles(x_gates_ptr + ahead * G * H, D * G * H, G, H, offs_b, offs_h, mask)

        h = state[0].to(W_hh_ptr.dtype.element_ty)
        rec = ()
        for g in tl.static_range(G):
            rec = rec + (tl.dot(h, W_hh[g], acc=b_hh[g], input_precision=PRECISION),)
        state, saved = CELL(x, rec, state, ACTIVATIONS)

        now = (time_index(step, T, direction) * rows + first_row) * D + direction
        store_tiles(y_ptr + now * H, D * H, state, 1, H, offs_b, offs_h, mask)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (state[1],), 1, H, offs_b, offs_h, mask)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_h, mask)

    store_state(h_n_ptr, c_n_ptr, own_rows, state, HAS_C, H, offs_b, offs_h, mask)


@triton.jit(do_not_specialize=["T", "B"])
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    direction, D, rows, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H)
    square = (offs_h < H)[:, None] & (offs_h < H)[None, :]

    W_hh = ()  # G tiles [BLOCK_H of n, BLOCK_H of k]: as stored, since backward multiplies by the transpose
    for g in tl.static_range(G):
        block_ptr = W_hh_ptr + (direction * G + g) * H * H
        W_hh = W_hh + (tl.load(block_ptr + offs_h[:, None] * H + offs_h[None, :], mask=square, other=0.0),)

    own_rows = (direction * rows + first_row) * H
    d_state = load_state(dh_n_ptr, dc_n_ptr, own_rows, HAS_C, H, offs_b, offs_h, mask)
    end = (time_index(T - 1, T, direction) * rows + first_row) * D + direction
    kept = load_tiles(kept_ptr + end * H, D * H, 1, H, offs_b, offs_h, mask)[0].to(tl.float32)
    following = load_step(
        0, T, rows, first_row, direction, D, dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask, S, H
    )
    for step in tl.range(0, T, num_stages=1):
        tiles = as_fp32(following, S + 2)
        following = load_step(
            tl.minimum(step + 1, T - 1), T, rows, first_row, direction, D,
            dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask, S, H,
        )  # fmt: skip
        kept_prev = tiles[0]
        saved = ()
        for n in tl.static_range(S):
            saved = saved + (tiles[n + 2],)

        if HAS_C:
            d_state = (d_state[0] + tiles[1], d_state[1])
        else:
            d_state = (d_state[0] + tiles[1],)
        d_x, d_rec, d_state = CELL(d_state, saved, kept, kept_prev, ACTIVATIONS)
        dh = d_state[0]
        for g in tl.static_range(G):
            dh = tl.dot(d_rec[g].to(W_hh_ptr.dtype.element_ty), W_hh[g], acc=dh, input_precision=PRECISION)
        if HAS_C:
            d_state = (dh, d_state[1])
        else:
            d_state = (dh,)
        kept = kept_prev

        now = (time_index(T - 1 - step, T, direction) * rows + first_row) * D + direction
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_h, mask)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_h, mask)

    store_state(dh_0_ptr, dc_0_ptr, own_rows, d_state, HAS_C, H, offs_b, offs_h, mask)
