"""What the time loops of all tiers share: a program's tiles in memory, and a step of the cell beside the product.

All tensors are contiguous, D directions side by side; slots are time and batch, [T, B], or ragged (sequences.py):

    x_gates, d_x_gates   [slots, D, G, H]   y, dy, c (all steps), dc   [slots, D, H]   saved   [slots, D, S, H]
    W_hh                 [D, G, H, H]       h_0, c_0, h_n, c_n         [D, B, H]       b_hh    [D, G, H]

Scalar offsets are int64; offsets inside a tile are int32, which a tile of a few rows cannot exceed, or int64 slots.
"""

import triton
import triton.language as tl

from ..activations import zeros_like
from .sequences import keep, load_restart, load_start, slot, start_row, time_index, within


@triton.jit
def place(B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """This program's direction (of D), its first row (of B), and offsets and mask of its tile; scalars are int64."""
    direction = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    offs_b = tl.arange(0, BLOCK_B)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (first_row + offs_b < B)[:, None] & (offs_h < H)[None, :]
    return direction, tl.num_programs(1), first_row, offs_b, offs_h, mask


@triton.jit
def load_tiles(ptr, row_stride, N: tl.constexpr, H: tl.constexpr, offs_b, offs_h, mask):
    """N tiles [BLOCK_B, BLOCK_H], H apart, as a tuple; zero where masked."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + offs_b[:, None] * row_stride + n * H + offs_h[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_tiles(ptr, row_stride, tiles, N: tl.constexpr, H: tl.constexpr, offs_b, offs_h, mask):
    for n in tl.static_range(N):
        tile = tiles[n].to(ptr.dtype.element_ty)
        tl.store(ptr + offs_b[:, None] * row_stride + n * H + offs_h[None, :], tile, mask=mask)


@triton.jit
def as_fp32(tiles, N: tl.constexpr):
    converted = ()
    for n in tl.static_range(N):
        converted = converted + (tiles[n].to(tl.float32),)
    return converted


@triton.jit
def load_state(h_ptr, c_ptr, own_row, HAS_C: tl.constexpr, H: tl.constexpr, offs_state, offs_h, mask):
    """(h,) or (h, c) in fp32 from [D, B, H], or their gradients; zeros for an absent pointer."""
    if h_ptr is None:
        state = (zeros_like(mask),)
    else:
        state = as_fp32(load_tiles(h_ptr + own_row * H, H, 1, H, offs_state, offs_h, mask), 1)
    if HAS_C:
        if c_ptr is None:
            state = state + (zeros_like(mask),)
        else:
            state = state + as_fp32(load_tiles(c_ptr + own_row * H, H, 1, H, offs_state, offs_h, mask), 1)
    return state


@triton.jit
def store_state(h_ptr, c_ptr, own_row, state, HAS_C: tl.constexpr, H: tl.constexpr, offs_state, offs_h, mask):
    store_tiles(h_ptr + own_row * H, H, state, 1, H, offs_state, offs_h, mask)
    if HAS_C:
        store_tiles(c_ptr + own_row * H, H, (state[1],), 1, H, offs_state, offs_h, mask)


@triton.jit
def load_bias(b_hh_ptr, direction, G: tl.constexpr, H: tl.constexpr, offs_h, mask):
    """b_hh gate by gate in the shape of the products that start from it: adding it costs nothing there."""
    tiles = ()
    for g in tl.static_range(G):
        if b_hh_ptr is None:
            bias = zeros_like(offs_h)
        else:
            bias = tl.load(b_hh_ptr + (direction * G + g) * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
        tiles = tiles + (tl.broadcast_to(bias[None, :], mask.shape),)
    return tiles


@triton.jit
def load_inputs(x_gates_ptr, rows_ptr, where, step, D, G: tl.constexpr, H: tl.constexpr, offs_h, mask):
    """x_gates of a step, gate by gate."""
    ptr = x_gates_ptr + slot(where, step, D) * G * H
    return load_tiles(ptr, D * G * H, G, H, where[4], offs_h, within(mask, rows_ptr, where, step))


@triton.jit
def step_forward(
    CELL: tl.constexpr, x, rec, state, live, rows_ptr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
):  # fmt: skip
    """The cell's step; frozen rows keep their state."""
    after, saved = CELL(x, rec, state, ACTIVATIONS)
    if rows_ptr is not None:
        after = keep(live, after, state, 1 + HAS_C)
    return after, saved


@triton.jit
def load_step(
    dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
    where, step, D, own_row, offs_state, S: tl.constexpr, H: tl.constexpr, BY_STEP: tl.constexpr, offs_h, mask,
):  # fmt: skip
    """What backward reads at a step of forward's walk: the kept state one step earlier, dy, the saved tiles; dc, if it
    is given; with resets, what the state started from, and in which rows."""
    direction, T, stride, first, offs_b, length = where
    live = within(mask, rows_ptr, where, step)
    now = slot(where, step, D)
    if rows_ptr is None:
        before = slot(where, tl.maximum(step - 1, 0), D)
        kept_prev_ptr = tl.where(step == 0, kept_0_ptr + own_row * H, kept_ptr + before * H)
        tiles = load_tiles(kept_prev_ptr, tl.where(step == 0, H, D * H), 1, H, offs_b, offs_h, mask)
    else:
        t = time_index(step - 1, T, direction)
        before_ptr = kept_ptr + ((t * stride + first + offs_b) * D + direction) * H
        kept_prev_ptr = tl.where((t >= 0) & (t < length), before_ptr, kept_0_ptr + (own_row + offs_state) * H)
        tiles = (tl.load(kept_prev_ptr[:, None] + offs_h[None, :], mask=mask, other=0.0),)
    if dy_ptr is not None:
        tiles = tiles + load_tiles(dy_ptr + now * H, D * H, 1, H, offs_b, offs_h, live)
    else:
        tiles = tiles + (zeros_like(mask),)
    if S > 0:
        tiles = tiles + load_tiles(saved_ptr + now * S * H, D * S * H, S, H, offs_b, offs_h, live)
    if dc_ptr is not None:
        tiles = tiles + load_tiles(dc_ptr + now * H, D * H, 1, H, offs_b, offs_h, live)
    if reset_ptr is not None:
        restart = load_restart(reset_ptr, where, step)
        row = start_row(where, step, D, own_row, offs_state, BY_STEP)
        tiles = tiles + (load_start(reset_kept_ptr, restart, row, H, offs_h, mask), restart)
    return tiles


@triton.jit
def step_backward(
    CELL: tl.constexpr, d_state, tiles, kept, live, dc_ptr, rows_ptr, reset_ptr,
    G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr, ACTIVATIONS: tl.constexpr,
):  # fmt: skip
    """The cell's step backward on what load_step read: d_x, d_rec, d_state without the product's share, kept_prev.

    In frozen rows d_x and d_rec are zero, and d_state passes through.
    """
    HAS_DC: tl.constexpr = dc_ptr is not None
    read = as_fp32(tiles, S + 2 + HAS_DC)
    before, saved = read[0], ()
    for n in tl.static_range(S):
        saved = saved + (read[n + 2],)
    if reset_ptr is not None:
        before = tl.where(tiles[S + 3 + HAS_DC], tiles[S + 2 + HAS_DC], before)
    given = (d_state[0] + read[1],)
    if HAS_C:
        if HAS_DC:
            given = given + (d_state[1] + read[S + 2],)
        else:
            given = given + (d_state[1],)
    d_x, d_rec, d_before = CELL(given, saved, kept, before, ACTIVATIONS)
    if rows_ptr is not None:
        zeros = (zeros_like(kept),) * G
        d_x, d_rec = keep(live, d_x, zeros, G), keep(live, d_rec, zeros, G)
        d_before = keep(live, d_before, given, 1 + HAS_C)
    return d_x, d_rec, d_before, read[0]


@triton.jit
def with_dh(d_state, dh, HAS_C: tl.constexpr):
    """The gradient of the state, of which dh is known."""
    if HAS_C:
        return (dh, d_state[1])
    else:
        return (dh,)
