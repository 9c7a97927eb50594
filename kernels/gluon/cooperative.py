"""The cooperative tier in Gluon: a slice of W_hh stays in registers and, as far as they cannot hold it, shared memory.

    forward    poll h[t-1];   rec = W_hh[own units] h + b_hh;   (h, c), saved = cell(x_gates[t], rec, (h, c));
               send h[own units]
    backward   d_gates[t, own units] = cell'(dh + dy[t], dc, saved[t]);   send;   poll d_gates[t];
               dh = W_hh^T[own units] d_gates[t] + rest

Programs and groups are those of ../tile/cooperative.py, the protocol, polled, is in ../exchange.py, the layout of
tensors in ../arguments.py; helpers of ../loop.py and ../rows.py serve both dialects, since layouts come with the
offsets. What differs is where things are:

The exchanged state goes straight from L2 to the registers that the tensor cores read (polling.py): no warp reads what
another does, 16 bytes a load. A copy through shared memory (cp.async) would free registers, but pass
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

from .. import loop
from ..exchange import Group, announce, begin_step, counter_of, first_row_of, publish, receive, slot_of
from ..loop import Constants
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows
from ..tiles import first_state, load_bias, load_state, store_state
from .layouts import block_barrier
from .operands import load_weights, product_layout
from .polling import chunks_layout, multiply


class Form(NamedTuple):
    """What the planner chose."""

    BLOCK_B: int
    BLOCK_N: int
    K_TILES: tuple[tuple[int, int], ...]
    WARPS: int
    SPIN_ON_LOAD: bool  # how a program waits at the grid barrier
    IN_REGISTERS: int
    ROUND: int  # steps between two barriers
    COLUMNS: int  # of a row of what is exchanged: all warps' shares
    IN_PTX: bool = True  # how a number is sent


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # an operand for each piece of K and gate, the first IN_REGISTERS in registers, others in shared memory
    b_hh: Any  # G tiles [BLOCK_B, BLOCK_N]; None in backward
    sums: Any  # shared memory where the warps' sums meet
    piece_rows: Any  # [BLOCK_B], in the layout that pieces of the state are read in; 0 for one that is not there
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
def group_of(K: gl.constexpr, F: gl.constexpr, exchange, GATES: gl.constexpr, rows, units, B, first_row, offs_b):
    """The programs that this one exchanges with, and where."""
    row: gl.constexpr = GATES * F.COLUMNS
    exchanged_ptr = exchange.states + (rows.recurrence * B + first_row) * row
    buffer = B.to(gl.int64) * (K.D * K.N * row)
    programs = gl.num_programs(0).to(gl.int64)
    exists = first_row + offs_b < B
    return Group(counter_of(exchange.counters, rows), programs, exchanged_ptr, buffer, offs_b, units, exists)


@gluon.jit
def sum_over_warps(sums_tile, sums, N: gl.constexpr, WARPS: gl.constexpr):
    """N sums [BLOCK_B, BLOCK_N] of what the warps hold; Triton puts a barrier before the next step's stores."""
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
    sums = multiply(held, K, F, h_ptr, 1, sums)
    totals, rec = sum_over_warps(held.sums, sums, K.gates, F.WARPS), ()
    for g in gl.static_range(K.gates):
        rec = rec + (totals[g] + held.b_hh[g],)
    return rec


@gluon.jit
def d_hidden(held, K: gl.constexpr, F: gl.constexpr, dh, sent, rows, step, back):
    """dh + W_hh^T d_gates of the own units, when all programs have announced d_gates."""
    begin_step(held.group, F, K.gates, back)
    sums = (gl.zeros([F.WARPS, dh.shape[1], dh.shape[0]], gl.float32, product_layout(F.WARPS)),) * K.gates
    sums = multiply(held, K, F, slot_of(held.group, back, F), K.gates, sums)
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
    F: gl.constexpr = Form(
        FORM.BLOCK_B, FORM.BLOCK_N, FORM.K_TILES, FORM.WARPS, FORM.SPIN_ON_LOAD, FORM.IN_REGISTERS, FORM.ROUND,
        FORM.COLUMNS,
    )  # fmt: skip
    BLOCK_B: gl.constexpr = FORM.BLOCK_B
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    WARPS: gl.constexpr = FORM.WARPS
    TIER: gl.constexpr = loop.Tier(receive, gates, publish, False, F)
    rows, units, first_row, offs_b = place(
        K, sequences.rows, exchange.first_tile, T, B, BLOCK_B, BLOCK_N, gl.SliceLayout(0, cell_layout(WARPS))
    )
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    piece_rows = gl.arange(0, BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(2, chunks_layout(WARPS))))
    group = group_of(K, F, exchange, 1, rows, units, B, first_row, offs_b)
    W_hh = load_weights(K, F, inputs.W_hh, rows.recurrence, True)
    b_hh = load_bias(K, inputs.b_hh, rows.recurrence, units)
    shared: gl.constexpr = sums_layout(WARPS, BLOCK_B, BLOCK_N)
    sums = gl.allocate_shared_memory(gl.float32, [K.gates, WARPS, BLOCK_B, BLOCK_N], shared)
    held = Held(W_hh, b_hh, sums, gl.where(first_row + piece_rows < B, piece_rows, 0), group)
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
    F: gl.constexpr = Form(
        FORM.BLOCK_B, FORM.BLOCK_N, FORM.K_TILES, FORM.WARPS, FORM.SPIN_ON_LOAD, FORM.IN_REGISTERS, FORM.ROUND,
        FORM.COLUMNS,
    )  # fmt: skip
    BLOCK_B: gl.constexpr = FORM.BLOCK_B
    BLOCK_N: gl.constexpr = FORM.BLOCK_N
    WARPS: gl.constexpr = FORM.WARPS
    TIER: gl.constexpr = loop.Tier(None, d_hidden, announce, False, F)
    rows, units, first_row, offs_b = place(
        K, sequences.rows, exchange.first_tile, T, B, BLOCK_B, BLOCK_N, gl.SliceLayout(0, cell_layout(WARPS))
    )
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    piece_rows = gl.arange(0, BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(2, chunks_layout(WARPS))))
    group = group_of(K, F, exchange, K.gates, rows, units, B, first_row, offs_b)
    W_hh = load_weights(K, F, read.W_hh, rows.recurrence, False)
    shared: gl.constexpr = sums_layout(WARPS, BLOCK_B, BLOCK_N)
    sums = gl.allocate_shared_memory(gl.float32, [1, WARPS, BLOCK_B, BLOCK_N], shared)
    held = Held(W_hh, None, sums, gl.where(first_row + piece_rows < B, piece_rows, 0), group)
    d_state = load_state(K, read.d_finals, rows, units)
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, grads.d_states, rows, units, d_state)
