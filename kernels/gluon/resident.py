"""The resident tier in Gluon: a program, or the programs of a cluster, hold all of W_hh in registers and shared memory.

    forward    barrier;   gather h[t-1];   rec = W_hh[own units] h + b_hh;
               (h, c), saved = cell(x_gates[t], rec, (h, c));   own h to shared memory
    backward   d_gates[t] = cell'(dh + dy[t], dc, saved[t]), of own units;   barrier;
               summand = W_hh[own units]^T d_gates[t];   barrier;   dh = sum of the summands' own columns + rest

Each program of a cluster (CTAS of them, one is a program alone) owns units of H, all their gates, and these rows of
W_hh: the same in both passes. Forward must see all of h, 16 bits a unit, and gathers it from the other programs' shared
memories. Backward multiplies by rows, which gives every program a summand of all of dh, and exchanges these: half of
the bytes that gathering the LSTM's four gate gradients would take. One cluster barrier a step either way.

W_hh of the first gates, IN_REGISTERS of them, stays in registers as operands of the tensor cores, the others' in shared
memory. Where columns are few for the warps, SHARES groups of warps share the sum over units, too: each product is
[shares, rows, columns] (products.py). Products pass through shared memory, also where there is one share: there,
threads add the shares of their own columns, a few neighbours of one row. x_gates, saved tiles and outputs are loaded
and stored in that layout. In the layout of the products a warp has 8 columns of 16 rows, so that each access meets 8
lines of L1, a cycle each: 1.26 us a step instead of 0.65 (LSTM, H = 64, bf16, forward, measured on an H100).

What a step reads, one four steps earlier has brought into L2 (ahead.py); not in backward of clusters.

The layout of tensors is in ../arguments.py. Helpers of ../loop.py and ../rows.py serve both dialects, since layouts
come with the offsets.
Grid: (batch tiles, R), clusters. Source: as ../tile/resident.py.

Limit: the chain of dependent latencies of a step (barrier, ldmatrix, products, activations, store), and with clusters
the exchange; for 16 warps their issue slots come near. W_hh in registers costs nothing.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import loop
from ..loop import Constants
from ..metadata import of_launch
from ..rows import Resets, Units, find_rows
from ..tiles import first_state, load_bias, load_state, store_state
from . import layouts
from .ahead import find_sectors, prefetch, read_of, reads_of
from .layouts import block_barrier
from .products import in_shares, layouts_of, load_operand, load_weights, multiply, store_sums, weight, zero_sums

try:
    from triton.experimental.gluon.language.nvidia.hopper.cluster import barrier as meet_cluster
except ImportError:  # before Triton 3.8, which compiles no clusters
    meet_cluster = block_barrier


class Held(NamedTuple):
    """What a program holds for all of time."""

    W_hh: Any  # G operands, the first IN_REGISTERS in registers, the others in shared memory
    b_hh: Any  # forward: G tiles, or the pointer where their registers are W_hh's
    operand: Any  # shared memory of the product's other operand: forward h of all units, backward d_gates
    own: Any  # shared memory of h of the own units, by step parity: forward, clusters
    summands: Any  # shared memory of what groups of warps, or programs, sum apart
    ahead: Any  # where what a step reads lies in memory


class Form(NamedTuple):
    """What the planner chose."""

    BLOCK_B: int
    BLOCK_H: int
    SHARES: int
    IN_REGISTERS: int
    BIAS_KEPT: bool = True  # forward: whether the bias stays in registers


@gluon.jit
def cluster_barrier():
    """All programs of the cluster have written what they exchange in shared memory, and see it.

    gl.barrier(cluster=True) releases global memory too, and waits for every store that is on its way there: 1.88 us a
    step instead of 1.48 (LSTM, H = 256, bf16, forward, measured on an H100). Here the fence is of shared memory alone.
    """
    fence: gl.constexpr = "fence.release.sync_restrict::shared::cta.cluster;\n\tmov.u32 $0, $1;"
    gl.inline_asm_elementwise(fence, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)
    meet_cluster(relaxed=True)


@gluon.jit
def place(K: gl.constexpr, table_ptr, T, B, BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, LAYOUT: gl.constexpr):
    """This program's rows and units."""
    recurrence = (gl.program_id(1) if K.D * K.N > 1 else gl.to_tensor(0)).to(gl.int64)
    first_row = gl.program_id(0).to(gl.int64) * BLOCK_B
    offs_b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, LAYOUT))
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(0, LAYOUT))
    units = Units(offs_h, (first_row + offs_b < B)[:, None] & (offs_h < K.H)[None, :])
    return find_rows(K, table_ptr, recurrence, T, B, first_row, offs_b), units


