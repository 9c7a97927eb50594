"""Plans of the cooperative tier, kernels/tile/cooperative.py and kernels/gluon/cooperative.py: W_hh over the grid.

Every threshold is what compiled without spilling in Triton 3.9.0; tests/inspect/test_codegen.py compiles some again.
Cycles are modelled, not measured: change a choice here and `python -m fastrnn inspect` says what it gave.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..compat.cached import cached
from . import prices
from .kernel_plan import (
    KIB,
    GridTooLargeError,
    KernelPlan,
    Request,
    as_text,
    common,
    register_limits,
    runs_gluon,
    tiles,
    weight_place,
)

# Of a row of the exchanged state that a warp multiplies at once: it holds these whole, and larger ones spill.
PIECE_BYTES = (128, 64)
# Steps between two barriers of programs that poll: twice as many slots, 8 MiB of L2 for the LSTM's backward at H=1024,
# B=16, and a 32nd of a barrier a step. The interpreter's are to be seen in short sequences.
ROUND, INTERPRETED_ROUND = 32, 2
# Registers of W_hh in a thread of the Gluon kernel, as they are tried. LSTM, B=16, bf16, sm_90: H=1024 compiles clean
# with 128 forward, 112 backward; H=2048 with 144, and, where the state alone would fill all 255, 56.
WEIGHT_REGISTERS = (176, 144, 128, 112, 96, 80, 72, 56, 48, 32, 16, 0)


@cached
def cooperative(request: Request) -> KernelPlan:
    """W_hh in slices over programs that run at once, of a batch too large for that in launches one after the other."""
    if not request.spec.has_tf32:
        request = request._replace(precision="ieee")
    refused: Exception | None = None
    fitting = []
    for tiling in _tilings(request):
        try:
            fitting.append(of_tiling(request, tiling))
        except (NotImplementedError, GridTooLargeError) as reason:
            refused = reason if refused is None or isinstance(reason, GridTooLargeError) else refused
    if fitting:
        return prices.cheapest(fitting, request)
    assert refused is not None
    raise refused


def of_tiling(request: Request, tiling: "Tiling") -> KernelPlan:
    """The plan in these tiles; raises where W_hh does not fit them, or one batch tile's programs do not the device."""
    spec, gates, H = request.spec, request.gates, request.H
    in_gluon = tiling.dialect == "Gluon"
    weight_bytes = gates * tiling.units * tiling.warps * tiling.share(H) * request.dtype.itemsize
    split = _split_gluon if in_gluon else _split_tile
    forward, backward = (split(request, exchanged, tiling) for exchanged in (1, gates))
    slices, batch_tiles = tiles(H, tiling.units), tiles(request.B, tiling.block_b)
    if not (forward and backward):
        raise NotImplementedError(
            f"no slice of W_hh fits a program: {as_text(weight_bytes)} for {tiling.units} units at H={H}, in "
            + ("registers and " if in_gluon or spec.is_amd else "")
            + f"{as_text(spec.shared_bytes)} of shared memory on {spec.arch}, beside what a step needs"
        )
    if slices * request.recurrences > spec.multiprocessors:
        raise GridTooLargeError(
            f"{slices * request.recurrences} programs ({slices} slices x {request.D} directions"
            + (f" x {request.N} heads" if request.N > 1 else "")
            + f") must run at once, and {spec.multiprocessors} fit on {spec.arch}"
        )
    # As few equal parts of the batch as fit.
    at_once = spec.multiprocessors // (slices * request.recurrences)
    part = tiles(batch_tiles, tiles(batch_tiles, at_once))
    limits = ({},) if in_gluon else register_limits(spec, tiling.warps)
    return KernelPlan(
        **common(request),
        dialect=tiling.dialect,
        block_b=tiling.block_b,
        units=tiling.units,
        grid=(slices, part, request.recurrences),
        parts=tiles(batch_tiles, part),
        ctas=1,
        warps=tiling.warps,
        form={
            "BLOCK_B": tiling.block_b,
            "BLOCK_N": tiling.units,
            "WARPS": tiling.warps,
            "SPIN_ON_LOAD": spec.is_amd,
            "COLUMNS": tiling.share(H) * tiling.warps,
            # Compiled tile Triton has no strong store, which polling takes.
            "ROUND": INTERPRETED_ROUND if spec.arch == "interpreter" else ROUND if in_gluon else 0,
        },
        choices={
            which: tuple(limit | _form(size, held, tiling, H) for limit in limits for size, held in splits)
            for which, splits in (("forward", forward), ("backward", backward))
        },
        weight_bytes=weight_bytes,
        weight_place="registers and shared memory" if in_gluon else weight_place(spec),
        shared_bytes=max(*forward.values(), *backward.values()),
    )


class Tiling(NamedTuple):
    """Of a grid-split kernel: rows of a batch tile, units and warps of a program."""

    dialect: str
    block_b: int
    units: int
    warps: int

    def share(self, H: int) -> int:
        """Columns of the product that a warp sums."""
        return tiles(H, 16 * self.warps) * 16


# Columns that are multiplied at once and, in Gluon, how many of W_hh's operands, one for each such piece and gate, stay
# in registers, the first ones, the rest in shared memory; in the order to try them, with the shared memory of each.
Splits = dict[tuple[int, int], int]


