"""A program's tiles in memory: of a step, of its states, and the bias. arguments.py has the layout of every tensor.

Scalar offsets are int64; offsets inside a tile are int32, which a tile of a few rows cannot exceed, or int64 slots.
"""

import triton
import triton.language as tl

from .activations import zeros_like
from .clips import clipped
from .rows import keep, live, load_starts, slot


@triton.jit
def load_step(K: tl.constexpr, ptr, rows, units, N: tl.constexpr, step):
    """N tiles of a step from [slots, R, N, H]; zero where masked or frozen."""
    tiles, base = (), ptr + slot(rows, step) * N * K.H
    at, mask = rows.slots[:, None] * (rows.count * N * K.H), live(units.mask, rows, step, K.own_lengths)
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(base + at + n * K.H + units.offs[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_each(K: tl.constexpr, ptrs, rows, units, N: tl.constexpr, step):
    """A tile of a step from each of N tensors [slots, R, H]."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + load_step(K, ptrs[n], rows, units, 1, step)
    return tiles


@triton.jit
def store_step(K: tl.constexpr, ptr, rows, units, step, tiles):
    """Store N tiles of a step to [slots, R, N, H], where rows are not frozen."""
    N: tl.constexpr = len(tiles)
    base = ptr + slot(rows, step) * N * K.H
    at, mask = rows.slots[:, None] * (rows.count * N * K.H), live(units.mask, rows, step, K.own_lengths)
    for n in tl.static_range(N):
        tl.store(base + at + n * K.H + units.offs[None, :], tiles[n].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def as_fp32(tiles):
    converted = ()
    for n in tl.static_range(len(tiles)):
        converted = converted + (tiles[n].to(tl.float32),)
    return converted


@triton.jit
def state_offsets(K: tl.constexpr, rows, units):
    """Where a program's rows and units of a state are in [D, B, N, H]."""
    return rows.first_state * K.H + rows.states[:, None] * (K.N * K.H) + units.offs[None, :]


@triton.jit
def load_state(K: tl.constexpr, ptrs, rows, units):
    """States, or their gradients, in fp32; zeros where none are given."""
    state = ()
    for n in tl.static_range(K.states):
        if ptrs is None:
            state = state + (zeros_like(units.mask),)
        else:
            tile = tl.load(ptrs[n] + state_offsets(K, rows, units), mask=units.mask, other=0.0)
            state = state + (tile.to(tl.float32),)
    return state


@triton.jit
def first_state(K: tl.constexpr, ptrs, rows, units, resets):
    """The states before the first step: given, or started anew where a segment begins there."""
    state = load_state(K, ptrs, rows, units)
    if resets.mask is not None:
        restart, starts = load_starts(resets, rows, units, 0, K)
        state = keep(restart, starts, state)
    return clipped(K, state)


@triton.jit
def store_state(K: tl.constexpr, ptrs, rows, units, state):
    """Store states, or their gradients."""
    if ptrs is not None:
        for n in tl.static_range(K.states):
            at = ptrs[n] + state_offsets(K, rows, units)
            tl.store(at, state[n].to(at.dtype.element_ty), mask=units.mask)


@triton.jit
def load_bias(K: tl.constexpr, b_hh_ptr, recurrence, units):
    """b_hh gate by gate in the shape of the products that it is added to."""
    tiles = ()
    for g in tl.static_range(K.gates):
        if b_hh_ptr is None:
            bias = zeros_like(units.offs)
        else:
            at = b_hh_ptr + (recurrence * K.gates + g) * K.H + units.offs
            bias = tl.load(at, mask=units.offs < K.H, other=0.0).to(tl.float32)
        tiles = tiles + (tl.broadcast_to(bias[None, :], units.mask.shape),)
    return tiles
