"""The resident tier: one program holds all of W_hh for one batch tile and one direction, and walks all of time.

    forward    for t in time:    rec = W_hh h + b_hh;  (h, c), saved = cell(x_gates[t], rec, (h, c));  y[t] = h
    backward   for t reversed:   dh += dy[t];  d_gates[t] = cell'(dh, dc, saved[t]);  dh = W_hh^T d_gates[t] + rest

Source: section 3 of Appleyard et al. 2016 (arXiv:1604.01946) for the split of the input product from the recurrent
one; Diamos et al. 2016 (persistent RNNs) for weights that stay on chip.

The layout of every tensor is in ../loop.py, sequences of their own lengths and resets in ../rows.py.

Grid: (batch tiles, D). W_hh is read before the loop, once; x_gates (backward: everything a step reads) of the next
step is loaded before this step's product, so that its latency hides behind it. The state is fp32 from step to step
and is rounded where it is stored or multiplied. Forward saves the cell's saved tiles and c of every step, and only
if saved_ptr is given (or c_ptr: the RNN needs nothing but y). dW_hh and db_hh are left to one product and one sum
after the loop: accumulators for them would take the registers that hold W_hh.

Limit: one SM's shared-memory bandwidth (W_hh passes through it every step) and the chain product, activations,
state; more batch tiles or directions only fill more SMs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import loop
from ..loop import Constants, Gradients, Outputs, Saved, first_state, load_bias, load_state, store_state
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # G tiles [BLOCK_H, BLOCK_H]
    b_hh: Any  # G tiles [BLOCK_B, BLOCK_H]; None in backward


@triton.jit
def place(rows_ptr, T, B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, RAGGED: tl.constexpr):
    """This program's rows and units."""
    direction, D = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    offs_b, offs_h = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_H)
    units = Units(offs_h, (first_row + offs_b < B)[:, None] & (offs_h < H)[None, :])
    return find_rows(rows_ptr, direction, D, T, B, first_row, offs_b, RAGGED), units


@triton.jit
def load_weights(K: tl.constexpr, W_hh_ptr, direction, units, TRANSPOSED: tl.constexpr):
    """W_hh gate by gate, [BLOCK_H, BLOCK_H], as it is stored or TRANSPOSED."""
    tiles, offs = (), units.offs
    mask = (offs < K.H)[:, None] & (offs < K.H)[None, :]
    for g in tl.static_range(K.gates):
        block_ptr = W_hh_ptr + (direction * K.gates + g) * K.H * K.H
        if TRANSPOSED:
            at = offs[None, :] * K.H + offs[:, None]
        else:
            at = offs[:, None] * K.H + offs[None, :]
        tiles = tiles + (tl.load(block_ptr + at, mask=mask, other=0.0),)
    return tiles


@triton.jit
def receive(held, K: tl.constexpr, F: tl.constexpr, units, direction, state, step):
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
def announce(held, K: tl.constexpr, F: tl.constexpr, d_rec):
    """Nobody waits for d_gates: the product takes them as they are."""
    return d_rec


@triton.jit
def d_hidden(held, K: tl.constexpr, F: tl.constexpr, dh, d_rec, rows, step, back):
    """dh + W_hh^T d_gates."""
    for g in tl.static_range(K.gates):
        dh = tl.dot(d_rec[g].to(held.W_hh[0].dtype), held.W_hh[g], acc=dh, input_precision=K.precision)
    return dh


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr, rows_ptr, reset_ptr, reset_h_ptr, reset_c_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BY_STEP: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = Constants(CELL, G, 1 + HAS_C, S, ACTIVATIONS, rows_ptr is not None, BY_STEP, H, PRECISION)
    rows, units = place(rows_ptr, T, B, H, BLOCK_B, BLOCK_H, RAGGED)
    if HAS_C:
        first, last, starts, cells = (h_0_ptr, c_0_ptr), (h_n_ptr, c_n_ptr), (reset_h_ptr, reset_c_ptr), (c_ptr,)
    else:
        first, last, starts, cells = (h_0_ptr,), (h_n_ptr,), (reset_h_ptr,), ()
    resets = Resets(reset_ptr, starts)
    W_hh = load_weights(K, W_hh_ptr, rows.direction, units, TRANSPOSED=True)
    held = Held(W_hh, load_bias(K, b_hh_ptr, rows.direction, units))
    state = first_state(K, first, rows, units, resets)
    out = Outputs(y_ptr, cells, saved_ptr)
    TIER: tl.constexpr = loop.Tier(receive, gates, publish, True, None)
    state = loop.forward(TIER, K, held, x_gates_ptr, out, rows, units, resets, state)
    store_state(K, last, rows, units, state)


@triton.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, dc_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr, d_reset_h_ptr, d_reset_c_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BY_STEP: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = Constants(CELL, G, 1 + HAS_C, S, ACTIVATIONS, rows_ptr is not None, BY_STEP, H, PRECISION)
    rows, units = place(rows_ptr, T, B, H, BLOCK_B, BLOCK_H, RAGGED)
    if HAS_C:
        last, first, starts = (dh_n_ptr, dc_n_ptr), (dh_0_ptr, dc_0_ptr), (d_reset_h_ptr, d_reset_c_ptr)
        cells = (dc_ptr,)
    else:
        last, first, starts, cells = (dh_n_ptr,), (dh_0_ptr,), (d_reset_h_ptr,), ()
    resets = Resets(reset_ptr, (reset_kept_ptr,))
    held = Held(load_weights(K, W_hh_ptr, rows.direction, units, TRANSPOSED=False), None)
    read = Saved(dy_ptr, cells, kept_0_ptr, kept_ptr, saved_ptr)
    grads = Gradients(d_x_gates_ptr, d_rec_last_ptr, starts)
    d_state = load_state(K, last, rows, units)
    TIER: tl.constexpr = loop.Tier(None, d_hidden, announce, True, None)
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, first, rows, units, d_state)
