"""The time loop of every tier, written once.

    forward    receive h[t-1];   rec = W_hh h + b_hh;   state, saved = cell(x_gates[t], rec, state);   publish h
    backward   d_gates[t] = cell'(d_state + dy[t], saved[t]);   publish d_gates;   dh = W_hh^T d_gates[t] + rest

A tier says how h is received, multiplied and published, and nothing else. A cell says how many states it has, h first.
arguments.py has the layout of every tensor, tiles.py what reads and writes them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import zeros_like
from .clips import clip, clipped, clipped_before, where_not_clipped, with_first
from .rows import (
    keep,
    live,
    load_restart,
    load_start,
    load_starts,
    slot,
    slot_at_edge,
    start_row,
    time_index,
)
from .tiles import as_fp32, load_each, load_step, store_step
from .zoneout import as_made, new_share, with_stayed, zoned

AHEAD = tl.constexpr(4)  # steps: the way from device memory is as long as two of the shortest


class Constants(NamedTuple):
    """A cell's step in this pass, and Sizes.

    Kernels make it of what they are launched with: before Triton 3.8 a group of constants that is an argument itself
    cannot be handed on.
    """

    cell: Any
    gates: Any
    states: Any
    kept: Any
    saved: Any
    D: Any
    N: Any
    H: Any
    own_lengths: Any
    by_step: Any
    ragged: Any
    activations: Any
    precision: Any
    clip_gradient: Any
    clip_state: Any
    zoneout: Any


class Tier(NamedTuple):
    """What a tier does between steps: its verbs are functions of what a program holds."""

    receive: Any  # forward: h of all units as the product takes it
    product: Any  # forward: W_hh h + b_hh, gate by gate; backward: W_hh^T d_gates
    publish: Any  # of the own units: forward h, backward d_gates
    early: Any  # whether the next step's loads go before the product, else behind what is published
    form: Any  # what the tier's planner chose
    ahead: Any = None  # brings what a later step reads into L2; None where the way from memory is shorter than a step
    in_place: Any = False  # backward: whether programs exchange gradients where they are stored


class Tiles(NamedTuple):
    """What backward reads of a step."""

    before: Any  # the kept states one step earlier
    dy: Any
    saved: Any
    d_steps: Any  # gradients of the other states; none where they are not given
    starts: Any  # with resets: what the kept states started anew from, and in which rows; else none of both
    restart: Any


@triton.jit
def forward(TIER: tl.constexpr, K: tl.constexpr, held, x_gates_ptr, out, rows, units, resets, state):
    """Walk all of time from a state that was published; returns the last one."""
    x_next = load_step(K, x_gates_ptr, rows, units, K.gates, 0)
    for step in tl.range(0, rows.T, num_stages=1):
        x = as_fp32(x_next)
        h = TIER.receive(held, K, TIER.form, units, rows.recurrence, state, step)
        if TIER.early:
            x_next = load_step(K, x_gates_ptr, rows, units, K.gates, tl.minimum(step + 1, rows.T - 1))
        if resets.mask is not None:
            restart, starts = load_starts(resets, rows, units, step + 1, K)
        rec = TIER.product(held, K, TIER.form, h)
        after, saved = K.cell(x, rec, state, K.activations)
        after = zoned(K, resets.noise, rows, units, step, after, state)
        if K.own_lengths:  # frozen rows keep their state
            after = keep(live(units.mask, rows, step, K.own_lengths), after, state)
        state = after
        if resets.mask is not None:
            state = keep(restart, starts, after)
        state = clipped(K, state)
        TIER.publish(held, K, TIER.form, units, state, step + 1)
        if not TIER.early:
            x_next = load_step(K, x_gates_ptr, rows, units, K.gates, tl.minimum(step + 1, rows.T - 1))
        store_step(K, out.y, rows, units, step, (after[0],))
        if out.steps is not None:
            for n in tl.static_range(len(out.steps)):
                store_step(K, out.steps[n], rows, units, step, (after[n + 1],))
        if out.saved is not None:
            store_step(K, out.saved, rows, units, step, saved)
        if TIER.ahead is not None:
            TIER.ahead(held, K, tl.minimum(step + AHEAD, rows.T - 1))
    return state


@triton.jit
def backward(TIER: tl.constexpr, K: tl.constexpr, held, read, grads, rows, units, resets, d_state):
    """Walk all of time from its end; returns the gradient of the first state."""
    kept = as_fp32(load_each(K, read.kept, rows, units, K.kept, rows.T - 1))
    following = load_saved(K, read, rows, units, resets, rows.T - 1)
    for back in tl.range(0, rows.T, num_stages=1):
        step, tiles = rows.T - 1 - back, following
        if TIER.early:
            following = load_saved(K, read, rows, units, resets, tl.maximum(step - 1, 0))
        d_x, d_rec, d_state, kept = differentiate(K, read, rows, units, resets, d_state, tiles, kept, step)
        if TIER.in_place:
            store_gradients(K, grads, rows, units, step, d_x, d_rec)
        sent = TIER.publish(held, K, TIER.form, d_rec, back)
        if TIER.ahead is not None:
            TIER.ahead(held, K, tl.maximum(step - AHEAD, 0))
        if not TIER.early:
            following = load_saved(K, read, rows, units, resets, tl.maximum(step - 1, 0))
            if not TIER.in_place:
                store_gradients(K, grads, rows, units, step, d_x, d_rec)
        if K.clip_gradient < 0:
            dh = TIER.product(held, K, TIER.form, d_state[0], sent, rows, step, back)
        else:
            through = TIER.product(held, K, TIER.form, zeros_like(d_state[0]), sent, rows, step, back)
            dh = d_state[0] + clip(through, K.clip_gradient)
        d_state = with_first(dh, d_state)
        if resets.mask is not None:
            d_state = cut(K, grads, rows, units, step, d_state, tiles)
        if TIER.early:
            store_gradients(K, grads, rows, units, step, d_x, d_rec)
    return where_not_clipped(K, d_state, kept)


@triton.jit
def differentiate(K: tl.constexpr, read, rows, units, resets, d_state, tiles, kept, step):
    """The cell's step backward on what load_saved read: d_x, d_rec, d_state without the product's share, kept before.

    In frozen rows d_x and d_rec are zero, and d_state passes through.
    """
    before, saved = as_fp32(tiles.before), as_fp32(tiles.saved)
    if K.clip_state >= 0:
        alive = live(units.mask, rows, step, K.own_lengths)
        d_state = keep(alive, where_not_clipped(K, d_state, kept), d_state)
    given = (d_state[0] + tiles.dy.to(tl.float32),)
    for n in tl.static_range(1, K.states):
        if read.d_steps is None:
            given = given + (d_state[n],)
        else:
            given = given + (d_state[n] + tiles.d_steps[n - 1].to(tl.float32),)
    kept_before = before
    if resets.mask is not None:
        before = keep(tiles.restart, tiles.starts, before)
    before = clipped_before(K, before)
    d_made, stayed = new_share(K, resets.noise, rows, units, step, given)
    made = as_made(K, resets.noise, kept, before)
    if K.kept == 1:
        d_x, d_rec, d_before = K.cell(d_made, saved, made[0], before[0], K.activations)
    else:
        d_x, d_rec, d_before = K.cell(d_made, saved, made, before, K.activations)
    d_before = with_stayed(K, stayed, d_before)
    if K.own_lengths:
        alive, zeros = live(units.mask, rows, step, K.own_lengths), (zeros_like(given[0]),) * K.gates
        d_x, d_rec = keep(alive, d_x, zeros), keep(alive, d_rec, zeros)
        d_before = keep(alive, d_before, given)
    return d_x, d_rec, d_before, kept_before


@triton.jit
def load_saved(K: tl.constexpr, read, rows, units, resets, step):
    """The Tiles that backward reads at a step of forward's walk."""
    before = ()
    if not K.own_lengths:
        inside = slot(rows, tl.maximum(step - 1, 0))
        stride = tl.where(step == 0, K.N, rows.count) * K.H
        for n in tl.static_range(K.kept):
            ptr, mask = read.kept[n] + inside * K.H, units.mask
            if read.before is None:
                mask = tl.where(step > 0, mask, False)
            else:
                ptr = tl.where(step == 0, read.before[n] + rows.first_state * K.H, ptr)
            at = ptr + rows.slots[:, None] * stride + units.offs[None, :]
            before = before + (tl.load(at, mask=mask, other=0.0),)
    else:
        t = time_index(rows, step - 1)
        exists = (t >= 0) & (t < rows.lengths)
        inside = (t * rows.stride + rows.first + rows.slots) * rows.count + rows.recurrence
        outside = rows.first_state + rows.states * K.N
        for n in tl.static_range(K.kept):
            ptr, mask = read.kept[n] + inside * K.H, units.mask
            if read.before is None:
                mask = tl.where(exists[:, None], mask, False)
            else:
                ptr = tl.where(exists, ptr, read.before[n] + outside * K.H)
            before = before + (tl.load(ptr[:, None] + units.offs[None, :], mask=mask, other=0.0),)
    if read.dy is None:
        dy = zeros_like(units.mask)
    else:
        dy = load_step(K, read.dy, rows, units, 1, step)[0]
    saved, d_steps = (), ()
    if K.saved > 0:
        saved = load_step(K, read.tiles, rows, units, K.saved, step)
    if read.d_steps is not None:
        d_steps = load_each(K, read.d_steps, rows, units, K.states - 1, step)
    starts, restart = (), ()
    if resets.mask is not None:
        restart = load_restart(resets, rows, step)
        row = start_row(rows, step, K)
        for n in tl.static_range(K.kept):
            starts = starts + (load_start(resets.starts, n, restart, row, units, K.H),)
    return Tiles(before, dy, saved, d_steps, starts, restart)


@triton.jit
def store_gradients(K: tl.constexpr, grads, rows, units, step, d_x, d_rec):
    """d_x_gates of a step, and the last gate's d_rec where it differs."""
    store_step(K, grads.d_x_gates, rows, units, step, d_x)
    if grads.d_rec_last is not None:
        store_step(K, grads.d_rec_last, rows, units, step, (d_rec[K.gates - 1],))


@triton.jit
def cut(K: tl.constexpr, grads, rows, units, step, d_state, tiles):
    """Send the gradient of states that started anew before a step to where it is kept, by step; zeros go on."""
    zeros, row, restart = (), slot_at_edge(rows, step), tiles.restart
    d_starts = where_not_clipped(K, d_state, tiles.starts)
    for n in tl.static_range(K.states):
        zeros = zeros + (zeros_like(d_state[n]),)
        if grads.d_starts is not None:
            ptr = grads.d_starts[n] + row[:, None] * K.H + units.offs[None, :]
            tl.store(ptr, d_starts[n].to(ptr.dtype.element_ty), mask=units.mask & restart)
    return keep(restart, zeros, d_state)
