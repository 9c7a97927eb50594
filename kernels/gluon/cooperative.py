"""The cooperative tier in Gluon: a slice of W_hh stays in registers and, as far as they cannot hold it, shared memory.

    forward    wait for h[t-1];   rec = W_hh[own units] h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               hand on h[own units];   arrive
    backward   d_gates[t, own units] = cell'(dh + dy[t], dc, saved[t]);   arrive;   wait for d_gates[t];
               dh = W_hh^T[own units] d_gates[t] + rest

Programs and groups are those of ../tile/cooperative.py, the protocol is in ../exchange.py, the layout of tensors in
../arguments.py; helpers of ../loop.py and ../rows.py serve both dialects, since layouts come with the offsets. What
differs is where things are:

The exchanged state goes straight from L2 to the registers that the tensor cores read (operands.py): no warp reads what
another does, 16 bytes a load where H allows it. A copy through shared memory (cp.async) would free registers, but pass
there twice, and only 16-byte copies go past L1.

Each warp sums its own share of K. The sums meet in shared memory, where a thread finds all WARPS of them for each
element whose cell it computes: pointwise work is spread over all threads, at the price of one barrier.

The first IN_REGISTERS operands of W_hh stay in registers, the others are read from shared memory every step.

Grid: (programs of a group, batch tiles from the first one on, R). Source: as ../tile/cooperative.py.

Limit: forward, the latency of a step, as there; backward, from H = 1024 on, what each program reads through L2: G times
as many bytes as forward.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .. import loop
from ..exchange import Group, announce, counter_of, first_row_of, meet, publish, receive
from ..loop import Constants
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows, live, slot
from ..tiles import first_state, load_bias, load_state, store_state
from .layouts import block_barrier
from .operands import load_layout, load_piece, load_weights, product_layout, weight


class Form(NamedTuple):
    """What the planner chose."""

    BLOCK_B: int
    BLOCK_N: int
    K_TILES: tuple[tuple[int, int], ...]
    WARPS: int
    SPIN_ON_LOAD: bool  # how a program waits at the grid barrier
    IN_REGISTERS: int


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # an operand for each piece of K and gate, the first IN_REGISTERS in registers, others in shared memory
    b_hh: Any  # G tiles [BLOCK_B, BLOCK_N]; None in backward
    sums: Any  # shared memory where the warps' sums meet
    piece_rows: Any  # [BLOCK_B], in the layout that pieces of the state are read in; in backward a Rows
    piece_mask: Any  # which of them exist
    group: Any


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
def place(
    K: gl.constexpr, table_ptr, first_tile, T, B, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr
):
    """This program's rows and units, the first row of its batch tile, and the tile's rows."""
    recurrence = (gl.program_id(2) if K.D * K.N > 1 else gl.to_tensor(0)).to(gl.int64)
    first_row = first_row_of(first_tile, BLOCK_B)
    offs_b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, LAYOUT))
    offs_n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    units = Units(offs_n, (first_row + offs_b < B)[:, None] & (offs_n < K.H)[None, :])
    return find_rows(K, table_ptr, recurrence, T, B, first_row, offs_b), units, first_row, offs_b


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


@gluon.jit
def gates(held, K: gl.constexpr, F: gl.constexpr, h_ptr):
    """W_hh h + b_hh of the own units, gate by gate."""
    BLOCK_B: gl.constexpr = held.b_hh[0].shape[0]
    BLOCK_N: gl.constexpr = held.b_hh[0].shape[1]
    sums = (gl.zeros([F.WARPS, BLOCK_N, BLOCK_B], gl.float32, product_layout(F.WARPS)),) * K.gates
    for i in gl.static_range(len(F.K_TILES)):
        h = load_piece(h_ptr, K.H, held.piece_rows, held.piece_mask, K.H, F.K_TILES, i, F.WARPS)
        longer = ()
        for g in gl.static_range(K.gates):
            W_g = weight(held.W_hh[i * K.gates + g], F.WARPS, i * K.gates + g < F.IN_REGISTERS)
            longer = longer + (mma_v2(W_g, h, sums[g], input_precision=K.precision),)
        sums = longer
    totals, rec = sum_over_warps(held.sums, sums, K.gates, F.WARPS), ()
    for g in gl.static_range(K.gates):
        rec = rec + (totals[g] + held.b_hh[g],)
    return rec


@gluon.jit
def d_hidden(held, K: gl.constexpr, F: gl.constexpr, dh, sent, rows, step, back):
    """dh + W_hh^T d_gates of the own units, when all programs have announced d_gates."""
    group = held.group
    meet(group, back + 1, F)
    now, slots = slot(rows, step), held.piece_rows.slots
    mask = live(held.piece_mask, held.piece_rows, step, K.own_lengths)
    sums = (gl.zeros([F.WARPS, dh.shape[1], dh.shape[0]], gl.float32, product_layout(F.WARPS)),) * K.gates
    for i in gl.static_range(len(F.K_TILES)):
        longer = ()
        for g in gl.static_range(K.gates):
            if group.last is not None and g == K.gates - 1:
                d_gate = load_piece(group.last + now * K.H, rows.count * K.H, slots, mask, K.H, F.K_TILES, i, F.WARPS)
            else:
                ptr = group.exchanged + (now * K.gates + g) * K.H
                d_gate = load_piece(ptr, rows.count * K.gates * K.H, slots, mask, K.H, F.K_TILES, i, F.WARPS)
            W_g = weight(held.W_hh[i * K.gates + g], F.WARPS, i * K.gates + g < F.IN_REGISTERS)
            longer = longer + (mma_v2(W_g, d_gate, sums[g], input_precision=K.precision),)
        sums = longer
    total = sums[0]
    for g in gl.static_range(1, K.gates):
        total += sums[g]
    return dh + sum_over_warps(held.sums, (total,), 1, F.WARPS)[0]


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(inputs, outputs, sequences, exchange, T, B, CELL: gl.constexpr, SIZES: gl.constexpr, FORM: gl.constexpr):
    K: gl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    F: gl.constexpr = Form(FORM.BLOCK_B, FORM.BLOCK_N, FORM.K_TILES, FORM.WARPS, FORM.SPIN_ON_LOAD, FORM.IN_REGISTERS)
    BLOCK_B: gl.constexpr = FORM.BLOCK_B
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    K_TILES: gl.constexpr = FORM.K_TILES
    WARPS: gl.constexpr = FORM.WARPS
    TIER: gl.constexpr = loop.Tier(receive, gates, publish, False, F)
    rows, units, first_row, offs_b = place(
        K, sequences.rows, exchange.first_tile, T, B, BLOCK_B, BLOCK_N, gl.SliceLayout(0, cell_layout(WARPS))
    )
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    PIECE: gl.constexpr = load_layout(K_TILES[0][1], WARPS, inputs.W_hh.dtype.element_ty)
    piece_rows = gl.arange(0, BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(2, PIECE)))
    exchanged_ptr = exchange.states + (rows.recurrence * B + first_row) * K.H
    buffer = B.to(gl.int64) * (K.D * K.N * K.H)
    programs = gl.num_programs(0).to(gl.int64)
    group = Group(counter_of(exchange.counters, rows), programs, exchanged_ptr, None, buffer, offs_b)
    W_hh = load_weights(K, F, inputs.W_hh, rows.recurrence, True)
    b_hh = load_bias(K, inputs.b_hh, rows.recurrence, units)
    shared: gl.constexpr = sums_layout(WARPS, BLOCK_B, BLOCK_N)
    sums = gl.allocate_shared_memory(gl.float32, [K.gates, WARPS, BLOCK_B, BLOCK_N], shared)
    held = Held(W_hh, b_hh, sums, piece_rows, first_row + piece_rows < B, group)
    state = first_state(K, inputs.states, rows, units, resets)
    publish(held, K, F, units, state, 0)
    state = loop.forward(TIER, K, held, inputs.x_gates, outputs, rows, units, resets, state)
    store_state(K, outputs.finals, rows, units, state)


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(read, grads, sequences, exchange, T, B, CELL: gl.constexpr, SIZES: gl.constexpr, FORM: gl.constexpr):
    K: gl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    F: gl.constexpr = Form(FORM.BLOCK_B, FORM.BLOCK_N, FORM.K_TILES, FORM.WARPS, FORM.SPIN_ON_LOAD, FORM.IN_REGISTERS)
    BLOCK_B: gl.constexpr = FORM.BLOCK_B
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    K_TILES: gl.constexpr = FORM.K_TILES
    WARPS: gl.constexpr = FORM.WARPS
    TIER: gl.constexpr = loop.Tier(None, d_hidden, announce, False, F)
    rows, units, first_row, offs_b = place(
        K, sequences.rows, exchange.first_tile, T, B, BLOCK_B, BLOCK_N, gl.SliceLayout(0, cell_layout(WARPS))
    )
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    PIECE: gl.constexpr = load_layout(K_TILES[0][1], WARPS, read.W_hh.dtype.element_ty)
    piece_rows = gl.arange(0, BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(2, PIECE)))
    programs = gl.num_programs(0).to(gl.int64)
    group = Group(counter_of(exchange.counters, rows), programs, grads.d_x_gates, grads.d_rec_last, None, offs_b)
    W_hh = load_weights(K, F, read.W_hh, rows.recurrence, False)
    pieces = find_rows(K, sequences.rows, rows.recurrence, T, B, first_row, piece_rows)
    shared: gl.constexpr = sums_layout(WARPS, BLOCK_B, BLOCK_N)
    sums = gl.allocate_shared_memory(gl.float32, [1, WARPS, BLOCK_B, BLOCK_N], shared)
    held = Held(W_hh, None, sums, pieces, first_row + piece_rows < B, group)
    d_state = load_state(K, read.d_finals, rows, units)
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, grads.d_states, rows, units, d_state)
