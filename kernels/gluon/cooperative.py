"""The cooperative tier in Gluon: a slice of W_hh stays in registers and, as far as they cannot hold it, shared memory.

    forward    wait for h[t-1];   rec = W_hh[own units] h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               hand on h[own units];   arrive
    backward   d_gates[t, own units] = cell'(dh + dy[t], dc, saved[t]);   arrive;   wait for d_gates[t];
               dh = W_hh^T[own units] d_gates[t] + rest

Programs, groups and protocol are those of ../tile/cooperative.py, the layout of tensors is in ../tile/tiles.py; helpers
of both serve both dialects, since layouts come with the offsets. What differs is where things are:

The exchanged state goes straight from L2 to the registers that the tensor cores read (operands.py): no warp reads what
another does, 16 bytes a load where H allows it. A copy through shared memory (cp.async) would free registers, but pass
there twice, and only 16-byte copies go past L1.

Each warp sums its own share of K. The sums meet in shared memory, where a thread finds all WARPS of them for each
element whose cell it computes: pointwise work is spread over all threads, at the price of one barrier.

The first IN_REGISTERS operands of W_hh stay in registers, the others are read from shared memory every step.

Grid: (P, batch tiles, D). Source: as ../tile/cooperative.py.

Limit: forward, the latency of a step, as there; backward, from H = 1024 on, what each program reads through L2: G times
as many bytes as forward.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..barrier import arrive, wait
from ..metadata import of_launch
from ..tile.sequences import cut, find_rows, keep, load_starts, slot, within
from ..tile.tiles import (
    as_fp32,
    load_bias,
    load_inputs,
    load_state,
    load_step,
    load_tiles,
    step_backward,
    step_forward,
    store_state,
    store_tiles,
    with_dh,
)
from .layouts import block_barrier
from .operands import load_layout, load_piece, load_weights, product_layout, weight


@gluon.constexpr_function
def cell_layout(WARPS):
    """Of all warps' sums [WARPS, BLOCK_B, BLOCK_N]: a thread has those of an element, 16 threads 16 units of a row."""
    return gl.BlockedLayout([WARPS, 1, 1], [1, 2, 16], [1, WARPS, 1], [2, 1, 0])


@gluon.constexpr_function
def sums_layout(WARPS, BLOCK_B, BLOCK_N):
    """Of the sums [WARPS, BLOCK_B, BLOCK_N] in shared memory, by the bits of an offset.

    Half a warp stores 4 units x 4 pairs of rows at once (bits 0, 1 of n; 1, 2 of b), a warp reads 2 rows x 16 units
    (bit 0 of b; 0 to 3 of n): neither meets a bank, offset bits 0 to 4, twice.
    """
    bits = [(0, 1, 0), (0, 0, 1), (0, 0, 2), (0, 2, 0), (0, 4, 0), (0, 2, 4), (0, 4, 8)]
    bits += [(0, 0, 1 << i) for i in range(4, BLOCK_N.bit_length() - 1)]
    bits += [(0, 1 << i, 0) for i in range(3, BLOCK_B.bit_length() - 1)]
    bits += [(1 << i, 0, 0) for i in range(WARPS.bit_length() - 1)]
    return gl.SharedLinearLayout([list(bit) for bit in bits])


@gluon.jit
def place(B, D: gl.constexpr, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """This program's direction (of D), its first row (of B), offsets and mask of its tile; scalars are int64."""
    direction = (gl.program_id(2) if D > 1 else gl.to_tensor(0)).to(gl.int64)
    first_row = gl.program_id(1).to(gl.int64) * BLOCK_B
    offs_b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, LAYOUT))
    offs_n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    mask = (first_row + offs_b < B)[:, None] & (offs_n < H)[None, :]
    return direction, first_row, offs_b, offs_n, mask


