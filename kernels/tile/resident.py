"""The resident tier: one program holds all of W_hh for one batch tile and one direction, and walks all of time.

    forward    for t in time:    rec = W_hh h + b_hh;  (h, c), saved = cell(x_gates[t], rec, (h, c));  y[t] = h
    backward   for t reversed:   dh += dy[t];  d_gates[t] = cell'(dh, dc, saved[t]);  dh = W_hh^T d_gates[t] + rest

Source: section 3 of Appleyard et al. 2016 (arXiv:1604.01946) for the split of the input product from the recurrent
one; Diamos et al. 2016 (persistent RNNs) for weights that stay on chip.

The layout of every tensor is in ../arguments.py, sequences of their own lengths and resets in ../rows.py.

Grid: (batch tiles, R). W_hh is read before the loop, once; x_gates (backward: everything a step reads) of the next
step is loaded before this step's product, so that its latency hides behind it. The state is fp32 from step to step
and is rounded where it is stored or multiplied. Forward saves the cell's saved tiles and c of every step, and only
where they are given (the RNN needs nothing but y). dW_hh and db_hh are left to one product and one sum
after the loop: accumulators for them would take the registers that hold W_hh.

Limit: one SM's shared-memory bandwidth (W_hh passes through it every step) and the chain product, activations,
state; more batch tiles or directions only fill more SMs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import loop
from ..loop import Constants
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows
from ..tiles import first_state, load_bias, load_state, store_state


class Form(NamedTuple):
    """What the planner chose."""

    BLOCK_B: int
    BLOCK_H: int


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # G tiles [BLOCK_H, BLOCK_H]
    b_hh: Any  # G tiles [BLOCK_B, BLOCK_H]; None in backward


@triton.jit
def place(K: tl.constexpr, table_ptr, T, B, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """This program's rows and units."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    offs_b, offs_h = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_H)
    units = Units(offs_h, (first_row + offs_b < B)[:, None] & (offs_h < K.H)[None, :])
    return find_rows(K, table_ptr, tl.program_id(1).to(tl.int64), T, B, first_row, offs_b), units


@triton.jit
def load_weights(K: tl.constexpr, W_hh_ptr, recurrence, units, TRANSPOSED: tl.constexpr):
    """W_hh gate by gate, [BLOCK_H, BLOCK_H], as it is stored or TRANSPOSED."""
    tiles, offs = (), units.offs
    mask = (offs < K.H)[:, None] & (offs < K.H)[None, :]
    for g in tl.static_range(K.gates):
        block_ptr = W_hh_ptr + (recurrence * K.gates + g) * K.H * K.H
        if TRANSPOSED:
            at = offs[None, :] * K.H + offs[:, None]
        else:
            at = offs[:, None] * K.H + offs[None, :]
        tiles = tiles + (tl.load(block_ptr + at, mask=mask, other=0.0),)
    return tiles


@triton.jit
def receive(held, K: tl.constexpr, F: tl.constexpr, units, recurrence, state, step):
    """h, which no other program has a part of."""
    return state[0].to(held.W_hh[0].dtype)


@triton.jit
def gates(held, K: tl.constexpr, F: tl.constexpr, h):
    """W_hh h + b_hh, gate by gate."""
    rec = ()
    for g in tl.static_range(K.gates):
        rec = rec + (tl.dot(h, held.W_hh[g], acc=held.b_hh[g], input_precision=K.precision),)
    return rec


@triton.jit
def publish(held, K: tl.constexpr, F: tl.constexpr, units, state, step):
    """Nobody waits for h."""


@triton.jit
def announce(held, K: tl.constexpr, F: tl.constexpr, d_rec, back):
    """Nobody waits for d_gates: the product takes them as they are."""
    return d_rec


@triton.jit
def d_hidden(held, K: tl.constexpr, F: tl.constexpr, dh, d_rec, rows, step, back):
    """dh + W_hh^T d_gates."""
    for g in tl.static_range(K.gates):
        dh = tl.dot(d_rec[g].to(held.W_hh[0].dtype), held.W_hh[g], acc=dh, input_precision=K.precision)
    return dh


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(inputs, outputs, sequences, T, B, CELL: tl.constexpr, SIZES: tl.constexpr, FORM: tl.constexpr):
    K: tl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    TIER: tl.constexpr = loop.Tier(receive, gates, publish, True, None)
    rows, units = place(K, sequences.rows, T, B, FORM.BLOCK_B, FORM.BLOCK_H)
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    W_hh = load_weights(K, inputs.W_hh, rows.recurrence, units, TRANSPOSED=True)
    held = Held(W_hh, load_bias(K, inputs.b_hh, rows.recurrence, units))
    state = first_state(K, inputs.states, rows, units, resets)
    state = loop.forward(TIER, K, held, inputs.x_gates, outputs, rows, units, resets, state)
    store_state(K, outputs.finals, rows, units, state)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(read, grads, sequences, T, B, CELL: tl.constexpr, SIZES: tl.constexpr, FORM: tl.constexpr):
    K: tl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    TIER: tl.constexpr = loop.Tier(None, d_hidden, announce, True, None)
    rows, units = place(K, sequences.rows, T, B, FORM.BLOCK_B, FORM.BLOCK_H)
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    held = Held(load_weights(K, read.W_hh, rows.recurrence, units, TRANSPOSED=False), None)
    d_state = load_state(K, read.d_finals, rows, units)
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, grads.d_states, rows, units, d_state)
