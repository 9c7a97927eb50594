"""The cooperative tier: W_hh is split over a group of P programs that run at once and exchange the state every step.

    forward    wait for h[t-1];   rec = W_hh[own units] h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               hand on h[own units];   arrive
    backward   d_gates[t, own units] = cell'(dh + dy[t], dc, saved[t]);   arrive;   wait for d_gates[t];
               dh = W_hh^T[own units] d_gates[t] + rest

A program owns BLOCK_N hidden units, all their gates and their W_hh: the rows that make its own gates in forward, the
columns that make its own dh in backward; either stays on chip for the whole sequence. ../exchange.py says how the state
is handed on, ../barrier.py how programs wait. What does not depend on the others (x_gates of the next step, everything
that backward reads of it) is loaded between arrival and wait; what they do not need (y, c, saved tiles) is stored after
the arrival.

The WARPS warps of a program share the sum over K, the H units of the exchanged state, as a batched product: each reads
its own columns of the state once and multiplies them with all own units, so that no warp repeats another's products and
chains of dependent ones are short. A share is a multiple of 16 columns, H = 650 on 8 warps costs 768: K_TILES, ((start,
size), ...), covers it with powers of two, small ones, since each is an operand that a warp holds whole.

Source: Diamos et al. 2016 (persistent RNNs) for the split over the GPU with a barrier a step.

Grid: (P, batch tiles, D); the last two number the groups. The layout of tensors is in ../loop.py.

Limit: the latency of a step, not bandwidth: one grid barrier and one read of the state through L2 (about 1 us on an
H100 by public notes), then product, sum over the warps, activations, store.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import loop
from ..exchange import Group, announce, load_exchanged, meet, publish, receive
from ..loop import Constants, Gradients, Outputs, Saved, first_state, load_bias, load_state, store_state
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows, live, slot


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # [WARPS, K, BLOCK_N] for each piece of K and gate
    b_hh: Any  # G tiles [BLOCK_B, BLOCK_N]; None in backward
    row_mask: Any  # [BLOCK_B]: rows of the batch tile that exist
    group: Any


class Form(NamedTuple):
    """What the planner chose."""

    K_TILES: Any
    WARPS: Any
    SPIN_ON_LOAD: Any


@triton.jit
def place(rows_ptr, T, B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr):
    """This program's rows and units, the first row of its batch tile, and the tile's rows and their mask."""
    direction, D = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    first_row = tl.program_id(1).to(tl.int64) * BLOCK_B
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = first_row + offs_b < B
    units = Units(offs_n, row_mask[:, None] & (offs_n < H)[None, :])
    return find_rows(rows_ptr, direction, D, T, B, first_row, offs_b, RAGGED), units, first_row, offs_b, row_mask


@triton.jit
def columns(K_TILES: tl.constexpr, i: tl.constexpr, WARPS: tl.constexpr):
    """[WARPS, K]: the units that piece i of each warp's share covers."""
    share: tl.constexpr = K_TILES[len(K_TILES) - 1][0] + K_TILES[len(K_TILES) - 1][1]
    return tl.arange(0, WARPS)[:, None] * share + K_TILES[i][0] + tl.arange(0, K_TILES[i][1])[None, :]


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
def gates(held, K: tl.constexpr, F: tl.constexpr, h_ptr):
    """W_hh h + b_hh of the own units, gate by gate."""
    sums = ()
    for g in tl.static_range(K.gates):
        sums = sums + (tl.zeros([F.WARPS, held.b_hh[g].shape[0], held.b_hh[g].shape[1]], tl.float32),)
    for i in tl.static_range(len(F.K_TILES)):
        h = load_exchanged(h_ptr, K.H, columns(F.K_TILES, i, F.WARPS), K.H, held.group.rows, held.row_mask)
        longer = ()
        for g in tl.static_range(K.gates):
            W_g = held.W_hh[i * K.gates + g]
            longer = longer + (tl.dot(h, W_g, acc=sums[g], input_precision=K.precision),)
        sums = longer
    rec = ()
    for g in tl.static_range(K.gates):
        rec = rec + (held.b_hh[g] + tl.sum(sums[g], 0),)
    return rec


