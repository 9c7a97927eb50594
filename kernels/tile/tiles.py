"""What the time loops of all tiers share: where a program stands, and its tiles in memory.

All tensors are time-major and contiguous, D directions side by side; direction 1 walks time from the end:

    x_gates, d_x_gates   [T, B, D, G, H]     y, dy, c (all steps)   [T, B, D, H]     saved   [T, B, D, S, H]
    W_hh                 [D, G, H, H]        h_0, c_0, h_n, c_n     [D, B, H]        b_hh    [D, G, H]

Scalar offsets are int64; offsets inside a tile are int32, which a tile of a few rows cannot exceed.
"""

import triton
import triton.language as tl

from ..activations import zeros_like


@triton.jit
def place(B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """This program's direction (of D), its first row (of B), and offsets and mask of its tile; scalars are int64."""
    direction = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    offs_b = tl.arange(0, BLOCK_B)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (first_row + offs_b < B)[:, None] & (offs_h < H)[None, :]
    return direction, tl.num_programs(1), tl.cast(B, tl.int64), first_row, offs_b, offs_h, mask


@triton.jit
def time_index(step, T, direction):
    """The t that a program of this direction visits at its step."""
    return tl.where(direction == 0, step, T - 1 - step)


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
def load_state(h_ptr, c_ptr, row_offset, HAS_C: tl.constexpr, H: tl.constexpr, offs_b, offs_h, mask):
    """(h,) or (h, c) in fp32 from [D, B, H] at a row's offset, or their gradients; zeros for an absent pointer."""
    if h_ptr is None:
        state = (zeros_like(mask),)
    else:
        state = as_fp32(load_tiles(h_ptr + row_offset, H, 1, H, offs_b, offs_h, mask), 1)
    if HAS_C:
        if c_ptr is None:
            state = state + (zeros_like(mask),)
        else:
            state = state + as_fp32(load_tiles(c_ptr + row_offset, H, 1, H, offs_b, offs_h, mask), 1)
    return state


@triton.jit
def store_state(h_ptr, c_ptr, row_offset, state, HAS_C: tl.constexpr, H: tl.constexpr, offs_b, offs_h, mask):
    store_tiles(h_ptr + row_offset, H, state, 1, H, offs_b, offs_h, mask)
    if HAS_C:
        store_tiles(c_ptr + row_offset, H, (state[1],), 1, H, offs_b, offs_h, mask)


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
def load_step(
    step, T, rows, first_row, direction, D, dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask,
    S: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """What backward reads at a step, counted from the end: the kept state one step earlier, dy and the saved tiles."""
    now = (time_index(T - 1 - step, T, direction) * rows + first_row) * D + direction
    before = (time_index(tl.maximum(T - 2 - step, 0), T, direction) * rows + first_row) * D + direction
    last = step == T - 1
    kept_prev_ptr = tl.where(last, kept_0_ptr + (direction * rows + first_row) * H, kept_ptr + before * H)
    tiles = load_tiles(kept_prev_ptr, tl.where(last, H, D * H), 1, H, offs_b, offs_h, mask)
    if dy_ptr is not None:
        tiles = tiles + load_tiles(dy_ptr + now * H, D * H, 1, H, offs_b, offs_h, mask)
    else:
        tiles = tiles + (zeros_like(mask),)
    if S > 0:
        tiles = tiles + load_tiles(saved_ptr + now * S * H, D * S * H, S, H, offs_b, offs_h, mask)
    return tiles
