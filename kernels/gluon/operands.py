"""Operands of the grid-split Gluon kernels: the slice of W_hh, which stays on chip, and pieces of the exchanged state.

A product is W [WARPS, BLOCK_N, K] times state [WARPS, K, BLOCK_B], one for each warp, which sums its own share of K.
W_hh is the left operand: units fill the tensor cores' 16 rows, and a batch tile may be as narrow as their 8 columns.

From memory to the tensor cores nothing moves between threads: the k-th factors of both operands are multiplied,
whatever columns they are, so a thread's 16 bytes of a row are taken for the pairs that it must hold (as_operand).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def product_layout(WARPS):
    """Of the sums [WARPS, BLOCK_N, BLOCK_B]: each warp has its own."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def chunk(K, dtype):
    """Neighbours of a row that a thread loads: 16 bytes, of 16 columns in 16 bits only 8."""
    return min(K // 4, 128 // dtype.primitive_bitwidth)


@gluon.constexpr_function
def load_layout(K, WARPS, dtype):
    """Of an operand [WARPS, rows, K] on its way from memory: four threads have a row, a chunk each."""
    return gl.BlockedLayout([1, 1, chunk(K, dtype)], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def weights_layout(K, dtype):
    """Of an operand of W_hh in shared memory, for ldmatrix: 8 rows of 16 bytes lie in different banks."""
    vector = 128 // dtype.primitive_bitwidth
    rows = max(1, 8 * vector // K)  # in 128 bytes
    return gl.SwizzledSharedLayout(vector, rows, 8 // rows, [2, 1, 0])


@gluon.jit
def columns(F: gl.constexpr, i: gl.constexpr, LAYOUT: gl.constexpr):
    """[WARPS, K]: the units that piece i of each warp's share covers."""
    share: gl.constexpr = F.COLUMNS // F.WARPS
    warps = gl.arange(0, F.WARPS, gl.SliceLayout(1, LAYOUT))[:, None]
    return warps * share + F.K_TILES[i][0] + gl.arange(0, F.K_TILES[i][1], gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def as_operand(tile, WARPS: gl.constexpr, index: gl.constexpr):
    """A loaded tile [WARPS, rows, K] as the left operand (0) or, transposed, the right one (1).

    The columns of 4 threads' chunks, numbered (thread, j, half, element), are renumbered (j, half, thread, element): a
    thread's chunk is J times the two pairs, 32 bits each, that it must hold for one product.
    """
    E: gl.constexpr = 32 // tile.dtype.primitive_bitwidth
    K: gl.constexpr = tile.shape[2]
    J: gl.constexpr = chunk(K, tile.dtype) // (2 * E)
    pairs = tile.reshape([WARPS, tile.shape[1], K // (8 * J * E), 4, J, 2, E]).permute([0, 1, 2, 4, 5, 3, 6])
    operand = pairs.reshape([WARPS, tile.shape[1], K])
    if index == 1:
        operand = operand.permute([0, 2, 1])
    return gl.convert_layout(operand, gl.DotOperandLayout(index, product_layout(WARPS), E), assert_trivial=True)


@gluon.jit
def load_weights(K: gl.constexpr, F: gl.constexpr, W_hh_ptr, recurrence, BY_ROW: gl.constexpr):
    """An operand for each piece of K and gate, the first IN_REGISTERS in registers, the rest in shared memory."""
    tiles = ()
    for i in gl.static_range(len(F.K_TILES)):
        for g in gl.static_range(K.gates):
            tile = load_weight(K, F, W_hh_ptr + (recurrence * K.gates + g) * K.H * K.H, i, BY_ROW)
            if i * K.gates + g < F.IN_REGISTERS:
                tiles = tiles + (tile,)
            else:
                tiles = tiles + (to_shared(tile),)
    return tiles


@gluon.jit
def load_weight(K: gl.constexpr, F: gl.constexpr, block_ptr, i: gl.constexpr, BY_ROW: gl.constexpr):
    """[WARPS, BLOCK_N, K] of a gate's block of W_hh: its rows are the own units if BY_ROW, else its columns."""
    K_TILES: gl.constexpr = F.K_TILES
    WARPS: gl.constexpr = F.WARPS
    BLOCK_N: gl.constexpr = F.BLOCK_N
    LAYOUT: gl.constexpr = load_layout(K_TILES[i][1], WARPS, block_ptr.dtype.element_ty)
    offs_k = columns(F, i, gl.SliceLayout(1, LAYOUT))[:, None, :]
    units = gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    own = (gl.program_id(0) * BLOCK_N + units)[None, :, None]
    if BY_ROW:
        tile_ptr = block_ptr + own * K.H + offs_k
    else:
        tile_ptr = block_ptr + offs_k * K.H + own
    tile = gl.load(tile_ptr, mask=(offs_k < K.H) & (own < K.H), other=0.0)
    return as_operand(tile, WARPS, 0)


@gluon.jit
def to_shared(operand):
    LAYOUT: gl.constexpr = weights_layout(operand.shape[2], operand.dtype)
    return gl.allocate_shared_memory(operand.dtype, operand.shape, LAYOUT, operand)


@gluon.jit
def weight(tile, WARPS: gl.constexpr, IS_IN_REGISTERS: gl.constexpr):
    """An operand, from where it is."""
    if IS_IN_REGISTERS:
        return tile
    else:
        return tile.load(gl.DotOperandLayout(0, product_layout(WARPS), 32 // tile.dtype.primitive_bitwidth))
