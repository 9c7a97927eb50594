"""The tiers: which sizes each holds, and in which tiles; pure functions from shapes and a DeviceSpec to a KernelPlan.

Every threshold is what compiled without spilling in Triton 3.9.0; tests/test_codegen.py compiles a grid of sizes again.
Cycles are modelled, not measured: change a choice here and `python -m fastrnn inspect` says what it gave.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import compiler
from .device import DeviceSpec
from .reference import GATES

KIB = 1024
# Of a row of the exchanged state that a warp multiplies at once: it holds these whole, and larger ones spill.
PIECE_BYTES = (128, 64)
# Not exact where the tensors' rounding hides it: over T = 4096 steps of an LSTM the error against fp64 grows by at most
# a factor of 1.8 in bf16; in fp16 tanh.approx would make it up to 14 times as large (python -m bench.accuracy).
ACTIVATIONS = {torch.bfloat16: "tanh.approx", torch.float16: "exp2"}


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
    piece_limits: tuple[int, ...]  # columns that are multiplied at once
    spin_on_load: bool  # how a program waits at the grid barrier
    precision: str  # of fp32 products, as Triton's input_precision: "ieee" or "tf32"
    activations: str  # how they are computed, as kernels/activations.py names it
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
        piece_limits=(block_h,),
        weight_bytes=weight_bytes,
        shared_bytes=shared_bytes,
    )


def _gluon_warps(gates: int, block_h: int, dtype: torch.dtype, precision: str, spec: DeviceSpec) -> int | None:
    """Warps of the Gluon kernel, each with 8 or 16 columns of the product; None where it does not run, or spills."""
    on_tensor_cores = spec.arch.startswith("sm_") and (dtype != torch.float32 or precision == "tf32")
    if not on_tensor_cores or compiler.triton_version() < (3, 7):
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
    # AMD: the LSTM at H=650 in fp32 (176 KiB) compiles clean, at H=1500 in bf16 (192 KiB) it spills 10 registers.
    limit, place = 176 * KIB if spec.is_amd else spec.shared_bytes, weight_place(spec)
    fits = None
    for block_b, units, warps in _tilings(gates, H, spec, dtype, precision):
        share = _tiles(H, 16 * warps) * 16
        weight_bytes = gates * units * warps * share * dtype.itemsize
        # Beside W_hh: a piece of the state on its way into the product, or what the warps sum.
        tiles = warps * block_b * max(min(PIECE_BYTES[0], share * dtype.itemsize), units * 4)
        shared_bytes = max(tiles, weight_bytes // gates) if place == "registers" else tiles + weight_bytes
        if weight_bytes > limit or shared_bytes > spec.shared_bytes:
            continue
        fits = (_tiles(H, units), _tiles(B, block_b), D)
        if math.prod(fits) <= spec.multiprocessors:
            return KernelPlan(
                **_common(name, H, B, T, D, dtype, precision, spec),
                block_b=block_b,
                units=units,
                share=share,
                grid=fits,
                warps=warps,
                register_limits=_register_limits(spec, warps),
                piece_limits=tuple(size // dtype.itemsize for size in PIECE_BYTES),
                weight_bytes=weight_bytes,
                shared_bytes=shared_bytes,
            )
    if fits is None:
        raise NotImplementedError(
            f"no slice of W_hh fits a program: {as_text(weight_bytes)} for {units} units at H={H}, of at most "
            f"{as_text(limit)} in {place} on {spec.arch}; slices over both memories are missing"
        )
    raise GridTooLargeError(
        f"{math.prod(fits)} programs ({fits[0]} slices x {fits[1]} batch tiles x {D} directions) must run at once, and "
        f"{spec.multiprocessors} fit on {spec.arch}"
    )


def _tilings(
    gates: int, H: int, spec: DeviceSpec, dtype: torch.dtype, precision: str
) -> Iterator[tuple[int, int, int]]:
    """(rows of a batch tile, units and warps of a program) that compile without spilling, in the order to try them.

    The smallest batch tile first: more programs a row of the batch, and W_hh of each batch tile's group once more on
    chip. Narrow slices first: modelled for the LSTM, H=384, bf16, sm_90, 16 units take 3500 cycles a step, 32
    take 6000.
    Four warps pad the state less than eight.
    """
    if dtype == torch.float32 and precision == "ieee" and spec.has_tf32:  # FMA: 16 units spill (LSTM, H=650)
        yield 16, 8, 8
        return
    if spec.arch == "interpreter":  # a program's step costs it 10 ms, whatever its size
        yield 16, 32, 2
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
                yield block_b, units, warps


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
        "activations": ACTIVATIONS.get(dtype, "exact") if spec.arch.startswith("sm_") else "exact",
        "weight_place": "registers" if dialect == "Gluon" else weight_place(spec),
        "shared_limit": spec.shared_bytes,
        "saved_bytes": T * B * D * H * (CELLS[name].saved + CELLS[name].has_c) * dtype.itemsize,
    }


# Name: how to plan it, and why it is taken; in the order in which "auto" tries them.
TIERS = {
    "resident": (resident, "W_hh fits one program"),
    "cooperative": (cooperative, "its slices fit programs that run at once"),
}
