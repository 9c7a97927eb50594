"""The tiers: which sizes each holds, and in which tiles; pure functions from shapes and a DeviceSpec to a KernelPlan.

Every threshold is what compiled without spilling in Triton 3.9.0: the resident tier for all nine architectures, the
cooperative one for sm_80, 90, 100, 120 and gfx942 at H up to 1024, where CHANGELOG.md lists four kernels that still
spill; tests/test_codegen.py compiles a part of that again. Cycles are modelled, not measured: change a choice here and
`python -m bench.cross_compile` says what it gave.
"""

import functools
import math
from dataclasses import dataclass

import torch

from .device import DeviceSpec
from .reference import GATES

KIB = 1024


@dataclass(frozen=True)
class Launch:
    """What one pass's launch leaves to the compiler, and what not."""

    warps: int
    max_registers: int | None = None  # a thread; None: the compiler's choice


@dataclass(frozen=True)
class KernelPlan:
    """How a persistent kernel is launched: tiles, warps, programs, and where W_hh stays."""

    dialect: str
    block_b: int  # rows of a batch tile
    units: int  # hidden units that a program owns, padding included
    k_tiles: tuple[tuple[int, int], ...]  # (start, size) of the pieces of H that are multiplied at once
    grid: tuple[int, ...]  # (batch tiles, directions), or (slices of H, batch tiles, directions)
    forward: Launch
    backward: Launch
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


