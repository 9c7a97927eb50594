"""The time loop of every tier, written once, and a program's tiles in memory.

    forward    receive h[t-1];   rec = W_hh h + b_hh;   state, saved = cell(x_gates[t], rec, state);   publish h
    backward   d_gates[t] = cell'(d_state + dy[t], saved[t]);   publish d_gates;   dh = W_hh^T d_gates[t] + rest

A tier says how h is received, multiplied and published, and nothing else. A cell says how many states it has, h first.

All tensors are contiguous, D directions side by side; slots are time and batch, [T, B], or ragged (rows.py):

    x_gates, d_x_gates   [slots, D, G, H]   y, dy, other states of all steps   [slots, D, H]   saved   [slots, D, S, H]
    W_hh                 [D, G, H, H]       first and last states              [D, B, H]       b_hh    [D, G, H]

Scalar offsets are int64; offsets inside a tile are int32, which a tile of a few rows cannot exceed, or int64 slots.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import zeros_like
from .rows import keep, live, load_restart, load_start, load_starts, slot, start_row, time_index


class Constants(NamedTuple):
    """What is known of a recurrence when a kernel is compiled, whatever its tier."""

    cell: Any  # the cell's step in this pass, of kernels/cells.py
    gates: Any  # G
    states: Any  # how many the cell has, h first
    saved: Any  # S, the tiles that forward saves beside the states
    activations: Any  # how they are computed, as kernels/activations.py names it
    own_lengths: Any  # whether rows have lengths of their own
    by_step: Any  # whether states start anew from what is given by step
    H: Any
    precision: Any  # of products of float32


class Tier(NamedTuple):
    """What a tier does between steps: its verbs are functions of what a program holds."""

    receive: Any  # forward: h of all units as the product takes it
    product: Any  # forward: W_hh h + b_hh, gate by gate; backward: W_hh^T d_gates
    publish: Any  # of the own units: forward h, backward d_gates
    early: Any  # whether the next step's loads go before the product, else behind what is published
    form: Any  # what the tier's planner chose


class Outputs(NamedTuple):
    """What forward writes at every step."""

    y: Any
    states: Any  # one pointer for each state beyond h, or None
    saved: Any


class Saved(NamedTuple):
    """What backward reads at every step, and the kept state before the first one."""

    dy: Any
    d_states: Any  # one pointer for each state beyond h, or None
    kept_0: Any
    kept: Any
    saved: Any


class Gradients(NamedTuple):
    """What backward writes at every step."""

    d_x_gates: Any
    d_rec_last: Any  # the last gate's recurrent share, where it differs from d_x_gates
    d_starts: Any  # one pointer for each state, of what states started anew from, or None


@triton.jit
def forward(TIER: tl.constexpr, K: tl.constexpr, held, x_gates_ptr, out, rows, units, resets, state):
    """Walk all of time from a state that every program has published; returns the last state."""
    x_next = load_step(K, x_gates_ptr, rows, units, K.gates, 0)
    for step in tl.range(0, rows.T, num_stages=1):
        x = as_fp32(x_next)
        h = TIER.receive(held, K, TIER.form, units, rows.direction, state, step)
        if TIER.early:
            x_next = load_step(K, x_gates_ptr, rows, units, K.gates, tl.minimum(step + 1, rows.T - 1))
        if resets.mask is not None:
            restart, starts = load_starts(resets, rows, units, step + 1, K)
        rec = TIER.product(held, K, TIER.form, h)
        after, saved = K.cell(x, rec, state, K.activations)
        if K.own_lengths:  # frozen rows keep their state
            after = keep(live(units.mask, rows, step, K.own_lengths), after, state)
        state = after
        if resets.mask is not None:
            state = keep(restart, starts, after)
        TIER.publish(held, K, TIER.form, units, state, step + 1)
        if not TIER.early:
            x_next = load_step(K, x_gates_ptr, rows, units, K.gates, tl.minimum(step + 1, rows.T - 1))
        store_step(K, out.y, rows, units, step, (after[0],))
        for n in tl.static_range(K.states - 1):
            if out.states[n] is not None:
                store_step(K, out.states[n], rows, units, step, (after[n + 1],))
        if out.saved is not None:
            store_step(K, out.saved, rows, units, step, saved)
    return state


@triton.jit
def backward(TIER: tl.constexpr, K: tl.constexpr, held, read, grads, rows, units, resets, d_state):
    """Walk all of time from its end; returns the gradient of the first state."""
    kept = as_fp32(load_step(K, read.kept, rows, units, 1, rows.T - 1))[0]
    following = load_saved(K, read, rows, units, resets, rows.T - 1)
    for back in tl.range(0, rows.T, num_stages=1):
        step, tiles = rows.T - 1 - back, following
        if TIER.early:
            following = load_saved(K, read, rows, units, resets, tl.maximum(step - 1, 0))
        d_x, d_rec, d_state, kept = differentiate(K, read, rows, units, resets, d_state, tiles, kept, step)
        if not TIER.early:  # gradients are what programs exchange
            store_gradients(K, grads, rows, units, step, d_x, d_rec)
        sent = TIER.publish(held, K, TIER.form, d_rec)
        if not TIER.early:
            following = load_saved(K, read, rows, units, resets, tl.maximum(step - 1, 0))
        dh = TIER.product(held, K, TIER.form, d_state[0], sent, rows, step, back)
        d_state = with_first(dh, d_state)
        if resets.mask is not None:
            d_state = cut(K, grads, rows, units, step, d_state, tiles[len(tiles) - 1])
        if TIER.early:
            store_gradients(K, grads, rows, units, step, d_x, d_rec)
    return d_state


@triton.jit
def with_first(first, tiles):
    """Tiles of which the first is another."""
    others = (first,)
    for n in tl.static_range(1, len(tiles)):
        others = others + (tiles[n],)
    return others


@triton.jit
def differentiate(K: tl.constexpr, read, rows, units, resets, d_state, tiles, kept, step):
    """The cell's step backward on what load_saved read: d_x, d_rec, d_state without the product's share, kept before.

    In frozen rows d_x and d_rec are zero, and d_state passes through.
    """
    S: tl.constexpr = K.saved
    before, saved = tiles[0].to(tl.float32), ()
    for n in tl.static_range(S):
        saved = saved + (tiles[n + 2].to(tl.float32),)
    given = (d_state[0] + tiles[1].to(tl.float32),)
    kept_before = before
    for n in tl.static_range(1, len(d_state)):
        if read.d_states[n - 1] is None:
            given = given + (d_state[n],)
        else:
            given = given + (d_state[n] + tiles[S + 1 + n].to(tl.float32),)
    if resets.mask is not None:
        before = tl.where(tiles[len(tiles) - 1], tiles[len(tiles) - 2], before)
    d_x, d_rec, d_before = K.cell(given, saved, kept, before, K.activations)
    if K.own_lengths:
        alive, zeros = live(units.mask, rows, step, K.own_lengths), (zeros_like(kept),) * K.gates
        d_x, d_rec = keep(alive, d_x, zeros), keep(alive, d_rec, zeros)
        d_before = keep(alive, d_before, given)
    return d_x, d_rec, d_before, kept_before


@triton.jit
def load_saved(K: tl.constexpr, read, rows, units, resets, step):
    """Tiles that backward reads at a step of forward's walk.

    The kept state one step earlier, dy, the saved tiles; gradients of other states, where given; with resets, what the
    kept state started from, and in which rows.
    """
    H: tl.constexpr = K.H
    if not K.own_lengths:
        before = slot(rows, tl.maximum(step - 1, 0))
        ptr = tl.where(step == 0, read.kept_0 + rows.first_state * H, read.kept + before * H)
        stride = tl.where(step == 0, H, rows.D * H)
        tiles = (tl.load(ptr + rows.slots[:, None] * stride + units.offs[None, :], mask=units.mask, other=0.0),)
    else:
        t = time_index(rows, step - 1)
        inside = read.kept + ((t * rows.stride + rows.first + rows.slots) * rows.D + rows.direction) * H
        ptr = tl.where((t >= 0) & (t < rows.lengths), inside, read.kept_0 + (rows.first_state + rows.states) * H)
        tiles = (tl.load(ptr[:, None] + units.offs[None, :], mask=units.mask, other=0.0),)
    if read.dy is not None:
        tiles = tiles + load_step(K, read.dy, rows, units, 1, step)
    else:
        tiles = tiles + (zeros_like(units.mask),)
    if K.saved > 0:
        tiles = tiles + load_step(K, read.saved, rows, units, K.saved, step)
    for n in tl.static_range(K.states - 1):
        if read.d_states[n] is not None:
            tiles = tiles + load_step(K, read.d_states[n], rows, units, 1, step)
    if resets.mask is not None:
        restart = load_restart(resets, rows, step)
        row = start_row(rows, step, K.by_step)
        tiles = tiles + (load_start(resets.starts[0], restart, row, units, H), restart)
    return tiles


@triton.jit
def store_gradients(K: tl.constexpr, grads, rows, units, step, d_x, d_rec):
    """d_x_gates of a step, and the last gate's d_rec where it differs."""
    store_step(K, grads.d_x_gates, rows, units, step, d_x)
    if grads.d_rec_last is not None:
        store_step(K, grads.d_rec_last, rows, units, step, (d_rec[K.gates - 1],))


