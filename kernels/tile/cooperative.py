"""The cooperative tier: W_hh is split over a group of P programs that run at once and exchange the state every step.

    forward    wait for h[t-1];   rec = W_hh[own units] h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               hand on h[own units];   arrive
    backward   d_gates[t, own units] = cell'(dh + dy[t], dc, saved[t]);   arrive;   wait for d_gates[t];
               dh = W_hh^T[own units] d_gates[t] + rest

A program owns BLOCK_N hidden units, all their gates and their W_hh: the rows that make its own gates in forward, the
columns that make its own dh in backward; either stays on chip for the whole sequence. Forward exchanges h in two
buffers that alternate: not as y, since where a sequence ends or starts anew another state goes on. Backward exchanges
d_gates, its output, each slot of which is written once. barrier.py holds the protocol. What does not depend on the
others (x_gates of the next step, everything that backward reads of it) is loaded between arrival and wait; what they do
not need (y, c, saved tiles) is stored after the arrival.

The WARPS warps of a program share the sum over K, the H units of the exchanged state, as a batched product: each reads
its own columns of the state once and multiplies them with all own units, so that no warp repeats another's products and
chains of dependent ones are short. A share is a multiple of 16 columns, H = 650 on 8 warps costs 768: K_TILES, ((start,
size), ...), covers it with powers of two, small ones, since each is an operand that a warp holds whole.

Source: Diamos et al. 2016 (persistent RNNs) for the split over the GPU with a barrier a step.

Grid: (P, batch tiles, D); the last two number the groups. The layout of tensors is in tiles.py.

Limit: the latency of a step, not bandwidth: one grid barrier and one read of the state through L2 (about 1 us on an
H100 by public notes, not measured here), then product, sum over the warps, activations, store.
"""

import triton
import triton.language as tl