@gluon.jit
def receive(held, K: gl.constexpr, F: gl.constexpr, units, recurrence, state, step):
    """h of all units, gathered from the shared memories of the cluster's programs; and the bias."""
    if F.BIAS_KEPT:
        b_hh = held.b_hh
    else:  # it comes from L1 every step
        b_hh = load_bias(K, held.b_hh, recurrence, units)
    if F.CTAS > 1:
        cluster_barrier()
        GATHERED: gl.constexpr = F.GATHERED
        whole = held.own.index(step % 2).load(GATHERED)
        held.operand.index(0).store(in_shares(whole, F.SHARES))
    block_barrier()
    return load_operand(held.operand.index(0 if F.CTAS > 1 else step % 2), F), b_hh


@gluon.jit
def gates(held, K: gl.constexpr, F: gl.constexpr, received):
    """W_hh h + b_hh of the own units, gate by gate."""
    h, b_hh = received
    SUMMED: gl.constexpr = F.SUMMED
    zeros = zero_sums(F, F.SHARES, held.summands.shape[2], held.summands.shape[3])
    for g in gl.static_range(K.gates):
        store_sums(F, held.summands.index(g), multiply(K, F, h, weight(held.W_hh, F, g), zeros))
    block_barrier()
    rec = ()
    for g in gl.static_range(K.gates):
        rec = rec + (gl.sum(held.summands.index(g).load(SUMMED), 0) + b_hh[g],)
    return rec


@gluon.jit
def publish(held, K: gl.constexpr, F: gl.constexpr, units, state, step):
    """Put h of the own units where the cluster's programs, or this one's warps, read it."""
    if F.CTAS > 1:
        held.own.index(step % 2).store(state[0].to(held.own.dtype))
    else:
        held.operand.index(step % 2).store(in_shares(state[0].to(held.operand.dtype), F.SHARES))


@gluon.jit
def announce(held, K: gl.constexpr, F: gl.constexpr, d_rec, back):
    """Put d_gates of the own units where this program's warps read them."""
    for g in gl.static_range(K.gates):
        held.operand.index(g).store(in_shares(d_rec[g].to(held.operand.dtype), F.SHARES * F.CTAS))
    block_barrier()
    return 0