def _form(size: int, held: int, tiling: Tiling, H: int) -> dict[str, Any]:
    """A split as constants of the kernel."""
    form: dict[str, Any] = {"K_TILES": pieces(tiling.share(H), size)}
    return form | {"IN_REGISTERS": held} if tiling.dialect == "Gluon" else form


def _split_tile(request: Request, exchanged: int, tiling: Tiling) -> Splits:
    """All of W_hh in one place."""
    _, block_b, units, warps = tiling
    spec, gates, dtype, share = request.spec, request.gates, request.dtype, tiling.share(request.H)
    weight_bytes = gates * units * warps * share * dtype.itemsize
    # Beside W_hh: a piece of the state on its way into the product, or what the warps sum.
    beside = warps * block_b * max(min(PIECE_BYTES[0], share * dtype.itemsize), units * 4)
    shared_bytes = max(beside, weight_bytes // gates) if spec.is_amd else beside + weight_bytes
    # AMD: the LSTM at H=650 in fp32 (176 KiB) compiles clean, at H=1500 in bf16 (192 KiB) it spills 10 registers.
    if weight_bytes > (176 * KIB if spec.is_amd else spec.shared_bytes) or shared_bytes > spec.shared_bytes:
        return {}
    return {(size // dtype.itemsize, 0): shared_bytes for size in PIECE_BYTES}


def _split_gluon(request: Request, exchanged: int, tiling: Tiling) -> Splits:
    """W_hh in registers and shared memory, for a pass that exchanges so many gates: the most in registers first.

    Pieces of 64 bytes, the least that a thread reads by 16 bytes.
    """
    _, block_b, units, warps = tiling
    spec, gates, dtype = request.spec, request.gates, request.dtype
    share, columns = tiling.share(request.H), PIECE_BYTES[1] // dtype.itemsize
    operands = [units * warps * k * dtype.itemsize for _, k in pieces(share, columns) for _ in range(gates)]
    ends = list(itertools.accumulate(operands))
    # What the warps sum, forward by gates, and what the grid barrier broadcasts.
    sums = gates // exchanged * warps * block_b * units * 4
    # Registers a thread. ptxas loads all of the exchanged state before it multiplies, unless it sees no room at all.
    beside = (exchanged * share * block_b * dtype.itemsize + gates * units * block_b * 4) // 128
    # With so few of W_hh's no kernel spilled; one that cannot go so low may find none: H=3328, RNN, sm_120, backward
    # spills 256 bytes with 128, 144 with 112; H=3456, sm_80, 16 with 72; H=2047, LSTM, sm_90, forward 8 with 96.
    aligned = request.H * dtype.itemsize % 16 == 0
    safe = 56 if units == 32 else 96 if aligned else 72
    found: Splits = {}
    for registers in WEIGHT_REGISTERS:
        if registers <= 56 or registers + beside <= 264:
            held = sum(end <= registers * 4 * spec.warp_size * warps for end in ends)
            shared_bytes = sums + 128 + sum(operands[held:])
            if shared_bytes <= spec.shared_bytes:
                found[columns, held] = shared_bytes
                least = registers
    return found if found and min(least, ends[-1] // (4 * spec.warp_size * warps)) <= safe else {}


def _tilings(request: Request) -> Iterator[Tiling]:
    """Those that compile without spilling, in the order to try them.

    The smallest batch tile first: more programs a row of the batch, and W_hh of each batch tile's group once more on
    chip. Narrow slices first: modelled for the LSTM, H=384, bf16, sm_90, tile Triton, 16 units take 3500 cycles a step,
    32 take 6000. Four warps pad the state less than eight.
    """
    spec, gates, dtype = request.spec, request.gates, request.dtype
    if spec.arch == "interpreter":  # a program's step costs it 10 ms, whatever its size
        yield Tiling("tile Triton", 16, 32, 2)
        return
    if runs_gluon(request):
        for units in (16, 32):
            for block_b in (8, 16, 32):
                yield Tiling("Gluon", block_b, units, 8)
    if dtype == torch.float32 and request.precision == "ieee" and spec.has_tf32:  # FMA: 16 units spill (LSTM, H=650)
        yield Tiling("tile Triton", 16, 8, 8)
        return
    if spec.is_amd:  # its matrix cores take no fewer than 16 units; its SIMDs hold 512 registers a lane at 4 warps
        slices = [(16, 4), (32, 4)]
    else:
        slices = [(16, 8), (16, 4), (32, 8)] + [(8, 8)] * (dtype == torch.float32)
    for block_b in (16, 32):
        for units, warps in slices:
            # Wider tiles spill the larger cells, sooner where rows are not aligned to 16 bytes (LSTM, H=650, bf16).
            aligned = request.H * dtype.itemsize % 16 == 0
            two = aligned or gates < 4 or dtype.itemsize == 4
            four = aligned and gates * dtype.itemsize <= 6
            if {1: True, 2: two, 4: four}[max(1, block_b * units // 256)]:
                yield Tiling("tile Triton", block_b, units, warps)


def pieces(size: int, at_most: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of powers of two that cover a size: 96 at most 64 is (0, 64), (64, 32)."""
    found, start = [], 0
    while start < size:
        piece = min(at_most, 1 << ((size - start).bit_length() - 1))
        found.append((start, piece))
        start += piece
    return tuple(found)