from ..barrier import arrive, wait
from ..metadata import of_launch
from .sequences import cut, find_rows, keep, load_starts, slot, within
from .tiles import (
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


@triton.jit
def place(B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's direction (of D), its first row (of B), its own units, and masks of its rows and tile."""
    direction = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(1).to(tl.int64) * BLOCK_B
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = first_row + offs_b < B
    mask = row_mask[:, None] & (offs_n < H)[None, :]
    return direction, tl.num_programs(2), first_row, offs_b, offs_n, row_mask, mask


@triton.jit
def columns(K_TILES: tl.constexpr, i: tl.constexpr, WARPS: tl.constexpr):
    """[WARPS, K]: the units that piece i of each warp's share covers."""
    share: tl.constexpr = K_TILES[len(K_TILES) - 1][0] + K_TILES[len(K_TILES) - 1][1]
    return tl.arange(0, WARPS)[:, None] * share + K_TILES[i][0] + tl.arange(0, K_TILES[i][1])[None, :]


@triton.jit
def load_exchanged(ptr, row_stride, offs_k, H: tl.constexpr, offs_b, row_mask):
    """A piece [WARPS, BLOCK_B, K] of what the group's programs wrote: past L1, which may hold older values."""
    mask = row_mask[None, :, None] & (offs_k < H)[:, None, :]
    tile_ptr = ptr + offs_b[None, :, None] * row_stride + offs_k[:, None, :]
    return tl.load(tile_ptr, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def load_weights(
    W_hh_ptr, direction, offs_n,
    G: tl.constexpr, H: tl.constexpr, K_TILES: tl.constexpr, WARPS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """[WARPS, K, BLOCK_N] for each piece of K and gate: rows of W_hh are the own units if BY_ROW, else its columns."""
    tiles = ()
    for i in tl.static_range(len(K_TILES)):
        offs_k = columns(K_TILES, i, WARPS)[:, :, None]
        own = offs_n[None, None, :]
        for g in tl.static_range(G):
            block_ptr = W_hh_ptr + (direction * G + g) * H * H
            if BY_ROW:
                tile_ptr = block_ptr + own * H + offs_k
            else:
                tile_ptr = block_ptr + offs_k * H + own
            tiles = tiles + (tl.load(tile_ptr, mask=(offs_k < H) & (own < H), other=0.0),)
    return tiles


@triton.jit
def recurrent_gates(
    h_ptr, row_mask, W_hh, b_hh, offs_b,
    G: tl.constexpr, H: tl.constexpr, K_TILES: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_hh h + b_hh of the own units, gate by gate."""
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + (tl.zeros([WARPS, b_hh[0].shape[0], b_hh[0].shape[1]], tl.float32),)
    for i in tl.static_range(len(K_TILES)):
        h = load_exchanged(h_ptr, H, columns(K_TILES, i, WARPS), H, offs_b, row_mask)
        longer = ()
        for g in tl.static_range(G):
            longer = longer + (tl.dot(h, W_hh[i * G + g], acc=sums[g], input_precision=PRECISION),)
        sums = longer
    rec = ()
    for g in tl.static_range(G):
        rec = rec + (b_hh[g] + tl.sum(sums[g], 0),)
    return rec


@triton.jit
def d_hidden(
    d_x_gates_ptr, d_rec_last_ptr, now, D, row_mask, W_hh, offs_b,
    G: tl.constexpr, H: tl.constexpr, K_TILES: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_hh^T d_gates of the own units, d_gates being those of a (t, batch tile, direction)."""
    total = tl.zeros([WARPS, offs_b.shape[0], W_hh[0].shape[2]], tl.float32)
    for i in tl.static_range(len(K_TILES)):
        offs_k = columns(K_TILES, i, WARPS)
        for g in tl.static_range(G):
            if d_rec_last_ptr is not None and g == G - 1:
                d_gate = load_exchanged(d_rec_last_ptr + now * H, D * H, offs_k, H, offs_b, row_mask)
            else:
                d_gate = load_exchanged(d_x_gates_ptr + (now * G + g) * H, D * G * H, offs_k, H, offs_b, row_mask)
            total = tl.dot(d_gate, W_hh[i * G + g], acc=total, input_precision=PRECISION)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr, rows_ptr, reset_ptr, reset_h_ptr, reset_c_ptr,
    exchanged_ptr, counters_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BY_STEP: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, K_TILES: tl.constexpr, WARPS: tl.constexpr,
    PRECISION: tl.constexpr, SPIN_ON_LOAD: tl.constexpr, COUNTER_STRIDE: tl.constexpr,
):  # fmt: skip
    direction, D, first_row, tile_rows, offs_n, row_mask, mask = place(B, H, BLOCK_B, BLOCK_N)
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, tile_rows, RAGGED)
    T, offs_b = where[1], where[4]
    P = tl.num_programs(0).to(tl.int64)
    counter_ptr = counters_ptr + (tl.program_id(1) * D + tl.program_id(2)) * COUNTER_STRIDE
    # h in two buffers [2, D, B, H], rows as in batch tiles: that of even steps and that of odd ones.
    buffer = D * tl.cast(B, tl.int64) * H
    exchanged_ptr += (direction * B + first_row) * H

    W_hh = load_weights(W_hh_ptr, direction, offs_n, G, H, K_TILES, WARPS, True)
    b_hh = load_bias(b_hh_ptr, direction, G, H, offs_n, mask)
    state = load_state(h_0_ptr, c_0_ptr, own_row, HAS_C, H, offs_state, offs_n, mask)
    if reset_ptr is not None:
        restart, starts = load_starts(
            reset_ptr, reset_h_ptr, reset_c_ptr, where, 0, D, own_row, offs_state, BY_STEP, HAS_C, H, offs_n, mask
        )
        state = keep(restart, starts, state, 1 + HAS_C)
    store_tiles(exchanged_ptr, H, state, 1, H, tile_rows, offs_n, mask)
    arrive(counter_ptr)
    x_next = load_inputs(x_gates_ptr, rows_ptr, where, 0, D, G, H, offs_n, mask)
    for step in tl.range(0, T, num_stages=1):
        x = as_fp32(x_next, G)
        if reset_ptr is not None:
            restart, starts = load_starts(
                reset_ptr, reset_h_ptr, reset_c_ptr, where, step + 1, D, own_row, offs_state, BY_STEP, HAS_C,
                H, offs_n, mask,
            )  # fmt: skip
        wait(counter_ptr, (step + 1) * P, SPIN_ON_LOAD)
        h_ptr = exchanged_ptr + (step % 2) * buffer
        rec = recurrent_gates(h_ptr, row_mask, W_hh, b_hh, tile_rows, G, H, K_TILES, WARPS, PRECISION)
        live = within(mask, rows_ptr, where, step)
        after, saved = step_forward(CELL, x, rec, state, live, rows_ptr, HAS_C, ACTIVATIONS)
        state = after
        if reset_ptr is not None:
            state = keep(restart, starts, after, 1 + HAS_C)

        store_tiles(exchanged_ptr + (step + 1) % 2 * buffer, H, state, 1, H, tile_rows, offs_n, mask)
        arrive(counter_ptr)
        # Behind the product in the text, too: Triton 3.9 then spreads the cell over all threads, in the layout of these
        # loads. Before it, each warp computes the whole cell in the layout of the product's sum.
        x_next = load_inputs(x_gates_ptr, rows_ptr, where, tl.minimum(step + 1, T - 1), D, G, H, offs_n, mask)
        now = slot(where, step, D)
        store_tiles(y_ptr + now * H, D * H, after, 1, H, offs_b, offs_n, live)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (after[1],), 1, H, offs_b, offs_n, live)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_n, live)

    store_state(h_n_ptr, c_n_ptr, own_row, state, HAS_C, H, offs_state, offs_n, mask)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, dc_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr, d_reset_h_ptr, d_reset_c_ptr, counters_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BY_STEP: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, K_TILES: tl.constexpr, WARPS: tl.constexpr,
    PRECISION: tl.constexpr, SPIN_ON_LOAD: tl.constexpr, COUNTER_STRIDE: tl.constexpr,
):  # fmt: skip
    direction, D, first_row, tile_rows, offs_n, row_mask, mask = place(B, H, BLOCK_B, BLOCK_N)
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, tile_rows, RAGGED)
    T, offs_b = where[1], where[4]
    P = tl.num_programs(0).to(tl.int64)
    counter_ptr = counters_ptr + (tl.program_id(1) * D + tl.program_id(2)) * COUNTER_STRIDE
    W_hh = load_weights(W_hh_ptr, direction, offs_n, G, H, K_TILES, WARPS, False)

    d_state = load_state(dh_n_ptr, dc_n_ptr, own_row, HAS_C, H, offs_state, offs_n, mask)
    end = kept_ptr + slot(where, T - 1, D) * H
    kept = as_fp32(load_tiles(end, D * H, 1, H, offs_b, offs_n, within(mask, rows_ptr, where, T - 1)), 1)[0]
    following = load_step(
        dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
        where, T - 1, D, own_row, offs_state, S, H, BY_STEP, offs_n, mask,
    )  # fmt: skip
    for back in tl.range(0, T, num_stages=1):
        step, tiles = T - 1 - back, following
        live = within(mask, rows_ptr, where, step)
        d_x, d_rec, d_state, kept = step_backward(
            CELL, d_state, tiles, kept, live, dc_ptr, rows_ptr, reset_ptr, G, S, HAS_C, ACTIVATIONS
        )
        now = slot(where, step, D)
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_n, live)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_n, live)
        arrive(counter_ptr)
        following = load_step(
            dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
            where, tl.maximum(step - 1, 0), D, own_row, offs_state, S, H, BY_STEP, offs_n, mask,
        )  # fmt: skip

        wait(counter_ptr, (back + 1) * P, SPIN_ON_LOAD)
        live_rows = within(row_mask, rows_ptr, where, step)
        dh = d_state[0] + d_hidden(
            d_x_gates_ptr, d_rec_last_ptr, now, D, live_rows, W_hh, offs_b, G, H, K_TILES, WARPS, PRECISION
        )
        d_state = with_dh(d_state, dh, HAS_C)
        if reset_ptr is not None:
            restart = tiles[len(tiles) - 1]
            d_state = cut(d_state, restart, d_reset_h_ptr, d_reset_c_ptr, where, step, D, HAS_C, H, offs_n, mask)

    store_state(dh_0_ptr, dc_0_ptr, own_row, d_state, HAS_C, H, offs_state, offs_n, mask)
