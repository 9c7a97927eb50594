"""How programs of the cooperative tiers hand on the state through L2: before the barrier's arrival, behind its wait.

Forward exchanges h in two buffers that alternate, [2, R, B, H], rows as in batch tiles: not as y, since where a
sequence ends or starts anew another state goes on. Backward exchanges d_gates, its output, each slot of which is
written once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .barrier import COUNTER_STRIDE, arrive, wait


class Group(NamedTuple):
    """The programs that exchange a state, as one of them sees them."""

    counter: Any  # that they meet at
    programs: Any  # how many they are
    exchanged: Any  # forward: h of this batch tile, in the first buffer; backward: d_x_gates
    last: Any  # backward: the last gate's d_rec, where it differs; else None
    buffer: Any  # numbers from the first buffer to the second
    rows: Any  # [BLOCK_B] of the batch tile


@triton.jit
def first_row_of(first_tile, BLOCK_B: tl.constexpr):
    """The first row of this program's batch tile, of a grid that begins at the tile pointed to."""
    tile = tl.program_id(1).to(tl.int64)
    if first_tile is not None:
        tile += tl.load(first_tile)
    return tile * BLOCK_B


@triton.jit
def counter_of(counters_ptr, rows):
    """The counter of this program's group: one batch tile in one recurrence."""
    return counters_ptr + (tl.program_id(1) * rows.count + tl.program_id(2)) * COUNTER_STRIDE


@triton.jit
def meet(group, times, F: tl.constexpr):
    """Wait until all programs of the group have arrived so many times."""
    wait(group.counter, times * group.programs, F.SPIN_ON_LOAD)


@triton.jit
def receive(held, K: tl.constexpr, F: tl.constexpr, units, recurrence, state, step):
    """The buffer that h of all units is in, when it is."""
    group = held.group
    meet(group, step + 1, F)
    return group.exchanged + (step % 2) * group.buffer


@triton.jit
def publish(held, K: tl.constexpr, F: tl.constexpr, units, state, step):
    """Hand on h of the own units."""
    group = held.group
    at = group.rows[:, None] * K.H + units.offs[None, :]
    h = state[0].to(group.exchanged.dtype.element_ty)
    tl.store(group.exchanged + (step % 2) * group.buffer + at, h, mask=units.mask)
    arrive(group.counter)


@triton.jit
def announce(held, K: tl.constexpr, F: tl.constexpr, d_rec):
    """Hand on d_gates, which are where they are exchanged."""
    arrive(held.group.counter)
    return 0


@triton.jit
def load_exchanged(ptr, row_stride, offs_k, H: tl.constexpr, offs_b, row_mask):
    """A piece [WARPS, BLOCK_B, K] of what the group's programs wrote: past L1, which may hold older values."""
    mask = row_mask[None, :, None] & (offs_k < H)[:, None, :]
    tile_ptr = ptr + offs_b[None, :, None] * row_stride + offs_k[:, None, :]
    return tl.load(tile_ptr, mask=mask, other=0.0, cache_modifier=".cg")