@triton.jit
def cut(K: tl.constexpr, grads, rows, units, step, d_state, restart):
    """Send the gradient of states that started anew before a step to where it is kept, by step; zeros go on."""
    zeros, row = (), start_row(rows, step, True)
    for n in tl.static_range(len(d_state)):
        zeros = zeros + (zeros_like(d_state[n]),)
        if grads.d_starts[n] is not None:
            ptr = grads.d_starts[n] + row[:, None] * K.H + units.offs[None, :]
            tl.store(ptr, d_state[n].to(ptr.dtype.element_ty), mask=units.mask & restart)
    return keep(restart, zeros, d_state)


@triton.jit
def load_step(K: tl.constexpr, ptr, rows, units, N: tl.constexpr, step):
    """N tiles of a step from [slots, D, N, H]; zero where masked or frozen."""
    tiles, base = (), ptr + slot(rows, step) * N * K.H
    at, mask = rows.slots[:, None] * (rows.D * N * K.H), live(units.mask, rows, step, K.own_lengths)
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(base + at + n * K.H + units.offs[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_step(K: tl.constexpr, ptr, rows, units, step, tiles):
    """Store N tiles of a step to [slots, D, N, H], where rows are not frozen."""
    N: tl.constexpr = len(tiles)
    base = ptr + slot(rows, step) * N * K.H
    at, mask = rows.slots[:, None] * (rows.D * N * K.H), live(units.mask, rows, step, K.own_lengths)
    for n in tl.static_range(N):
        tl.store(base + at + n * K.H + units.offs[None, :], tiles[n].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def as_fp32(tiles):
    converted = ()
    for n in tl.static_range(len(tiles)):
        converted = converted + (tiles[n].to(tl.float32),)
    return converted


@triton.jit
def load_state(K: tl.constexpr, ptrs, rows, units):
    """States from [D, B, H], or their gradients, in fp32; zeros for an absent pointer."""
    state = ()
    for n in tl.static_range(K.states):
        if ptrs[n] is None:
            state = state + (zeros_like(units.mask),)
        else:
            at = rows.first_state * K.H + rows.states[:, None] * K.H + units.offs[None, :]
            state = state + (tl.load(ptrs[n] + at, mask=units.mask, other=0.0).to(tl.float32),)
    return state


@triton.jit
def first_state(K: tl.constexpr, ptrs, rows, units, resets):
    """The states before the first step: given, or started anew where a segment begins there."""
    state = load_state(K, ptrs, rows, units)
    if resets.mask is not None:
        restart, starts = load_starts(resets, rows, units, 0, K)
        state = keep(restart, starts, state)
    return state


@triton.jit
def store_state(K: tl.constexpr, ptrs, rows, units, state):
    """Store states, or their gradients, to [D, B, H]."""
    for n in tl.static_range(K.states):
        at = rows.first_state * K.H + rows.states[:, None] * K.H + units.offs[None, :]
        tl.store(ptrs[n] + at, state[n].to(ptrs[n].dtype.element_ty), mask=units.mask)


@triton.jit
def load_bias(K: tl.constexpr, b_hh_ptr, direction, units):
    """b_hh gate by gate in the shape of the products that it is added to."""
    tiles = ()
    for g in tl.static_range(K.gates):
        if b_hh_ptr is None:
            bias = zeros_like(units.offs)
        else:
            at = b_hh_ptr + (direction * K.gates + g) * K.H + units.offs
            bias = tl.load(at, mask=units.offs < K.H, other=0.0).to(tl.float32)
        tiles = tiles + (tl.broadcast_to(bias[None, :], units.mask.shape),)
    return tiles
