"""The resident tier: one program holds all of W_hh for one batch tile and one direction, and walks all of time.

    forward    for t in time:    rec = W_hh h + b_hh;  (h, c), saved = cell(x_gates[t], rec, (h, c));  y[t] = h
    backward   for t reversed:   dh += dy[t];  d_gates[t] = cell'(dh, dc, saved[t]);  dh = W_hh^T d_gates[t] + rest

Source: section 3 of Appleyard et al. 2016 (arXiv:1604.01946) for the split of the input product from the recurrent
one; Diamos et al. 2016 (persistent RNNs) for weights that stay on chip.

Layout, time-major and contiguous, D directions side by side; direction 1 walks time from the end:

    x_gates, d_x_gates   [T, B, D, G, H]     y, dy, c (all steps)   [T, B, D, H]     saved   [T, B, D, S, H]
    W_hh                 [D, G, H, H]        h_0, c_0, h_n, c_n     [D, B, H]        b_hh    [D, G, H]

Grid: (batch tiles, D). W_hh is read before the loop, once; x_gates (backward: everything a step reads) of the next
step is loaded before this step's product, so that its latency hides behind it. The state is fp32 from step to step
and is rounded where it is stored or multiplied. Forward saves the cell's saved tiles and c of every step, and only
if saved_ptr is given (or c_ptr: the RNN needs nothing but y). dW_hh and db_hh are left to one product and one sum
after the loop: accumulators for them would take the registers that hold W_hh.

Limit: one SM's shared-memory bandwidth (W_hh passes through it every step) and the chain product, activations,
state; more batch tiles or directions only fill more SMs.
"""

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["T", "B"])
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    direction, D, rows, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H)
    square = (offs_h < H)[:, None] & (offs_h < H)[None, :]

    W_hh = ()  # G tiles [BLOCK_H of k, BLOCK_H of n]
    b_hh = ()
    for g in tl.static_range(G):
        block = (direction * G + g) * H
        W_hh = W_hh + (tl.load(W_hh_ptr + block * H + offs_h[None, :] * H + offs_h[:, None], mask=square, other=0.0),)
        if b_hh_ptr is None:
            bias = tl.zeros((BLOCK_H,), tl.float32)
        else:
            bias = tl.load(b_hh_ptr + block + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
        b_hh = b_hh + (tl.broadcast_to(bias[None, :], (BLOCK_B, BLOCK_H)),)

    own_rows = (direction * rows + first_row) * H  # of this program in [D, B, H]
    state = as_fp32(load_tiles(h_0_ptr + own_rows, H, 1, H, offs_b, offs_h, mask), 1)
    if HAS_C:
        state = state + as_fp32(load_tiles(c_0_ptr + own_rows, H, 1, H, offs_b, offs_h, mask), 1)

    start = (time_index(0, T, direction) * rows + first_row) * D + direction
    x_next = load_tiles(x_gates_ptr + start * G * H, D * G * H, G, H, offs_b, offs_h, mask)
    for step in tl.range(0, T, num_stages=1):
        x = as_fp32(x_next, G)
        ahead = (time_index(tl.minimum(step + 1, T - 1), T, direction) * rows + first_row) * D + direction
        x_next = load_tiles(x_gates_ptr + ahead * G * H, D * G * H, G, H, offs_b, offs_h, mask)

        h = state[0].to(W_hh_ptr.dtype.element_ty)
        rec = ()
        for g in tl.static_range(G):
            rec = rec + (tl.dot(h, W_hh[g], acc=b_hh[g], input_precision=PRECISION),)
        state, saved = CELL(x, rec, state)

        now = (time_index(step, T, direction) * rows + first_row) * D + direction
        store_tiles(y_ptr + now * H, D * H, state, 1, H, offs_b, offs_h, mask)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (state[1],), 1, H, offs_b, offs_h, mask)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_h, mask)

    store_tiles(h_n_ptr + own_rows, H, state, 1, H, offs_b, offs_h, mask)
    if HAS_C:
        store_tiles(c_n_ptr + own_rows, H, (state[1],), 1, H, offs_b, offs_h, mask)


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
        tiles = tiles + (tl.zeros(mask.shape, tl.float32),)
    if S > 0:
        tiles = tiles + load_tiles(saved_ptr + now * S * H, D * S * H, S, H, offs_b, offs_h, mask)
    return tiles


@triton.jit(do_not_specialize=["T", "B"])
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr,
    T, B,
    CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, HAS_C: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    direction, D, rows, first_row, offs_b, offs_h, mask = place(B, H, BLOCK_B, BLOCK_H)
    square = (offs_h < H)[:, None] & (offs_h < H)[None, :]

    W_hh = ()  # G tiles [BLOCK_H of n, BLOCK_H of k]: as stored, since backward multiplies by the transpose
    for g in tl.static_range(G):
        block = (direction * G + g) * H
        W_hh = W_hh + (tl.load(W_hh_ptr + block * H + offs_h[:, None] * H + offs_h[None, :], mask=square, other=0.0),)

    own_rows = (direction * rows + first_row) * H
    d_state = ()
    if dh_n_ptr is not None:
        d_state = d_state + as_fp32(load_tiles(dh_n_ptr + own_rows, H, 1, H, offs_b, offs_h, mask), 1)
    else:
        d_state = d_state + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
    if HAS_C:
        if dc_n_ptr is not None:
            d_state = d_state + as_fp32(load_tiles(dc_n_ptr + own_rows, H, 1, H, offs_b, offs_h, mask), 1)
        else:
            d_state = d_state + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)

    end = (time_index(T - 1, T, direction) * rows + first_row) * D + direction
    kept = load_tiles(kept_ptr + end * H, D * H, 1, H, offs_b, offs_h, mask)[0].to(tl.float32)
    following = load_step(
        0, T, rows, first_row, direction, D, dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask, S, H
    )
    for step in tl.range(0, T, num_stages=1):
        tiles = as_fp32(following, S + 2)
        following = load_step(
            tl.minimum(step + 1, T - 1), T, rows, first_row, direction, D,
            dy_ptr, kept_ptr, kept_0_ptr, saved_ptr, offs_b, offs_h, mask, S, H,
        )  # fmt: skip
        kept_prev = tiles[0]
        saved = ()
        for n in tl.static_range(S):
            saved = saved + (tiles[n + 2],)

        if HAS_C:
            d_state = (d_state[0] + tiles[1], d_state[1])
        else:
            d_state = (d_state[0] + tiles[1],)
        d_x, d_rec, d_state = CELL(d_state, saved, kept, kept_prev)
        dh = d_state[0]
        for g in tl.static_range(G):
            dh = tl.dot(d_rec[g].to(W_hh_ptr.dtype.element_ty), W_hh[g], acc=dh, input_precision=PRECISION)
        if HAS_C:
            d_state = (dh, d_state[1])
        else:
            d_state = (dh,)
        kept = kept_prev

        now = (time_index(T - 1 - step, T, direction) * rows + first_row) * D + direction
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_h, mask)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_h, mask)

    store_tiles(dh_0_ptr + own_rows, H, d_state, 1, H, offs_b, offs_h, mask)
    if HAS_C:
        store_tiles(dc_0_ptr + own_rows, H, (d_state[1],), 1, H, offs_b, offs_h, mask)
