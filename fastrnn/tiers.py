"""The tiers: which sizes each holds, and in which tiles; pure functions from shapes and a DeviceSpec to a KernelPlan.

Every threshold is what compiled without spilling in Triton 3.9.0; tests/test_codegen.py compiles a grid of sizes again.
Cycles are modelled, not measured: change a choice here and `python -m fastrnn inspect` says what it gave.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import compiler
from .device import DeviceSpec
from .reference import GATES

KIB = 1024
# Of a row of the exchanged state that a warp multiplies at once: it holds these whole, and larger ones spill.
PIECE_BYTES = (128, 64)
# Registers of W_hh in a thread of the grid-split Gluon kernel, as they are tried. LSTM, B=16, bf16, sm_90: H=1024
# compiles clean with 128 forward, 112 backward; H=2048 with 144, and, where the state alone would fill all 255, 56.
WEIGHT_REGISTERS = (176, 144, 128, 112, 96, 80, 72, 56, 48, 32, 16, 0)


@dataclass(frozen=True)
class KernelPlan:
    """How a persistent kernel is launched: tiles, warps, programs, and where W_hh stays."""

    dialect: str
    block_b: int  # rows of a batch tile
    units: int  # hidden units that a program owns, padding included
    share: int  # columns of the recurrent product that a warp sums; all of them where warps share the result instead
    grid: tuple[int, ...]  # (batch tiles, directions), or (slices of H, batch tiles, directions)
    warps: int
    # Each pass is compiled with the first pair of these that spills no register; no rule from sizes was found. ptxas,
    # left alone (None), saves registers for a second program and spills 8 bytes of one kernel in fifty; told how many
    # there are, it spills more of others; and given registers for it, it loads all pieces of the state at once.
    register_limits: tuple[int | None, ...]  # a thread
    # Columns that are multiplied at once, and, in Gluon, how many of W_hh's operands, one for each such piece and gate,
    # stay in registers: the first ones, the rest in shared memory.
    forward_splits: tuple[tuple[int, int], ...]
    backward_splits: tuple[tuple[int, int], ...]
    spin_on_load: bool  # how a program waits at the grid barrier
    precision: str  # of fp32 products, as Triton's input_precision: "ieee" or "tf32"
    weight_bytes: int  # of W_hh in one program, padding included
    weight_place: str
    shared_bytes: int  # upper bound for one program
    shared_limit: int  # what the device gives one program
    saved_bytes: int  # kept for backward

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class GridTooLargeError(ValueError):
    """More programs would have to run at once than the device has room for."""


def as_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / KIB:,.0f} KiB" if size < 1024 * KIB else f"{size / KIB**2:,.1f} MiB"


def weight_place(spec: DeviceSpec) -> str:
    """Where a program's W_hh stays: what Triton does with a product's operand that is loaded before the loop."""
    return "arrays" if spec.arch == "interpreter" else "registers" if spec.is_amd else "shared memory"


def _resident_limit(spec: DeviceSpec, dtype: torch.dtype, precision: str) -> int:
    """The most bytes of W_hh that one resident program holds without spilling."""
    # AMD: above 64 KiB (LSTM, H=128) 200 registers and more spill. FMA: the GRU at H=128 (192 KiB) spills 880 bytes.
    if spec.is_amd or (precision == "ieee" and dtype == torch.float32 and spec.has_tf32):
        return min(64 * KIB, spec.shared_bytes)
    return spec.shared_bytes


@functools.lru_cache(maxsize=1024)
def resident(
    name: str, H: int, B: int, T: int, D: int, dtype: torch.dtype, precision: str, spec: DeviceSpec
) -> KernelPlan:
    gates = GATES[name]
    # Tensor cores take at least 16 rows. A batch tile of 32 was modelled at 1.6 times the cycles of 16 (LSTM, H=64,
    # sm_90, 2848 against 1745) and spilled at H=128: more programs serve a large batch.
    block_b = 16
    block_h = max(16, 1 << (H - 1).bit_length())  # tile Triton's ranges are powers of two
    precision = precision if spec.has_tf32 else "ieee"
    weight_bytes = gates * block_h**2 * dtype.itemsize
    dialect = "Gluon"
    shared_bytes = 2 * gates * block_b * block_h * dtype.itemsize  # d_gates, double
    warps = _gluon_warps(gates, block_h, dtype, precision, spec)
    if warps is None:
        dialect = "tile Triton"
        # Beside W_hh, layout conversions pass through shared memory: at most one operand tile a gate.
        tiles = max(2, gates) * block_b * block_h * 4
        limit, place = _resident_limit(spec, dtype, precision), weight_place(spec)
        # On its way to registers W_hh passes through shared memory gate by gate, before the loop.
        shared_bytes = max(tiles, weight_bytes // gates) if place == "registers" else tiles + weight_bytes
        if weight_bytes > limit or shared_bytes > spec.shared_bytes:
            raise NotImplementedError(
                f"W_hh does not fit one program: {as_text(weight_bytes)} at H={H} (padded to {block_h}) of at most "
                f"{as_text(limit)} in {place} on {spec.arch}"
            )
        # Modelled for sm_90, LSTM, bf16: at H=64 16 warps take 1745 cycles a step, 8 take 2131; at H=32 1807 and 1790.
        # AMD's four SIMDs hold 512 registers a lane at 4 warps, and 8 spill.
        warps = 4 if spec.is_amd else 16 if block_h >= 64 else 8
    return KernelPlan(
        **_common(name, H, B, T, D, dtype, precision, spec, dialect),
        block_b=block_b,
        units=block_h,
        share=block_h,
        grid=(_tiles(B, block_b), D),
        warps=warps,
        register_limits=_register_limits(spec, warps),
        forward_splits=((block_h, gates),),
        backward_splits=((block_h, gates),),
        weight_bytes=weight_bytes,
        shared_bytes=shared_bytes,
    )


def _gluon_warps(gates: int, block_h: int, dtype: torch.dtype, precision: str, spec: DeviceSpec) -> int | None:
    """Warps of the Gluon kernel, each with 8 or 16 columns of the product; None where it does not run, or spills."""
    if not _runs_gluon(dtype, precision, spec):
        return None
    warps = max(1, min(16, block_h // 8))
    # Beside its part of W_hh a thread needs about 48 registers and 10 a gate, on sm_100 4 more: of 128, the GRU's
    # 48 + 78 (H=128, 16 bits) compile clean, but for sm_100; the LSTM's 64 + 88 spill 40 bytes.
    weight_registers = gates * block_h**2 * dtype.itemsize // (4 * 32 * warps)
    needed = weight_registers + 48 + 10 * gates + 4 * (spec.arch == "sm_100")
    return warps if needed <= _registers(spec, warps) else None


@functools.lru_cache(maxsize=1024)
def cooperative(
    name: str, H: int, B: int, T: int, D: int, dtype: torch.dtype, precision: str, spec: DeviceSpec
) -> KernelPlan:
    gates = GATES[name]
    precision = precision if spec.has_tf32 else "ieee"
    refused: Exception | None = None
    for tiling in _tilings(gates, H, spec, dtype, precision):
        weight_bytes = gates * tiling.units * tiling.warps * tiling.share(H) * dtype.itemsize
        split = _split_gluon if tiling.dialect == "Gluon" else _split_tile
        forward, backward = (split(exchanged, gates, H, tiling, dtype, spec) for exchanged in (1, gates))
        grid = (_tiles(H, tiling.units), _tiles(B, tiling.block_b), D)
        if not (forward and backward):
            refused = refused or NotImplementedError(
                f"no slice of W_hh fits a program: {as_text(weight_bytes)} for {tiling.units} units at H={H}, in "
                + ("registers and " if tiling.dialect == "Gluon" or spec.is_amd else "")
                + f"{as_text(spec.shared_bytes)} of shared memory on {spec.arch}, beside what a step needs"
            )
        elif math.prod(grid) > spec.multiprocessors:
            refused = GridTooLargeError(
                f"{math.prod(grid)} programs ({grid[0]} slices x {grid[1]} batch tiles x {D} directions) must run at "
                f"once, and {spec.multiprocessors} fit on {spec.arch}"
            )
        else:
            common = _common(name, H, B, T, D, dtype, precision, spec, tiling.dialect)
            if tiling.dialect == "Gluon":
                common["weight_place"] = "registers and shared memory"
            return KernelPlan(
                **common,
                block_b=tiling.block_b,
                units=tiling.units,
                share=tiling.share(H),
                grid=grid,
                warps=tiling.warps,
                register_limits=(None,) if tiling.dialect == "Gluon" else _register_limits(spec, tiling.warps),
                forward_splits=tuple(forward),
                backward_splits=tuple(backward),
                weight_bytes=weight_bytes,
                shared_bytes=max(*forward.values(), *backward.values()),
            )
    assert refused is not None
    raise refused


class Tiling(NamedTuple):
    """Of a grid-split kernel: rows of a batch tile, units and warps of a program."""

    dialect: str
    block_b: int
    units: int
    warps: int

    def share(self, H: int) -> int:
        """KernelPlan's."""
        return _tiles(H, 16 * self.warps) * 16


