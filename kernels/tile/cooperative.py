"""The cooperative tier: W_hh is split over a group of P programs that run at once and exchange the state every step.

    forward    wait for h[t-1];   rec = W_hh[own units] h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               hand on h[own units];   arrive
    backward   d_gates[t, own units] = cell'(dh + dy[t], dc, saved[t]);   arrive;   wait for d_gates[t];
               dh = W_hh^T[own units] d_gates[t] + rest

A program owns BLOCK_N hidden units, all their gates and their W_hh: the rows that make its own gates in forward, the
columns that make its own dh in backward; either stays on chip for the whole sequence. ../exchange.py says how the state
is handed on, ../barrier.py how programs wait: every step where this is compiled, while the interpreter runs the form
that polls, too. What does not depend on the others (x_gates of the next step, everything that backward reads of it) is
loaded between arrival and wait; what they do not need (y, c, saved tiles) is stored after the arrival.

The WARPS warps of a program share the sum over K, the H units of the exchanged state, as a batched product: each reads
its own columns of the state once and multiplies them with all own units, so that no warp repeats another's products and
chains of dependent ones are short. A share is a multiple of 16 columns, H = 650 on 8 warps costs 768: K_TILES, ((start,
size), ...), covers it with powers of two, small ones, since each is an operand that a warp holds whole.

Source: Diamos et al. 2016 (persistent RNNs) for the split over the GPU with a barrier a step.

Grid: (programs of a group, batch tiles from the first one on, R); the last two number the groups. The layout of tensors
is in ../arguments.py.

Limit: the latency of a step, not bandwidth: one grid barrier and one read of the state through L2 (about 1 us on an
H100 by public notes), then product, sum over the warps, activations, store.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import loop
from ..exchange import (
    Group,
    announce,
    begin_step,
    counter_of,
    first_row_of,
    load_exchanged,
    meet,
    poll,
    publish,
    receive,
    slot_of,
)
from ..loop import Constants
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows, live, slot
from ..tiles import first_state, load_bias, load_state, store_state


class Form(NamedTuple):
    """What the planner chose."""

    BLOCK_B: int
    BLOCK_N: int
    K_TILES: tuple[tuple[int, int], ...]
    WARPS: int
    SPIN_ON_LOAD: bool  # how a program waits at the grid barrier
    ROUND: int  # steps between two barriers; 0: one a step
    COLUMNS: int  # of a row of what is exchanged: all warps' shares
    IN_PTX: bool = False  # how a number is sent


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # [WARPS, K, BLOCK_N] for each piece of K and gate
    b_hh: Any  # G tiles [BLOCK_B, BLOCK_N]; None in backward
    group: Any
    last: Any  # by a barrier a step, backward: the last gate's d_rec, where it differs; else None


@triton.jit
def place(K: tl.constexpr, table_ptr, first_tile, T, B, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows and units, the first row of its batch tile, and the tile's rows."""
    first_row = first_row_of(first_tile, BLOCK_B)
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = Units(offs_n, (first_row + offs_b < B)[:, None] & (offs_n < K.H)[None, :])
    return find_rows(K, table_ptr, tl.program_id(2).to(tl.int64), T, B, first_row, offs_b), units, first_row, offs_b


@triton.jit
def group_of(K: tl.constexpr, F: tl.constexpr, exchange, grads, rows, units, B, first_row, offs_b):
    """The programs that this one exchanges with, and where."""
    programs, exists = tl.num_programs(0).to(tl.int64), first_row + offs_b < B
    if F.ROUND > 0:
        row: tl.constexpr = (1 if grads is None else K.gates) * F.COLUMNS
    else:
        row: tl.constexpr = K.H
    if exchange.states is None:
        exchanged_ptr = grads.d_x_gates
    else:
        exchanged_ptr = exchange.states + (rows.recurrence * B + first_row) * row
    buffer = rows.count * tl.cast(B, tl.int64) * row
    return Group(counter_of(exchange.counters, rows), programs, exchanged_ptr, buffer, offs_b, units, exists)


@triton.jit
def columns(F: tl.constexpr, i: tl.constexpr):
    """[WARPS, K]: the units that piece i of each warp's share covers."""
    share: tl.constexpr = F.COLUMNS // F.WARPS
    return tl.arange(0, F.WARPS)[:, None] * share + F.K_TILES[i][0] + tl.arange(0, F.K_TILES[i][1])[None, :]


@triton.jit
def load_weights(K: tl.constexpr, F: tl.constexpr, W_hh_ptr, recurrence, offs_n, BY_ROW: tl.constexpr):
    """[WARPS, K, BLOCK_N] for each piece of K and gate: rows of W_hh are the own units if BY_ROW, else its columns."""
    tiles, own = (), offs_n[None, None, :]
    for i in tl.static_range(len(F.K_TILES)):
        offs_k = columns(F, i)[:, :, None]
        for g in tl.static_range(K.gates):
            block_ptr = W_hh_ptr + (recurrence * K.gates + g) * K.H * K.H
            if BY_ROW:
                tile_ptr = block_ptr + own * K.H + offs_k
            else:
                tile_ptr = block_ptr + offs_k * K.H + own
            tiles = tiles + (tl.load(tile_ptr, mask=(offs_k < K.H) & (own < K.H), other=0.0),)
    return tiles