def weight_limit(spec: DeviceSpec, dtype: torch.dtype, precision: str) -> tuple[int, str]:
    """The most bytes of W_hh that one program holds without spilling, and where."""
    if spec.arch == "interpreter":
        return spec.shared_bytes, "arrays"
    if spec.is_amd:  # an operand of a product stays in registers; above 64 KiB (LSTM, H=128) 200 and more spill
        return 64 * KIB, "registers"
    if _uses_fma(spec, dtype, precision):  # the GRU at H=128 (192 KiB) spills 880 bytes
        return min(64 * KIB, spec.shared_bytes), "shared memory"
    return spec.shared_bytes, "shared memory"


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
    # Beside W_hh, layout conversions pass through shared memory: at most one operand tile a gate.
    tiles = max(2, gates) * block_b * block_h * 4
    limit, place = weight_limit(spec, dtype, precision)
    # On its way to registers W_hh passes through shared memory gate by gate, before the loop.
    shared_bytes = max(tiles, weight_bytes // gates) if place == "registers" else tiles + weight_bytes
    if weight_bytes > limit or shared_bytes > spec.shared_bytes:
        raise NotImplementedError(
            f"W_hh does not fit one program: {as_text(weight_bytes)} at H={H} (padded to {block_h}) of at most "
            f"{as_text(limit)} in {place} on {spec.arch}"
        )
    # Modelled for sm_90, LSTM, bf16: at H=64 16 warps take 1745 cycles a step and 8 take 2131; at H=32 1807 and 1790.
    # AMD's four SIMDs hold 512 registers a lane at 4 warps, and 8 spill.
    warps = 4 if spec.is_amd else 16 if block_h >= 64 else 8
    # Left alone, ptxas keeps registers for a second program: it then spills 8 to 16 bytes of some fp32 kernels (FMA
    # products, and the small RNNs). Given all but 8 registers a thread it spills none of those, but 8 to 32 bytes of
    # the LSTM and GRU on tensor cores, which it leaves alone otherwise.
    fills_file = _uses_fma(spec, dtype, precision) or (dtype == torch.float32 and gates == 1 and not spec.is_amd)
    launch = Launch(warps, _nearly_all_registers(spec, warps) if fills_file else None)
    return KernelPlan(
        dialect="tile Triton",
        block_b=block_b,
        units=block_h,
        k_tiles=((0, block_h),),
        grid=(_tiles(B, block_b), D),
        forward=launch,
        backward=launch,
        spin_on_load=False,
        precision=precision,
        weight_bytes=weight_bytes,
        weight_place=place,
        shared_bytes=shared_bytes,
        shared_limit=spec.shared_bytes,
        saved_bytes=_saved_bytes(name, H, B, T, D, dtype),
    )


@functools.lru_cache(maxsize=1024)
def cooperative(
    name: str, H: int, B: int, T: int, D: int, dtype: torch.dtype, precision: str, spec: DeviceSpec
) -> KernelPlan:
    gates = GATES[name]
    precision = precision if spec.has_tf32 else "ieee"
    if _uses_fma(spec, dtype, precision):
        raise NotImplementedError(
            "a split kernel with full-precision float32 products is missing on NVIDIA (FMA products spill there); "
            "torch.backends.cudnn.rnn.fp32_precision = 'tf32' runs on tensor cores"
        )
    # A piece of the exchanged state is an operand that every warp holds whole: above 128 columns it spills. Powers of
    # two cover H up to the next multiple of 32, so that H = 650 costs 672.
    k_tiles = _power_of_two_pieces(_tiles(H, 32) * 32, at_most=128)
    k = sum(size for _, size in k_tiles)
    # As above: left alone, ptxas spills 8 or 16 bytes here and there; told to use all registers, it spills up to 136
    # bytes of long forward steps (LSTM, H=1024) and 8 to 24 of long 16-bit backward ones. Found for sm_90; sm_80
    # and sm_120 want other rules at a few sizes (CHANGELOG.md).
    if spec.is_amd:
        forward = backward = Launch(warps=4)
    else:
        cap = _nearly_all_registers(spec, 8)
        forward = Launch(8, cap if gates * k <= 1152 and not (gates == 1 and dtype == torch.float32) else None)
        backward = Launch(8, cap if dtype == torch.float32 or gates == 1 or k <= 384 else None)
    limit, place = weight_limit(spec, dtype, precision)
    fits = None
    # The smallest batch tile first: more programs a row of the batch, and W_hh of each batch tile's group once more on
    # chip. Then the widest slice: fewer programs meet at the barrier, and 32 units leave no warp without own columns.
    for block_b in (16, 32):
        for units in (32, 16):
            weight_bytes = gates * units * k * dtype.itemsize
            tiles = 2 * block_b * max(size for _, size in k_tiles) * 4 + gates * block_b * units * 4
            shared_bytes = max(tiles, weight_bytes // gates) if place == "registers" else tiles + weight_bytes
            if weight_bytes > limit or shared_bytes > spec.shared_bytes:
                continue
            grid = (_tiles(H, units), _tiles(B, block_b), D)
            fits = grid
            if math.prod(grid) <= spec.multiprocessors:
                return KernelPlan(
                    dialect="tile Triton",
                    block_b=block_b,
                    units=units,
                    k_tiles=k_tiles,
                    grid=grid,
                    forward=forward,
                    backward=backward,
                    spin_on_load=spec.is_amd,
                    precision=precision,
                    weight_bytes=weight_bytes,
                    weight_place=place,
                    shared_bytes=shared_bytes,
                    shared_limit=spec.shared_bytes,
                    saved_bytes=_saved_bytes(name, H, B, T, D, dtype),
                )
    if fits is None:
        raise NotImplementedError(
            f"16 units' slice of W_hh does not fit a program: {as_text(gates * 16 * k * dtype.itemsize)} at H={H} "
            f"of at most {as_text(limit)} in {place} on {spec.arch}; slices over both memories are missing"
        )
    raise GridTooLargeError(
        f"{math.prod(fits)} programs ({fits[0]} slices x {fits[1]} batch tiles x {D} directions) must run at once, and "
        f"{spec.multiprocessors} fit on {spec.arch}"
    )


def _nearly_all_registers(spec: DeviceSpec, warps: int) -> int:
    """Registers a thread if one program has the multiprocessor to itself, less 8."""
    return min(255, spec.register_bytes // (4 * spec.warp_size * warps)) - 8


def _uses_fma(spec: DeviceSpec, dtype: torch.dtype, precision: str) -> bool:
    """Whether products run on NVIDIA's FMA units: tensor cores have no full fp32 there; AMD's have."""
    return dtype == torch.float32 and precision == "ieee" and spec.arch.startswith("sm_")


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power_of_two_pieces(size: int, at_most: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of powers of two that cover a size: 672 at most 256 is 256, 256, 128, 32."""
    pieces, start = [], 0
    while start < size:
        piece = min(at_most, 1 << ((size - start).bit_length() - 1))
        pieces.append((start, piece))
        start += piece
    return tuple(pieces)


def _saved_bytes(name: str, H: int, B: int, T: int, D: int, dtype: torch.dtype) -> int:
    from .kernels.cells import CELLS

    return T * B * D * H * (CELLS[name].saved + CELLS[name].has_c) * dtype.itemsize


# Name: how to plan it, and why it is taken; in the order in which "auto" tries them.
TIERS = {
    "resident": (resident, "W_hh fits one program"),
    "cooperative": (cooperative, "its slices fit programs that run at once"),
}
