"""Zoneout: at each step some units of h keep what they were, where Sizes say so.

    h' = h_prev + share (h_new - h_prev)

In training share is 0 with probability p, else 1, by a random number of its own for each step, sequence and unit; in
evaluation it is 1 - p everywhere. Random numbers are Philox's of a seed and a counter, which is a place: the unit among
those of all recurrences, and the slot. So backward, other tiles and a chunk of time alone find the same ones.

Source: Krueger et al. 2016 (arXiv:1606.01305); Salmon et al. 2011 for Philox.
"""

import triton
import triton.language as tl

from .activations import zeros_like
from .clips import with_first
from .rows import time_index


@triton.jit
def share(K: tl.constexpr, noise_ptr, rows, units, step):
    """How much of a step's h is new."""
    if noise_ptr is None:
        return zeros_like(units.mask) + (1.0 - K.zoneout)
    else:
        first = tl.load(noise_ptr + 1 + rows.direction)
        slots = first + time_index(rows, step) * rows.stride + rows.first + rows.slots
        unit = (rows.recurrence * K.H + units.offs).to(tl.int32)
        unit = tl.broadcast_to(unit[None, :], units.mask.shape)
        low = tl.broadcast_to((slots & 0xFFFFFFFF).to(tl.uint32)[:, None], units.mask.shape)
        high = tl.broadcast_to((slots >> 32).to(tl.uint32)[:, None], units.mask.shape)
        number, _1, _2, _3 = tl.philox(tl.load(noise_ptr), unit, low, high, high * 0)
        # Of 24 bits, which fp32 holds.
        return tl.where((number >> 8).to(tl.float32) * 2.0**-24 < K.zoneout, 0.0, 1.0)


@triton.jit
def zoned(K: tl.constexpr, noise_ptr, rows, units, step, after, before):
    """States after a step, of which h stays in part what it was."""
    if K.zoneout == 0:
        return after
    elif noise_ptr is None:
        h = before[0] + (1.0 - K.zoneout) * (after[0] - before[0])
        return with_first(h, after)
    else:
        new = share(K, noise_ptr, rows, units, step) > 0
        return with_first(tl.where(new, after[0], before[0]), after)


@triton.jit
def new_share(K: tl.constexpr, noise_ptr, rows, units, step, d_state):
    """Gradients of the states as the cell made them, and the share of h's that the step before has."""
    if K.zoneout == 0:
        return d_state, zeros_like(d_state[0])
    else:
        d_new = d_state[0] * share(K, noise_ptr, rows, units, step)
        return with_first(d_new, d_state), d_state[0] - d_new


@triton.jit
def as_made(K: tl.constexpr, noise_ptr, kept, before):
    """Kept states as the cell made them: in training h's gradient is zero where it is not, and nothing is to do."""
    if K.zoneout == 0 or K.zoneout == 1 or K.states > 1 or noise_ptr is not None:
        return kept
    else:
        return (before[0] + (kept[0] - before[0]) * (1.0 / (1.0 - K.zoneout)),)


@triton.jit
def with_stayed(K: tl.constexpr, stayed, d_before):
    """Gradients of states before a step, h's with the share that went past the cell."""
    if K.zoneout == 0:
        return d_before
    else:
        return with_first(d_before[0] + stayed, d_before)
