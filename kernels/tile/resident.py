"""The resident tier: one program holds all of W_hh for one batch tile and one direction, and walks all of time.

    forward    for t in time:    rec = W_hh h + b_hh;  (h, c), saved = cell(x_gates[t], rec, (h, c));  y[t] = h
    backward   for t reversed:   dh += dy[t];  d_gates[t] = cell'(dh, dc, saved[t]);  dh = W_hh^T d_gates[t] + rest

Source: section 3 of Appleyard et al. 2016 (arXiv:1604.01946) for the split of the input product from the recurrent
one; Diamos et al. 2016 (persistent RNNs) for weights that stay on chip.

The layout of every tensor is in tiles.py, sequences of their own lengths and resets in sequences.py.

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

from ..metadata import of_launch
from .sequences import cut, find_rows, keep, load_starts, slot, within
from .tiles import (
    as_fp32,
    load_bias,
    load_inputs,
    load_state,
    load_step,
    load_tiles,
    place,
    step_backward,
    step_forward,
    store_state,
    store_tiles,
    with_dh,
)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr, rows_ptr, reset_ptr, reset_h_ptr, reset_c_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BY_STEP: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    direction, D, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H)
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, offs_b, RAGGED)
    T, offs_b = where[1], where[4]
    square = (offs_h < H)[:, None] & (offs_h < H)[None, :]

    W_hh = ()  # G tiles [BLOCK_H of k, BLOCK_H of n]
    for g in tl.static_range(G):
        block_ptr = W_hh_ptr + (direction * G + g) * H * H
        W_hh = W_hh + (tl.load(block_ptr + offs_h[None, :] * H + offs_h[:, None], mask=square, other=0.0),)
    b_hh = load_bias(b_hh_ptr, direction, G, H, offs_h, mask)

    state = load_state(h_0_ptr, c_0_ptr, own_row, HAS_C, H, offs_state, offs_h, mask)
    if reset_ptr is not None:
        restart, starts = load_starts(
            reset_ptr, reset_h_ptr, reset_c_ptr, where, 0, D, own_row, offs_state, BY_STEP, HAS_C, H, offs_h, mask
        )
        state = keep(restart, starts, state, 1 + HAS_C)
    x_next = load_inputs(x_gates_ptr, rows_ptr, where, 0, D, G, H, offs_h, mask)
    for step in tl.range(0, T, num_stages=1):
        x = as_fp32(x_next, G)
        x_next = load_inputs(x_gates_ptr, rows_ptr, where, tl.minimum(step + 1, T - 1), D, G, H, offs_h, mask)
        if reset_ptr is not None:
            restart, starts = load_starts(
                reset_ptr, reset_h_ptr, reset_c_ptr, where, step + 1, D, own_row, offs_state, BY_STEP, HAS_C,
                H, offs_h, mask,
            )  # fmt: skip

        h = state[0].to(W_hh_ptr.dtype.element_ty)
        rec = ()
        for g in tl.static_range(G):
            rec = rec + (tl.dot(h, W_hh[g], acc=b_hh[g], input_precision=PRECISION),)
        live = within(mask, rows_ptr, where, step)
        state, saved = step_forward(CELL, x, rec, state, live, rows_ptr, HAS_C, ACTIVATIONS)

        now = slot(where, step, D)
        store_tiles(y_ptr + now * H, D * H, state, 1, H, offs_b, offs_h, live)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (state[1],), 1, H, offs_b, offs_h, live)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_h, live)
        if reset_ptr is not None:
            state = keep(restart, starts, state, 1 + HAS_C)

    store_state(h_n_ptr, c_n_ptr, own_row, state, HAS_C, H, offs_state, offs_h, mask)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, dc_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr, d_reset_h_ptr, d_reset_c_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BY_STEP: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    direction, D, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H)
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, offs_b, RAGGED)
    T, offs_b = where[1], where[4]
    square = (offs_h < H)[:, None] & (offs_h < H)[None, :]

    W_hh = ()  # G tiles [BLOCK_H of n, BLOCK_H of k]: as stored, since backward multiplies by the transpose
    for g in tl.static_range(G):
        block_ptr = W_hh_ptr + (direction * G + g) * H * H
        W_hh = W_hh + (tl.load(block_ptr + offs_h[:, None] * H + offs_h[None, :], mask=square, other=0.0),)

    d_state = load_state(dh_n_ptr, dc_n_ptr, own_row, HAS_C, H, offs_state, offs_h, mask)
    end = kept_ptr + slot(where, T - 1, D) * H
    kept = as_fp32(load_tiles(end, D * H, 1, H, offs_b, offs_h, within(mask, rows_ptr, where, T - 1)), 1)[0]
    following = load_step(
        dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
        where, T - 1, D, own_row, offs_state, S, H, BY_STEP, offs_h, mask,
    )  # fmt: skip
    for back in tl.range(0, T, num_stages=1):
        step, tiles = T - 1 - back, following
        following = load_step(
            dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
            where, tl.maximum(step - 1, 0), D, own_row, offs_state, S, H, BY_STEP, offs_h, mask,
        )  # fmt: skip
        live = within(mask, rows_ptr, where, step)
        d_x, d_rec, d_state, kept = step_backward(
            CELL, d_state, tiles, kept, live, dc_ptr, rows_ptr, reset_ptr, G, S, HAS_C, ACTIVATIONS
        )
        dh = d_state[0]
        for g in tl.static_range(G):
            dh = tl.dot(d_rec[g].to(W_hh_ptr.dtype.element_ty), W_hh[g], acc=dh, input_precision=PRECISION)
        d_state = with_dh(d_state, dh, HAS_C)
        if reset_ptr is not None:
            restart = tiles[len(tiles) - 1]
            d_state = cut(d_state, restart, d_reset_h_ptr, d_reset_c_ptr, where, step, D, HAS_C, H, offs_h, mask)

        now = slot(where, step, D)
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_h, live)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_h, live)

    store_state(dh_0_ptr, dc_0_ptr, own_row, d_state, HAS_C, H, offs_state, offs_h, mask)