@triton.jit
def d_hidden(held, K: tl.constexpr, F: tl.constexpr, dh, sent, rows, step, back):
    """dh + W_hh^T d_gates of the own units, when all programs have announced d_gates."""
    group = held.group
    meet(group, back + 1, F)
    now, mask = slot(rows, step), live(held.row_mask, rows, step, K.own_lengths)
    total = tl.zeros([F.WARPS, dh.shape[0], dh.shape[1]], tl.float32)
    for i in tl.static_range(len(F.K_TILES)):
        offs_k = columns(F.K_TILES, i, F.WARPS)
        for g in tl.static_range(K.gates):
            if group.last is not None and g == K.gates - 1:
                d_gate = load_exchanged(group.last + now * K.H, rows.D * K.H, offs_k, K.H, rows.slots, mask)
            else:
                ptr = group.exchanged + (now * K.gates + g) * K.H
                d_gate = load_exchanged(ptr, rows.D * K.gates * K.H, offs_k, K.H, rows.slots, mask)
            total = tl.dot(d_gate, held.W_hh[i * K.gates + g], acc=total, input_precision=K.precision)
    return dh + tl.sum(total, 0)


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
    K: tl.constexpr = Constants(CELL, G, 1 + HAS_C, S, ACTIVATIONS, rows_ptr is not None, BY_STEP, H, PRECISION)
    F: tl.constexpr = Form(K_TILES, WARPS, SPIN_ON_LOAD)
    TIER: tl.constexpr = loop.Tier(receive, gates, publish, False, F)
    rows, units, first_row, offs_b, row_mask = place(rows_ptr, T, B, H, BLOCK_B, BLOCK_N, RAGGED)
    if HAS_C:
        first, last, starts, cells = (h_0_ptr, c_0_ptr), (h_n_ptr, c_n_ptr), (reset_h_ptr, reset_c_ptr), (c_ptr,)
    else:
        first, last, starts, cells = (h_0_ptr,), (h_n_ptr,), (reset_h_ptr,), ()
    counter_ptr = counters_ptr + (tl.program_id(1) * rows.D + tl.program_id(2)) * COUNTER_STRIDE
    exchanged_ptr += (rows.direction * B + first_row) * H
    buffer = rows.D * tl.cast(B, tl.int64) * H
    group = Group(counter_ptr, tl.num_programs(0).to(tl.int64), exchanged_ptr, None, buffer, offs_b)
    W_hh = load_weights(W_hh_ptr, rows.direction, units.offs, G, H, K_TILES, WARPS, True)
    held = Held(W_hh, load_bias(K, b_hh_ptr, rows.direction, units), row_mask, group)
    resets = Resets(reset_ptr, starts)
    state = first_state(K, first, rows, units, resets)
    publish(held, K, F, units, state, 0)
    out = Outputs(y_ptr, cells, saved_ptr)
    state = loop.forward(TIER, K, held, x_gates_ptr, out, rows, units, resets, state)
    store_state(K, last, rows, units, state)


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
    K: tl.constexpr = Constants(CELL, G, 1 + HAS_C, S, ACTIVATIONS, rows_ptr is not None, BY_STEP, H, PRECISION)
    F: tl.constexpr = Form(K_TILES, WARPS, SPIN_ON_LOAD)
    TIER: tl.constexpr = loop.Tier(None, d_hidden, announce, False, F)
    rows, units, _, offs_b, row_mask = place(rows_ptr, T, B, H, BLOCK_B, BLOCK_N, RAGGED)
    if HAS_C:
        last, first, starts = (dh_n_ptr, dc_n_ptr), (dh_0_ptr, dc_0_ptr), (d_reset_h_ptr, d_reset_c_ptr)
        cells = (dc_ptr,)
    else:
        last, first, starts, cells = (dh_n_ptr,), (dh_0_ptr,), (d_reset_h_ptr,), ()
    counter_ptr = counters_ptr + (tl.program_id(1) * rows.D + tl.program_id(2)) * COUNTER_STRIDE
    group = Group(counter_ptr, tl.num_programs(0).to(tl.int64), d_x_gates_ptr, d_rec_last_ptr, None, offs_b)
    W_hh = load_weights(W_hh_ptr, rows.direction, units.offs, G, H, K_TILES, WARPS, False)
    held = Held(W_hh, None, row_mask, group)
    read = Saved(dy_ptr, cells, kept_0_ptr, kept_ptr, saved_ptr)
    grads = Gradients(d_x_gates_ptr, d_rec_last_ptr, starts)
    d_state = load_state(K, last, rows, units)
    resets = Resets(reset_ptr, (reset_kept_ptr,))
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, first, rows, units, d_state)