Splits = dict[tuple[int, int], int]  # KernelPlan's, in the order to try them, and the shared memory that each takes


def _split_tile(exchanged: int, gates: int, H: int, tiling: Tiling, dtype: torch.dtype, spec: DeviceSpec) -> Splits:
    """All of W_hh in one place."""
    _, block_b, units, warps = tiling
    share = tiling.share(H)
    weight_bytes = gates * units * warps * share * dtype.itemsize
    # Beside W_hh: a piece of the state on its way into the product, or what the warps sum.
    tiles = warps * block_b * max(min(PIECE_BYTES[0], share * dtype.itemsize), units * 4)
    shared_bytes = max(tiles, weight_bytes // gates) if spec.is_amd else tiles + weight_bytes
    # AMD: the LSTM at H=650 in fp32 (176 KiB) compiles clean, at H=1500 in bf16 (192 KiB) it spills 10 registers.
    if weight_bytes > (176 * KIB if spec.is_amd else spec.shared_bytes) or shared_bytes > spec.shared_bytes:
        return {}
    return {(size // dtype.itemsize, 0): shared_bytes for size in PIECE_BYTES}


def _split_gluon(exchanged: int, gates: int, H: int, tiling: Tiling, dtype: torch.dtype, spec: DeviceSpec) -> Splits:
    """W_hh in registers and shared memory, for a pass that exchanges so many gates: the most in registers first.

    Pieces of 64 bytes, the least that a thread reads by 16 bytes.
    """
    _, block_b, units, warps = tiling
    share, columns = tiling.share(H), PIECE_BYTES[1] // dtype.itemsize
    operands = [units * warps * k * dtype.itemsize for _, k in pieces(share, columns) for _ in range(gates)]
    ends = list(itertools.accumulate(operands))
    # What the warps sum, forward by gates, and what the grid barrier broadcasts.
    sums = gates // exchanged * warps * block_b * units * 4
    # Registers a thread. ptxas loads all of the exchanged state before it multiplies, unless it sees no room at all.
    beside = (exchanged * share * block_b * dtype.itemsize + gates * units * block_b * 4) // 128
    # With so few of W_hh's no kernel spilled; one that cannot go so low may find none: H=3328, RNN, sm_120, backward
    # spills 256 bytes with 128, 144 with 112; H=3456, sm_80, 16 with 72; H=2047, LSTM, sm_90, forward 8 with 96.
    aligned = H * dtype.itemsize % 16 == 0
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


def _tilings(gates: int, H: int, spec: DeviceSpec, dtype: torch.dtype, precision: str) -> Iterator[Tiling]:
    """Those that compile without spilling, in the order to try them.

    The smallest batch tile first: more programs a row of the batch, and W_hh of each batch tile's group once more on
    chip. Narrow slices first: modelled for the LSTM, H=384, bf16, sm_90, tile Triton, 16 units take 3500 cycles a step,
    32 take 6000. Four warps pad the state less than eight.
    """
    if spec.arch == "interpreter":  # a program's step costs it 10 ms, whatever its size
        yield Tiling("tile Triton", 16, 32, 2)
        return
    if _runs_gluon(dtype, precision, spec):
        for units in (16, 32):
            for block_b in (8, 16, 32):
                yield Tiling("Gluon", block_b, units, 8)
    if dtype == torch.float32 and precision == "ieee" and spec.has_tf32:  # FMA: 16 units spill (LSTM, H=650)
        yield Tiling("tile Triton", 16, 8, 8)
        return
    if spec.is_amd:  # its matrix cores take no fewer than 16 units; its SIMDs hold 512 registers a lane at 4 warps
        slices = [(16, 4), (32, 4)]
    else:
        slices = [(16, 8), (16, 4), (32, 8)] + [(8, 8)] * (dtype == torch.float32)
    for block_b in (16, 32):
        for units, warps in slices:
            # Wider tiles spill the larger cells, sooner where rows are not aligned to 16 bytes (LSTM, H=650, bf16).
            aligned = H * dtype.itemsize % 16 == 0
            two = aligned or gates < 4 or dtype.itemsize == 4
            four = aligned and gates * dtype.itemsize <= 6
            if {1: True, 2: two, 4: four}[max(1, block_b * units // 256)]:
                yield Tiling("tile Triton", block_b, units, warps)


def _runs_gluon(dtype: torch.dtype, precision: str, spec: DeviceSpec) -> bool:
    on_tensor_cores = spec.arch.startswith("sm_") and (dtype != torch.float32 or precision == "tf32")
    return on_tensor_cores and compiler.triton_version() >= (3, 7)


def _register_limits(spec: DeviceSpec, warps: int) -> tuple[int | None, ...]:
    """The compiler's choice, all that a program has if it is alone on its multiprocessor, and a few less."""
    if spec.is_amd:
        return (None,)
    most = _registers(spec, warps)
    return (None, most, most - 8)


def _registers(spec: DeviceSpec, warps: int) -> int:
    """The most registers that a thread of an only program can have."""
    return min(255, spec.register_bytes // (4 * spec.warp_size * warps))


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def pieces(size: int, at_most: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of powers of two that cover a size: 96 at most 64 is (0, 64), (64, 32)."""
    found, start = [], 0
    while start < size:
        piece = min(at_most, 1 << ((size - start).bit_length() - 1))
        found.append((start, piece))
        start += piece
    return tuple(found)


def _common(
    name: str,
    H: int,
    B: int,
    T: int,
    D: int,
    dtype: torch.dtype,
    precision: str,
    spec: DeviceSpec,
    dialect: str = "tile Triton",
) -> dict[str, Any]:
    """What a plan says whatever its tiles."""
    from .kernels.cells import CELLS

    return {
        "dialect": dialect,
        "spin_on_load": spec.is_amd,
        "precision": precision,
        "weight_place": "registers" if dialect == "Gluon" else weight_place(spec),
        "shared_limit": spec.shared_bytes,
        "saved_bytes": T * B * D * H * (CELLS[name].saved + CELLS[name].has_c) * dtype.itemsize,
    }


# Name: how to plan it, and why it is taken; in the order in which "auto" tries them.
TIERS = {
    "resident": (resident, "W_hh fits one program"),
    "cooperative": (cooperative, "its slices fit programs that run at once"),
}
