"""How programs of the cooperative tiers hand on a state through L2: h in forward, d_gates in backward.

With a barrier a step (F.ROUND is 0) it is stored, and then its programs arrive at the grid's barrier; forward has two
buffers that alternate, [2, R, B, H], rows as in batch tiles: not y, since where a sequence ends or starts anew another
state goes on. Backward exchanges d_gates in its output, each slot of which is written once.

Polled, the state shows by itself that it has come. There are 2 ROUND slots [R, B, gates, columns], MISSING at first,
and a number that was sent is never MISSING: who waits for it reads until no number is. Nothing orders one number and
another, and nothing has to. Once a round of ROUND steps the programs meet, and each takes back what it sent in the
round before, which all have read by then; docs/barrier.md has the proof.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .barrier import COUNTER_STRIDE, arrive, wait

MISSING: tl.constexpr = tl.constexpr(-1)  # all ones: as a number a NaN, and one that is sent becomes another NaN


class Group(NamedTuple):
    """The programs that exchange a state, as one of them sees them."""

    counter: Any  # that they meet at
    programs: Any  # how many they are
    exchanged: Any  # what they exchange, of this batch tile, in the first slot; by a barrier a step backward: d_x_gates
    buffer: Any  # numbers from a slot to the next
    rows: Any  # [BLOCK_B] of the batch tile
    units: Any  # Units of this program
    exists: Any  # [BLOCK_B]: rows of the batch tile that exist


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
def slot_of(group, step, F: tl.constexpr):
    """Where what is exchanged in a step is."""
    if F.ROUND == 0:
        return group.exchanged + (step % 2) * group.buffer
    else:
        return group.exchanged + (step % (2 * F.ROUND)) * group.buffer


@triton.jit
def receive(held, K: tl.constexpr, F: tl.constexpr, units, recurrence, state, step):
    """The buffer that h of all units is in: by a barrier a step when it is, polled when it may come."""
    if F.ROUND == 0:
        meet(held.group, step + 1, F)
    else:
        begin_step(held.group, F, 1, step)
    return slot_of(held.group, step, F)


@triton.jit
def publish(held, K: tl.constexpr, F: tl.constexpr, units, state, step):
    """Hand on h of the own units."""
    group = held.group
    if F.ROUND == 0:
        at = group.rows[:, None] * K.H + units.offs[None, :]
        h = state[0].to(group.exchanged.dtype.element_ty)
        tl.store(slot_of(group, step, F) + at, h, mask=units.mask)
        arrive(group.counter)
    else:
        send(held, K, F, (state[0],), step)


@triton.jit
def announce(held, K: tl.constexpr, F: tl.constexpr, d_rec, back):
    """Hand on d_gates: by a barrier a step they are where they are exchanged."""
    if F.ROUND == 0:
        arrive(held.group.counter)
    else:
        send(held, K, F, d_rec, back)
    return 0


@triton.jit
def load_exchanged(ptr, row_stride, offs_k, H: tl.constexpr, offs_b, row_mask):
    """A piece [WARPS, BLOCK_B, K] of what the group's programs wrote: past L1, which may hold older values."""
    mask = row_mask[None, :, None] & (offs_k < H)[:, None, :]
    tile_ptr = ptr + offs_b[None, :, None] * row_stride + offs_k[:, None, :]
    return tl.load(tile_ptr, mask=mask, other=0.0, cache_modifier=".cg")


# Polled.


@triton.jit
def begin_step(group, F: tl.constexpr, GATES: tl.constexpr, step):
    """At a round's first step meet, and take back what this program sent in the round before."""
    if (step > 0) & (step % F.ROUND == 0):
        arrive(group.counter)
        meet(group, step // F.ROUND, F)
        at = places(group, F, GATES)
        for back in range(F.ROUND):
            before = slot_of(group, step - 1 - back, F)
            for g in tl.static_range(GATES):
                gone = (at * 0 + MISSING).to(group.exchanged.dtype.element_ty)
                tl.store(before + g * F.COLUMNS + at, gone, mask=group.exists[:, None])


@triton.jit
def places(group, F: tl.constexpr, GATES: tl.constexpr):
    """Where the own units of a row's first gate are in a slot."""
    return group.rows[:, None] * (GATES * F.COLUMNS) + group.units.offs[None, :]


@triton.jit
def send(held, K: tl.constexpr, F: tl.constexpr, tiles, step):
    """Store tiles of the own units in a step's slot, each number for itself: none MISSING, and zeros beyond H."""
    group = held.group
    at = places(group, F, len(tiles))
    for g in tl.static_range(len(tiles)):
        bits = tiles[g].to(held.W_hh[0].dtype).to(group.exchanged.dtype.element_ty, bitcast=True)
        bits = tl.where(bits == MISSING, MISSING - 1, bits)
        if K.H % F.BLOCK_N > 0:
            bits = tl.where(group.units.offs[None, :] < K.H, bits, 0)
        ptr = slot_of(group, step, F) + g * F.COLUMNS + at
        if F.IN_PTX:
            store_strong(ptr, bits, group.units, group.exists)
        else:
            tl.store(ptr, bits, mask=group.exists[:, None])


@triton.constexpr_function
def storing(bits):
    """PTX that stores a number at $1: of 16 bits two at once, the neighbour's from the next lane."""
    store, test = "@%q0 st.relaxed.gpu.global.b32 [$1], $0;", "setp.ne.u32 %q0, $3, 0;"
    if bits == 32:
        lines = ["mov.b32 $0, $2;", test, store]
    else:
        lines = ["shfl.sync.bfly.b32 $0, $2, 1, 31, -1;", "prmt.b32 $0, $2, $0, 21520;", test, store]  # 0x5410
    return "\n".join(["{", ".reg .pred %q<1>;", *lines, "}"])


@triton.jit
def store_strong(ptr, bits, units, exists):
    """What Triton has no word for: with a weak store a read at the same time is a race, whatever it finds.

    Words of 32 bits, which is what others read at once. Neighbouring lanes have neighbouring units.
    """
    stores = exists.to(tl.int32)[:, None]
    if bits.dtype.primitive_bitwidth == 16:
        stores = stores & (1 - units.offs % 2)[None, :]
    arguments = [ptr.to(tl.int64), bits.to(tl.int32), stores]
    tl.inline_asm_elementwise(
        storing(bits.dtype.primitive_bitwidth), "=&r,l,r,r", arguments, tl.int32, is_pure=False, pack=1
    )


@triton.jit
def poll(tile_ptr):
    """Read a tile of what was sent until none of it is MISSING. Gluon's is in gluon/polling.py."""
    bits = tl.load(tile_ptr, volatile=True)
    while tl.sum((bits == MISSING).to(tl.int32)) > 0:
        bits = tl.load(tile_ptr, volatile=True)
    return bits