@gluon.jit
def d_hidden(held, K: gl.constexpr, F: gl.constexpr, dh, sent, rows, step, back):
    """dh + W_hh^T d_gates: own rows of W_hh give a summand of all of dh, which programs and warps exchange."""
    SUMMED: gl.constexpr = F.SUMMED
    acc = zero_sums(F, F.SHARES * F.CTAS, dh.shape[0], dh.shape[1])
    for g in gl.static_range(K.gates):
        d_gate = load_operand(held.operand.index(g), F)
        acc = multiply(K, F, d_gate, weight(held.W_hh, F, g), acc)
    store_sums(F, held.summands.index(back % 2), acc)
    if F.CTAS > 1:
        cluster_barrier()
    else:
        block_barrier()
    return dh + gl.sum(held.summands.index(back % 2).load(SUMMED), 0)


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def forward(inputs, outputs, sequences, T, B, CELL: gl.constexpr, SIZES: gl.constexpr, FORM: gl.constexpr):
    K: gl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    CTAS: gl.constexpr = gl.num_ctas()
    BLOCK_B: gl.constexpr = FORM.BLOCK_B
    BLOCK_H: gl.constexpr = FORM.BLOCK_H
    SHARES: gl.constexpr = FORM.SHARES
    DEPTH: gl.constexpr = BLOCK_H // SHARES
    dtype: gl.constexpr = inputs.W_hh.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    F: gl.constexpr = layouts_of(FORM, BITS, CTAS, gl.num_warps(), 2)
    TIER: gl.constexpr = loop.Tier(receive, gates, publish, True, F, prefetch)
    rows, units = place(K, sequences.rows, T, B, BLOCK_B, BLOCK_H, gl.SliceLayout(0, F.SUMMED))
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    W_hh = load_weights(K, F, inputs.W_hh, rows.recurrence, BLOCK_H, SHARES, False)
    b_hh = load_bias(K, inputs.b_hh, rows.recurrence, units)
    if not F.BIAS_KEPT:
        b_hh = inputs.b_hh
    state = first_state(K, inputs.states, rows, units, resets)
    whole = gl.allocate_shared_memory(
        dtype, [2, SHARES, BLOCK_B, DEPTH], layouts.operand(BITS, DEPTH, [2, 1, 0], CTAS, None)
    )
    own = None
    if CTAS > 1:
        own = gl.allocate_shared_memory(
            dtype, [2, BLOCK_B, BLOCK_H], layouts.operand(BITS, BLOCK_H // CTAS, [1, 0], CTAS, 1)
        )
    partial: gl.constexpr = layouts.partial(BLOCK_B, BLOCK_H, CTAS, 2)
    summands = gl.allocate_shared_memory(gl.float32, [K.gates, SHARES, BLOCK_B, BLOCK_H], partial)
    READS: gl.constexpr = reads_of(read_of(inputs.x_gates, K.gates, K.H, BLOCK_H // CTAS), 1)
    sectors = find_sectors(K, (inputs.x_gates,), READS, sequences.rows, rows, T, B, BLOCK_B)
    held = Held(W_hh, b_hh, whole, own, summands, sectors)
    publish(held, K, F, units, state, 0)
    state = loop.forward(TIER, K, held, inputs.x_gates, outputs, rows, units, resets, state)
    store_state(K, outputs.finals, rows, units, state)
    if CTAS > 1:
        gl.barrier(cluster=True)  # no program ends while others read its shared memory


@gluon.jit(do_not_specialize=["T", "B"], launch_metadata=of_launch)
def backward(read, grads, sequences, T, B, CELL: gl.constexpr, SIZES: gl.constexpr, FORM: gl.constexpr):
    K: gl.constexpr = Constants(
        CELL, SIZES.gates, SIZES.states, SIZES.kept, SIZES.saved, SIZES.D, SIZES.N, SIZES.H, SIZES.own_lengths,
        SIZES.by_step, SIZES.ragged, SIZES.activations, SIZES.precision, SIZES.clip_gradient, SIZES.clip_state,
        SIZES.zoneout,
    )  # fmt: skip
    CTAS: gl.constexpr = gl.num_ctas()
    BLOCK_B: gl.constexpr = FORM.BLOCK_B
    BLOCK_H: gl.constexpr = FORM.BLOCK_H
    SUMMANDS: gl.constexpr = FORM.SHARES * CTAS
    DEPTH: gl.constexpr = BLOCK_H // SUMMANDS
    dtype: gl.constexpr = read.W_hh.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    F: gl.constexpr = layouts_of(FORM, BITS, CTAS, gl.num_warps(), 0)
    # Programs of a cluster wait for each other longer than for memory, and prefetches only add instructions.
    AHEAD: gl.constexpr = prefetch if CTAS == 1 else None
    TIER: gl.constexpr = loop.Tier(None, d_hidden, announce, True, F, AHEAD)
    rows, units = place(K, sequences.rows, T, B, BLOCK_B, BLOCK_H, gl.SliceLayout(0, F.SUMMED))
    resets = Resets(sequences.reset, sequences.starts, sequences.noise)
    W_hh = load_weights(K, F, read.W_hh, rows.recurrence, BLOCK_H, SUMMANDS, True)
    d_state = load_state(K, read.d_finals, rows, units)
    d_tile = gl.allocate_shared_memory(
        dtype, [K.gates, SUMMANDS, BLOCK_B, DEPTH], layouts.operand(BITS, DEPTH, [2, 1, 0], CTAS, 0)
    )
    partial: gl.constexpr = layouts.partial(BLOCK_B, BLOCK_H, CTAS, 0)
    summands = gl.allocate_shared_memory(gl.float32, [2, SUMMANDS, BLOCK_B, BLOCK_H], partial)
    sectors = None
    if CTAS == 1:
        ptrs = read.kept
        if read.tiles is not None:
            ptrs = ptrs + (read.tiles,)
        if read.dy is not None:
            ptrs = ptrs + (read.dy,)
        READS: gl.constexpr = reads_of(
            read_of(read.kept[0], 1, K.H, BLOCK_H), K.kept,
            read_of(read.tiles, K.saved, K.H, BLOCK_H), read_of(read.dy, 1, K.H, BLOCK_H),
        )  # fmt: skip
        sectors = find_sectors(K, ptrs, READS, sequences.rows, rows, T, B, BLOCK_B)
    held = Held(W_hh, None, d_tile, None, summands, sectors)
    d_state = loop.backward(TIER, K, held, read, grads, rows, units, resets, d_state)
    store_state(K, grads.d_states, rows, units, d_state)
    if CTAS > 1:
        gl.barrier(cluster=True)