@triton.jit
def poll_piece(held, F: tl.constexpr, slot_ptr, GATES: tl.constexpr, g: tl.constexpr, offs_k):
    """[WARPS, BLOCK_B, K] of a gate of what was sent, when it has come; of rows that are not there, the first's."""
    rows = tl.where(held.group.exists, held.group.rows, 0)
    at = (rows[None, :, None] * GATES + g) * F.COLUMNS + offs_k[:, None, :]
    return poll(slot_ptr + at).to(held.W_hh[0].dtype, bitcast=True)


@triton.jit
def gates(held, K: tl.constexpr, F: tl.constexpr, h_ptr):
    """W_hh h + b_hh of the own units, gate by gate."""
    sums = ()
    for g in tl.static_range(K.gates):
        sums = sums + (tl.zeros([F.WARPS, held.b_hh[g].shape[0], held.b_hh[g].shape[1]], tl.float32),)
    for i in tl.static_range(len(F.K_TILES)):
        offs_k = columns(F, i)
        if F.ROUND == 0:
            h = load_exchanged(h_ptr, K.H, offs_k, K.H, held.group.rows, held.group.exists)
        else:
            h = poll_piece(held, F, h_ptr, 1, 0, offs_k)
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
    if F.ROUND == 0:
        meet(group, back + 1, F)
    else:
        begin_step(group, F, K.gates, back)
    now, mask = slot(rows, step), live(group.exists, rows, step, K.own_lengths)
    total = tl.zeros([F.WARPS, dh.shape[0], dh.shape[1]], tl.float32)
    for i in tl.static_range(len(F.K_TILES)):
        offs_k = columns(F, i)
        for g in tl.static_range(K.gates):
            if F.ROUND > 0:
                d_gate = poll_piece(held, F, slot_of(group, back, F), K.gates, g, offs_k)
            elif held.last is not None and g == K.gates - 1:
                d_gate = load_exchanged(held.last + now * K.H, rows.count * K.H, offs_k, K.H, rows.slots, mask)
            else:
                ptr = group.exchanged + (now * K.gates + g) * K.H
                d_gate = load_exchanged(ptr, rows.count * K.gates * K.H, offs_k, K.H, rows.slots, mask)
            total = tl.dot(d_gate, held.W_hh[i * K.gates + g], acc=total, input_precision=K.precision)
    return dh + tl.sum(total, 0)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(inputs, outputs, sequences, exchange, T, B, CELL: tl.constexpr, SIZES: tl.constexpr, FORM: tl.constexpr):
    K: tl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    F: tl.constexpr = Form(
        FORM.BLOCK_B, FORM.BLOCK_N, FORM.K_TILES, FORM.WARPS, FORM.SPIN_ON_LOAD, FORM.ROUND, FORM.COLUMNS
    )
    TIER: tl.constexpr = loop.Tier(receive, gates, publish, False, F)
    rows, units, first_row, offs_b = place(K, sequences.rows, exchange.first_tile, T, B, FORM.BLOCK_B, FORM.BLOCK_N)
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    group = group_of(K, F, exchange, None, rows, units, B, first_row, offs_b)
    W_hh = load_weights(K, F, inputs.W_hh, rows.recurrence, units.offs, True)
    held = Held(W_hh, load_bias(K, inputs.b_hh, rows.recurrence, units), group, None)
    state = first_state(K, inputs.states, rows, units, resets)
    publish(held, K, F, units, state, 0)
    state = loop.forward(TIER, K, held, inputs.x_gates, outputs, rows, units, resets, state)
    store_state(K, outputs.finals, rows, units, state)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(read, grads, sequences, exchange, T, B, CELL: tl.constexpr, SIZES: tl.constexpr, FORM: tl.constexpr):
    K: tl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    F: tl.constexpr = Form(
        FORM.BLOCK_B, FORM.BLOCK_N, FORM.K_TILES, FORM.WARPS, FORM.SPIN_ON_LOAD, FORM.ROUND, FORM.COLUMNS
    )
    TIER: tl.constexpr = loop.Tier(None, d_hidden, announce, False, F, None, FORM.ROUND == 0)
    rows, units, first_row, offs_b = place(K, sequences.rows, exchange.first_tile, T, B, FORM.BLOCK_B, FORM.BLOCK_N)
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    group = group_of(K, F, exchange, grads, rows, units, B, first_row, offs_b)
    W_hh = load_weights(K, F, read.W_hh, rows.recurrence, units.offs, False)
    held = Held(W_hh, None, group, grads.d_rec_last)
    d_state = load_state(K, read.d_finals, rows, units)
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, grads.d_states, rows, units, d_state)
