"""Where a program's rows stand in memory and time: sequences of one length or of their own, and states that start anew.

A *slot* is the place of one time step of one sequence in tensors [slots, D, ...]: t * B + b where they are [T, B, ...],
the start of sequence b, plus t, where they are ragged. All sequences have the same T steps, and batch tiles are B in
their order, unless there is a table: rows [3, B] then names, longest first, each row's sequence, its first slot and its
length. A tile walks the time of its longest row, the first; a row past its own end is frozen: it keeps its state, which
makes direction 1 begin at each row's own end.

reset [slots] says that a segment begins at a slot. Segments do not see each other: a state starts anew at the edge
between two of them, in either direction, as zeros or as given, by row [D, B, H] or by step [slots, D, H].

`where`, which helpers hand on, is (direction, T, slots from a step to the next, first slot, slots and lengths by row).
"""

import triton
import triton.language as tl

from ..activations import zeros_like


@triton.jit
def find_rows(rows_ptr, direction, T, B, first_row, offs_b, RAGGED: tl.constexpr):
    """where; and for states [D, B, H] the first row, and rows from it on."""
    rows = tl.cast(B, tl.int64)
    if rows_ptr is None:
        return (direction, T, rows, first_row, offs_b, offs_b), direction * rows + first_row, offs_b
    else:
        exists = first_row + offs_b < B
        sequence = tl.load(rows_ptr + first_row + offs_b, mask=exists, other=0)
        start = tl.load(rows_ptr + rows + first_row + offs_b, mask=exists, other=0)
        length = tl.load(rows_ptr + 2 * rows + first_row + offs_b, mask=exists, other=0)
        # One step, frozen, where all are empty.
        longest = tl.maximum(tl.load(rows_ptr + 2 * rows + first_row), 1).to(tl.int32)
        stride = tl.cast(1, tl.int64) if RAGGED else rows
        return (direction, longest, stride, direction * 0, start, length), direction * rows, sequence


@triton.jit
def time_index(step, T, direction):
    """The t that a program of this direction visits at its step."""
    return tl.where(direction == 0, step, T - 1 - step)


@triton.jit
def slot(where, step, D):
    """Of the tile's first row in [slots, D]."""
    direction, T, stride, first, _, _ = where
    return (time_index(step, T, direction) * stride + first) * D + direction


@triton.jit
def within(mask, rows_ptr, where, step):
    """Of a mask of rows, or of a tile, those rows that are not frozen at a step."""
    if rows_ptr is None:
        return mask
    else:
        direction, T, _, _, _, length = where
        live = time_index(step, T, direction) < length
        if len(mask.shape) == 1:
            return mask & live
        else:
            return mask & live[:, None]


@triton.jit
def keep(condition, new, old, N: tl.constexpr):
    """N tiles, new ones where the condition holds."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (tl.where(condition, new[n], old[n]),)
    return tiles


@triton.jit
def _edge(where, step):
    """The t at which the later segment would begin, if one ended between the step before and this one; or T."""
    direction, T, _, _, _, _ = where
    return tl.where(step == T, T, tl.where(direction == 0, step, T - step))


@triton.jit
def load_restart(reset_ptr, where, step):
    """[BLOCK_B, 1]: the rows whose state starts anew before a step."""
    _, _, stride, first, offs_b, length = where
    edge = _edge(where, step)
    return (tl.load(reset_ptr + edge * stride + first + offs_b, mask=edge < length, other=0) != 0)[:, None]


@triton.jit
def start_row(where, step, D, own_row, offs_state, BY_STEP: tl.constexpr):
    """Of each row's tile in what states start from: [slots, D, H] BY_STEP, else [D, B, H]."""
    direction, _, stride, first, offs_b, _ = where
    if BY_STEP:
        return (_edge(where, step) * stride + first + offs_b) * D + direction
    else:
        return own_row + offs_state


@triton.jit
def load_start(ptr, restart, row, H: tl.constexpr, offs_h, mask):
    """What rows start anew from, in fp32; zeros for an absent pointer, and in other rows."""
    if ptr is None:
        return zeros_like(mask)
    else:
        return tl.load(ptr + row[:, None] * H + offs_h[None, :], mask=mask & restart, other=0.0).to(tl.float32)


@triton.jit
def load_starts(
    reset_ptr, h_ptr, c_ptr, where, step, D, own_row, offs_state, BY_STEP: tl.constexpr, HAS_C: tl.constexpr,
    H: tl.constexpr, offs_h, mask,
):  # fmt: skip
    """Which rows start anew before a step, and the (h,) or (h, c) that they start from."""
    restart, row = load_restart(reset_ptr, where, step), start_row(where, step, D, own_row, offs_state, BY_STEP)
    state = (load_start(h_ptr, restart, row, H, offs_h, mask),)
    if HAS_C:
        state = state + (load_start(c_ptr, restart, row, H, offs_h, mask),)
    return restart, state


@triton.jit
def cut(
    d_state, restart, d_reset_h_ptr, d_reset_c_ptr, where, step, D, HAS_C: tl.constexpr, H: tl.constexpr, offs_h, mask
):
    """Send the gradient of states that started anew before a step to where it is kept, by step; zeros go on."""
    zeros = ()
    for n in tl.static_range(1 + HAS_C):
        zeros = zeros + (zeros_like(d_state[n]),)
    if d_reset_h_ptr is not None:
        row = start_row(where, step, D, 0, 0, True)
        offsets = row[:, None] * H + offs_h[None, :]
        tl.store(d_reset_h_ptr + offsets, d_state[0].to(d_reset_h_ptr.dtype.element_ty), mask=mask & restart)
        if HAS_C:
            tl.store(d_reset_c_ptr + offsets, d_state[1].to(d_reset_c_ptr.dtype.element_ty), mask=mask & restart)
    return keep(restart, zeros, d_state, 1 + HAS_C)
