"""What a later step reads is brought from device memory into L2, where the step's own loads find it.

A step of a small kernel is shorter than the way to device memory (670 cycles on an H100, L2 280), and its loads go out
one step ahead: farther, a step's registers would have to be moved into the next one's, which waits for them. A prefetch
has no result that anything waits for, and changes no number.

A sector is the unit that comes from memory. Those of a step are counted through, of one tensor after those of another,
and each thread takes one or a few. A program of a cluster takes those of its own units.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..rows import find_rows, slot, time_index

SECTOR = gl.constexpr(32)  # bytes


class Sectors(NamedTuple):
    """Of a step, by thread."""

    rows: Any
    lengths: Any  # of each thread's row
    address: Any  # at slot 0
    stride: Any  # bytes from a slot to the next; 0 for a thread without a sector, which takes an address that exists
    anywhere: Any  # such an address


class Batch(NamedTuple):
    """Whose rows they are."""

    table: Any
    T: Any
    B: Any


@dataclass(frozen=True)
class Read:
    """Tiles of a tensor [slots, R, tiles, bytes]. No tuple: Triton before 3.8 loses sight of constants in a tuple."""

    tiles: int
    bytes: int  # of a row of one
    own: int  # of these in a program

    @property
    def in_tile(self):
        """A program's sectors of a tile's row."""
        return -(-min(self.bytes, self.own) // SECTOR.value)


@dataclass(frozen=True)
class Reads:
    """One of each tensor, in order."""

    each: tuple[Read, ...]


@gluon.constexpr_function
def read_of(ptr, tiles, units, own):
    """Tiles of so many units, `own` of them (padding included) a program's; None where there is no tensor."""
    if ptr is None:
        return None
    width = ptr.dtype.element_ty.primitive_bitwidth // 8
    return Read(tiles, units * width, own * width)


@gluon.constexpr_function
def reads_of(first, times, *others):
    """The first so many times, then those of the others that there are."""
    return Reads((first,) * times + tuple(read for read in others if read is not None))


@gluon.constexpr_function
def tensors(reads):
    return len(reads.each)


@gluon.constexpr_function
def one_of(reads, i):
    return reads.each[i]


@gluon.constexpr_function
def before(reads, i, block_b):
    """Sectors of the tensors before the i-th."""
    return sum(block_b * read.tiles * read.in_tile for read in reads.each[:i])


@gluon.constexpr_function
def count(reads, block_b, warps):
    """A power of two: each thread once, or as often as it takes."""
    return max(32 * warps, 1 << (before(reads, None, block_b) - 1).bit_length())


@gluon.constexpr_function
def layout(count, warps, ctas):
    cluster = {"cga_layout": [[1 << i] for i in range(ctas.bit_length() - 1)]} if ctas > 1 else {}
    return gl.BlockedLayout([count // (32 * warps)], [32], [warps], [0], **cluster)


@gluon.jit
def find_sectors(K: gl.constexpr, ptrs, READS: gl.constexpr, table_ptr, rows, T, B, BLOCK_B: gl.constexpr):
    """Those of tensors at the rows of this program's batch tile."""
    COUNT: gl.constexpr = count(READS, BLOCK_B, gl.num_warps())
    LAYOUT: gl.constexpr = layout(COUNT, gl.num_warps(), gl.num_ctas())
    number = gl.arange(0, COUNT * gl.num_ctas(), LAYOUT)
    nothing, anywhere = number * 0, ptrs[0].to(gl.int64)
    found = Sectors(rows, nothing, anywhere + nothing, nothing, anywhere)
    for i in gl.static_range(tensors(READS)):
        own = (number % COUNT - before(READS, i, BLOCK_B)).to(gl.uint32)  # of what comes before: large
        batch = Batch(table_ptr, T, B)
        found = with_tensor(K, found, ptrs[i], one_of(READS, i), number // COUNT, own, batch, BLOCK_B)
    return found


@gluon.jit
def with_tensor(K: gl.constexpr, found, ptr, READ: gl.constexpr, rank, number, batch, BLOCK_B: gl.constexpr):
    """Threads have the sector of a tensor whose number they are given, if there is one."""
    IN_TILE: gl.constexpr = READ.in_tile
    IN_ROW: gl.constexpr = READ.tiles * READ.in_tile
    WIDTH: gl.constexpr = READ.tiles * READ.bytes
    first_row = gl.program_id(0).to(gl.int64) * BLOCK_B
    row, in_tile = (number // IN_ROW).to(gl.int32), rank * READ.own + (number % IN_TILE).to(gl.int32) * SECTOR
    exists = (number < BLOCK_B * IN_ROW) & (first_row + row < batch.B) & (in_tile < READ.bytes)
    own_row = gl.where(exists, row, 0)
    rows = find_rows(K, batch.table, found.rows.recurrence, batch.T, batch.B, first_row, own_row)
    offs = (number % IN_ROW // IN_TILE).to(gl.int32) * READ.bytes + in_tile
    address = ptr.to(gl.int64) + rows.slots.to(gl.int64) * (rows.count * WIDTH) + offs
    return Sectors(
        found.rows, gl.where(exists, rows.lengths, found.lengths), gl.where(exists, address, found.address),
        gl.where(exists, WIDTH, found.stride), found.anywhere,
    )  # fmt: skip


@gluon.jit
def prefetch(held, K: gl.constexpr, step):
    """What a step of forward's walk reads."""
    sectors = held.ahead
    at = sectors.address + slot(sectors.rows, step) * sectors.stride
    if K.own_lengths:
        at = gl.where(time_index(sectors.rows, step) < sectors.lengths, at, sectors.anywhere)
    PREFETCH: gl.constexpr = "prefetch.global.L2 [$1];\n\tmov.u32 $0, 0;"
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)
