"""Layouts of the Gluon kernels: which program of a cluster, warp and thread has which elements of a tile.

Nothing here is traced: these functions run while a kernel is compiled. Products are batched, [shares, rows, columns]:
shares of the sum lie side by side, and meet in `summed`.
"""

import triton
from triton.experimental.gluon import language as gl

# The barrier of a program's warps, which Triton 3.7 renamed.
block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@triton.constexpr_function
def split(ctas, dim, rank):
    """The programs of a cluster side by side along a dimension; each has all of it if dim is None."""
    return [[(1 << i) * (d == dim) for d in range(rank)] for i in range(ctas.bit_length() - 1)]


@triton.constexpr_function
def product(rows, warps, shares, ctas, dim):
    """[shares, rows, columns] of tensor cores' products: a warp has one share, of all rows and columns of its own.

    A tile of 8 rows is the right operand, and this [shares, columns, rows]: columns fill the tensor cores' 16 rows.
    """
    dim = 1 if rows < 16 and dim == 2 else dim
    cluster = {"cga_layout": split(ctas, dim, 3)} if ctas > 1 else {}  # Triton 3.7 knows no clusters
    warps_of = [shares, warps // shares, 1] if rows < 16 else [shares, 1, warps // shares]
    return gl.NVMMADistributedLayout([2, 0], warps_of, [1, 16, 8], **cluster)


@triton.constexpr_function
def summed(summands, rows, columns, warps, ctas):
    """[summands, rows, columns] of which a thread has all summands of its own columns, the cluster's programs' own."""
    own = columns // ctas
    width = min(4, max(1, rows * own // (32 * warps)))
    lanes = min(32, own // width)
    cluster = {"cga_layout": split(ctas, 2, 3)} if ctas > 1 else {}
    return gl.BlockedLayout([summands, 1, width], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0], **cluster)


@triton.constexpr_function
def operand(bits, depth, order, ctas, dim):
    """A tile in shared memory that becomes an operand of depth numbers a row: swizzled against conflicts of banks."""
    width = 128 // bits
    cluster = {"cga_layout": split(ctas, dim, len(order))} if ctas > 1 else {}
    rows = max(1, 8 * width // depth)  # in 128 bytes
    return gl.SwizzledSharedLayout(width, rows, max(1, min(8 // rows, depth // width)), order, **cluster)


@triton.constexpr_function
def gathered(bits, rows, columns, warps, ctas):
    """[rows, columns] that every program of a cluster reads from all of its shared memories, up to 16 bytes at once."""
    width = min(128 // bits, max(1, rows * columns // (32 * warps)))
    lanes = min(32, columns // width)
    return gl.BlockedLayout([1, width], [32 // lanes, lanes], [warps, 1], [1, 0], cga_layout=split(ctas, None, 2))


@triton.constexpr_function
def partial(rows, columns, ctas, dim):
    """Partial sums in shared memory, [summands, rows, columns].

    Half a warp stores 4 rows of 32 bytes: neighbouring rows have them in different quarters of the banks. Of a tile of
    8 rows a warp stores every other row.
    """
    own = columns // ctas if dim == 2 else columns
    in_line = max(1, 32 // own)  # rows in 128 bytes
    phase = max(in_line, 16 // rows)
    cluster = {"cga_layout": split(ctas, dim, 3)} if ctas > 1 else {}
    return gl.SwizzledSharedLayout(8, phase, max(1, 4 // in_line), [2, 1, 0], **cluster)
