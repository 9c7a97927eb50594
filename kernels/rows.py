"""Which rows a program computes, and where each of them stands in memory and in time; states that start anew.

A *slot* is the place of one time step of one sequence in tensors [slots, R, ...]: t * B + b where they are [T, B, ...],
the start of sequence b, plus t, where they are ragged. All sequences have the same T steps, and batch tiles are B in
their order, unless there is a table [3, B]: it names, longest first, each row's sequence, its first slot and its
length. A tile walks the time of its longest row, the first. A row past its own end is frozen: it keeps its state, so
that direction 1 begins at each row's own end.

A reset [slots] says that a segment begins at a slot. Segments do not see each other: at the edge between two of them,
in either direction, a state starts anew, as zeros or as given, by row [D, B, N, H] or by step [slots, R, H].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import zeros_like


class Rows(NamedTuple):
    """A program's rows of the batch, in one recurrence."""

    direction: Any  # 1 walks time from its end
    recurrence: Any  # its number: direction * N + head
    count: Any  # R
    T: Any  # steps of the longest row
    stride: Any  # slots from one step to the next
    first: Any  # slot of the tile's first row at t = 0
    slots: Any  # [BLOCK_B], counted from there
    lengths: Any  # [BLOCK_B]
    first_state: Any  # the row of [D, B, N, H] that states count from
    states: Any  # [BLOCK_B], N rows each, counted from there


class Units(NamedTuple):
    """The hidden units that a program computes, and the mask of its tile [rows, units]."""

    offs: Any
    mask: Any


class Resets(NamedTuple):
    """Where states start anew, a mask [slots] or None, and from what: a pointer a state, or None for zeros."""

    mask: Any
    starts: Any
    noise: Any  # of zoneout in training, else None


@triton.jit
def find_rows(K: tl.constexpr, table_ptr, recurrence, T, B, first_row, offs_b):
    """The rows of a batch tile from its first one on; scalars are int64."""
    rows, direction, head = tl.cast(B, tl.int64), recurrence, recurrence * 0
    if K.N > 1:
        direction, head = recurrence // K.N, recurrence % K.N
    count: tl.constexpr = K.D * K.N
    if not K.own_lengths:
        first_state = (direction * rows + first_row) * K.N + head
        lengths = tl.where(first_row + offs_b < B, T, 0)
        return Rows(direction, recurrence, count, T, rows, first_row, offs_b, lengths, first_state, offs_b)
    else:
        exists = first_row + offs_b < B
        sequence = tl.load(table_ptr + first_row + offs_b, mask=exists, other=0)
        start = tl.load(table_ptr + rows + first_row + offs_b, mask=exists, other=0)
        length = tl.load(table_ptr + 2 * rows + first_row + offs_b, mask=exists, other=0)
        # One step, frozen, where all are empty.
        longest = tl.maximum(tl.load(table_ptr + 2 * rows + first_row), 1).to(tl.int32)
        stride = tl.cast(1, tl.int64) if K.ragged else rows
        first_state = direction * rows * K.N + head
        return Rows(direction, recurrence, count, longest, stride, direction * 0, start, length, first_state, sequence)


@triton.jit
def time_index(rows, step):
    """The t that a program of this direction visits at its step."""
    return tl.where(rows.direction == 0, step, rows.T - 1 - step)


@triton.jit
def slot(rows, step):
    """The tile's first row in [slots, R] at a step."""
    return (time_index(rows, step) * rows.stride + rows.first) * rows.count + rows.recurrence


@triton.jit
def live(mask, rows, step, OWN_LENGTHS: tl.constexpr):
    """A mask of rows, or of a tile, without the rows that are frozen at a step."""
    if not OWN_LENGTHS:
        return mask
    else:
        alive = time_index(rows, step) < rows.lengths
        if len(mask.shape) == 1:
            return mask & alive
        else:
            return mask & alive[:, None]


@triton.jit
def keep(condition, new, old):
    """Tiles: new ones where the condition holds."""
    tiles = ()
    for n in tl.static_range(len(old)):
        tiles = tiles + (tl.where(condition, new[n], old[n]),)
    return tiles


@triton.jit
def _edge(rows, step):
    """The t at which the later segment would begin, if one ended between the step before and this one; or T."""
    return tl.where(step == rows.T, rows.T, tl.where(rows.direction == 0, step, rows.T - step))


@triton.jit
def load_restart(resets, rows, step):
    """[BLOCK_B, 1]: the rows whose state starts anew before a step."""
    edge = _edge(rows, step)
    at = edge * rows.stride + rows.first + rows.slots
    return (tl.load(resets.mask + at, mask=edge < rows.lengths, other=0) != 0)[:, None]


@triton.jit
def slot_at_edge(rows, step):
    """Each row's place in [slots, R] at the first step of the segment that begins before a step."""
    return (_edge(rows, step) * rows.stride + rows.first + rows.slots) * rows.count + rows.recurrence


@triton.jit
def start_row(rows, step, K: tl.constexpr):
    """Each row's tile in what states start from: by step [slots, R, H], else [D, B, N, H]."""
    if K.by_step:
        return slot_at_edge(rows, step)
    else:
        return rows.first_state + rows.states * K.N


@triton.jit
def load_start(starts, n: tl.constexpr, restart, row, units, H: tl.constexpr):
    """What rows start state n anew from, in fp32; zeros where nothing is given, and in other rows."""
    if starts is None:
        return zeros_like(units.mask)
    else:
        at = row[:, None] * H + units.offs[None, :]
        return tl.load(starts[n] + at, mask=units.mask & restart, other=0.0).to(tl.float32)


@triton.jit
def load_starts(resets, rows, units, step, K: tl.constexpr):
    """The rows that start anew before a step, and the states that they start from."""
    restart, row = load_restart(resets, rows, step), start_row(rows, step, K)
    states = ()
    for n in tl.static_range(K.states):
        states = states + (load_start(resets.starts, n, restart, row, units, K.H),)
    return restart, states