@gluon.jit
def sum_over_warps(sums_tile, sums, N: gl.constexpr, WARPS: gl.constexpr):
    """N sums [BLOCK_B, BLOCK_N] of what the warps hold; the caller's barriers keep the steps apart."""
    for n in gl.static_range(N):
        sums_tile.index(n).store(sums[n].permute([0, 2, 1]))
    block_barrier()
    totals = ()
    for n in gl.static_range(N):
        totals = totals + (gl.sum(sums_tile.index(n).load(cell_layout(WARPS)), 0),)
    return totals


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(
    x_gates_ptr, W_hh_ptr, b_hh_ptr, h_0_ptr, c_0_ptr,
    y_ptr, h_n_ptr, c_n_ptr, c_ptr, saved_ptr, rows_ptr, reset_ptr, reset_h_ptr, reset_c_ptr,
    exchanged_ptr, counters_ptr,
    T, B,
    CELL: gl.constexpr, G: gl.constexpr, S: gl.constexpr, HAS_C: gl.constexpr, ACTIVATIONS: gl.constexpr,
    RAGGED: gl.constexpr, BY_STEP: gl.constexpr,
    D: gl.constexpr, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, K_TILES: gl.constexpr,
    WARPS: gl.constexpr, PRECISION: gl.constexpr, SPIN_ON_LOAD: gl.constexpr, COUNTER_STRIDE: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = cell_layout(WARPS)
    direction, first_row, tile_rows, offs_n, mask = place(B, D, H, BLOCK_B, BLOCK_N, gl.SliceLayout(0, SUMS))
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, tile_rows, RAGGED)
    T, offs_b = where[1], where[4]
    PIECE: gl.constexpr = load_layout(K_TILES[0][1], WARPS, W_hh_ptr.dtype.element_ty)
    piece_rows = gl.arange(0, BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(2, PIECE)))
    P = gl.num_programs(0).to(gl.int64)
    counter_ptr = counters_ptr + (gl.program_id(1) * D + gl.program_id(2)) * COUNTER_STRIDE

    W_hh = load_weights(W_hh_ptr, direction, G, H, BLOCK_N, K_TILES, WARPS, IN_REGISTERS, True)
    b_hh = load_bias(b_hh_ptr, direction, G, H, offs_n, mask)
    state = load_state(h_0_ptr, c_0_ptr, own_row, HAS_C, H, offs_state, offs_n, mask)
    if reset_ptr is not None:
        restart, starts = load_starts(
            reset_ptr, reset_h_ptr, reset_c_ptr, where, 0, D, own_row, offs_state, BY_STEP, HAS_C, H, offs_n, mask
        )
        state = keep(restart, starts, state, 1 + HAS_C)
    # h in two buffers [2, D, B, H], rows as in batch tiles: that of even steps and that of odd ones.
    buffer = B.to(gl.int64) * D * H
    exchanged_ptr += (direction * B + first_row) * H
    store_tiles(exchanged_ptr, H, state, 1, H, tile_rows, offs_n, mask)
    arrive(counter_ptr)
    sums_tile = gl.allocate_shared_memory(
        gl.float32, [G, WARPS, BLOCK_B, BLOCK_N], sums_layout(WARPS, BLOCK_B, BLOCK_N)
    )
    zeros = gl.zeros([WARPS, BLOCK_N, BLOCK_B], gl.float32, product_layout(WARPS))

    x_next = load_inputs(x_gates_ptr, rows_ptr, where, 0, D, G, H, offs_n, mask)
    for step in range(T):
        x = as_fp32(x_next, G)
        if reset_ptr is not None:
            restart, starts = load_starts(
                reset_ptr, reset_h_ptr, reset_c_ptr, where, step + 1, D, own_row, offs_state, BY_STEP, HAS_C,
                H, offs_n, mask,
            )  # fmt: skip
        wait(counter_ptr, (step + 1) * P, SPIN_ON_LOAD)
        h_ptr = exchanged_ptr + (step % 2) * buffer
        sums = (zeros,) * G
        for i in gl.static_range(len(K_TILES)):
            h = load_piece(h_ptr, H, piece_rows, first_row + piece_rows < B, H, K_TILES, i, WARPS)
            longer = ()
            for g in gl.static_range(G):
                W_g = weight(W_hh[i * G + g], WARPS, i * G + g < IN_REGISTERS)
                longer = longer + (mma_v2(W_g, h, sums[g], input_precision=PRECISION),)
            sums = longer
        totals = sum_over_warps(sums_tile, sums, G, WARPS)
        rec = ()
        for g in gl.static_range(G):
            rec = rec + (totals[g] + b_hh[g],)
        live = within(mask, rows_ptr, where, step)
        after, saved = step_forward(CELL, x, rec, state, live, rows_ptr, HAS_C, ACTIVATIONS)
        state = after
        if reset_ptr is not None:
            state = keep(restart, starts, after, 1 + HAS_C)

        store_tiles(exchanged_ptr + (step + 1) % 2 * buffer, H, state, 1, H, tile_rows, offs_n, mask)
        arrive(counter_ptr)
        x_next = load_inputs(x_gates_ptr, rows_ptr, where, gl.minimum(step + 1, T - 1), D, G, H, offs_n, mask)
        now = slot(where, step, D)
        store_tiles(y_ptr + now * H, D * H, after, 1, H, offs_b, offs_n, live)
        if c_ptr is not None:
            store_tiles(c_ptr + now * H, D * H, (after[1],), 1, H, offs_b, offs_n, live)
        if saved_ptr is not None:
            store_tiles(saved_ptr + now * S * H, D * S * H, saved, S, H, offs_b, offs_n, live)

    store_state(h_n_ptr, c_n_ptr, own_row, state, HAS_C, H, offs_state, offs_n, mask)


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(
    dy_ptr, dh_n_ptr, dc_n_ptr, dc_ptr, W_hh_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
    d_x_gates_ptr, d_rec_last_ptr, dh_0_ptr, dc_0_ptr, d_reset_h_ptr, d_reset_c_ptr, counters_ptr,
    T, B,
    CELL: gl.constexpr, G: gl.constexpr, S: gl.constexpr, HAS_C: gl.constexpr, ACTIVATIONS: gl.constexpr,
    RAGGED: gl.constexpr, BY_STEP: gl.constexpr,
    D: gl.constexpr, H: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, K_TILES: gl.constexpr,
    WARPS: gl.constexpr, PRECISION: gl.constexpr, SPIN_ON_LOAD: gl.constexpr, COUNTER_STRIDE: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = cell_layout(WARPS)
    direction, first_row, tile_rows, offs_n, mask = place(B, D, H, BLOCK_B, BLOCK_N, gl.SliceLayout(0, SUMS))
    where, own_row, offs_state = find_rows(rows_ptr, direction, T, B, first_row, tile_rows, RAGGED)
    T, offs_b = where[1], where[4]
    PIECE: gl.constexpr = load_layout(K_TILES[0][1], WARPS, W_hh_ptr.dtype.element_ty)
    piece_rows = gl.arange(0, BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(2, PIECE)))
    P = gl.num_programs(0).to(gl.int64)
    counter_ptr = counters_ptr + (gl.program_id(1) * D + gl.program_id(2)) * COUNTER_STRIDE

    W_hh = load_weights(W_hh_ptr, direction, G, H, BLOCK_N, K_TILES, WARPS, IN_REGISTERS, False)
    piece_where, _, _ = find_rows(rows_ptr, direction, T, B, first_row, piece_rows, RAGGED)
    d_state = load_state(dh_n_ptr, dc_n_ptr, own_row, HAS_C, H, offs_state, offs_n, mask)
    sums_tile = gl.allocate_shared_memory(
        gl.float32, [1, WARPS, BLOCK_B, BLOCK_N], sums_layout(WARPS, BLOCK_B, BLOCK_N)
    )
    zeros = gl.zeros([WARPS, BLOCK_N, BLOCK_B], gl.float32, product_layout(WARPS))
    end = kept_ptr + slot(where, T - 1, D) * H
    kept = as_fp32(load_tiles(end, D * H, 1, H, offs_b, offs_n, within(mask, rows_ptr, where, T - 1)), 1)[0]
    following = load_step(
        dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
        where, T - 1, D, own_row, offs_state, S, H, BY_STEP, offs_n, mask,
    )  # fmt: skip
    for back in range(T):
        step, tiles = T - 1 - back, following
        live = within(mask, rows_ptr, where, step)
        d_x, d_rec, d_state, kept = step_backward(
            CELL, d_state, tiles, kept, live, dc_ptr, rows_ptr, reset_ptr, G, S, HAS_C, ACTIVATIONS
        )
        now = slot(where, step, D)
        store_tiles(d_x_gates_ptr + now * G * H, D * G * H, d_x, G, H, offs_b, offs_n, live)
        if d_rec_last_ptr is not None:
            store_tiles(d_rec_last_ptr + now * H, D * H, (d_rec[G - 1],), 1, H, offs_b, offs_n, live)
        arrive(counter_ptr)
        following = load_step(
            dy_ptr, dc_ptr, kept_0_ptr, kept_ptr, saved_ptr, rows_ptr, reset_ptr, reset_kept_ptr,
            where, gl.maximum(step - 1, 0), D, own_row, offs_state, S, H, BY_STEP, offs_n, mask,
        )  # fmt: skip

        wait(counter_ptr, (back + 1) * P, SPIN_ON_LOAD)
        piece_mask = within(first_row + piece_rows < B, rows_ptr, piece_where, step)
        sums = (zeros,) * G
        for i in gl.static_range(len(K_TILES)):
            longer = ()
            for g in gl.static_range(G):
                if d_rec_last_ptr is not None and g == G - 1:
                    d_gate_ptr = d_rec_last_ptr + now * H
                    d_gate = load_piece(d_gate_ptr, D * H, piece_where[4], piece_mask, H, K_TILES, i, WARPS)
                else:
                    d_gate_ptr = d_x_gates_ptr + (now * G + g) * H
                    d_gate = load_piece(d_gate_ptr, D * G * H, piece_where[4], piece_mask, H, K_TILES, i, WARPS)
                W_g = weight(W_hh[i * G + g], WARPS, i * G + g < IN_REGISTERS)
                longer = longer + (mma_v2(W_g, d_gate, sums[g], input_precision=PRECISION),)
            sums = longer
        total = sums[0]
        for g in gl.static_range(1, G):
            total += sums[g]
        d_state = with_dh(d_state, d_state[0] + sum_over_warps(sums_tile, (total,), 1, WARPS)[0], HAS_C)
        if reset_ptr is not None:
            restart = tiles[len(tiles) - 1]
            d_state = cut(d_state, restart, d_reset_h_ptr, d_reset_c_ptr, where, step, D, HAS_C, H, offs_n, mask)

    store_state(dh_0_ptr, dc_0_ptr, own_row, d_state, HAS_C, H, offs_state, offs_n, mask)
