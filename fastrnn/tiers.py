"""The tiers: which sizes each holds, and in which tiles; pure functions from shapes and a DeviceSpec to a KernelPlan.

Every threshold is what compiled without spilling in Triton 3.9.0; tests/test_codegen.py compiles a grid of sizes again.
Cycles are modelled, not measured: change a choice here and `python -m fastrnn inspect` says what it gave.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from . import clusters
from .device import DeviceSpec
from .kernel_plan import KIB, GridTooLargeError, KernelPlan, as_text, common, registers, tiles
from .reference import GATES

# Of a row of the exchanged state that a warp multiplies at once: it holds these whole, and larger ones spill.
PIECE_BYTES = (128, 64)


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
    if plan := clusters.held(name, H, B, T, D, dtype, precision, spec, ctas=1):
        return plan
    # Beside W_hh, layout conversions pass through shared memory: at most one operand tile a gate.
    conversions = max(2, gates) * block_b * block_h * 4
    limit, place = _resident_limit(spec, dtype, precision), weight_place(spec)
    # On its way to registers W_hh passes through shared memory gate by gate, before the loop.
    shared_bytes = max(conversions, weight_bytes // gates) if place == "registers" else conversions + weight_bytes
    if weight_bytes > limit or shared_bytes > spec.shared_bytes:
        raise NotImplementedError(
            f"W_hh does not fit one program: {as_text(weight_bytes)} at H={H} (padded to {block_h}) of at most "
            f"{as_text(limit)} in {place} on {spec.arch}"
        )
    # Modelled for sm_90, LSTM, bf16: at H=64 16 warps take 1745 cycles a step, 8 take 2131; at H=32 1807 and 1790.
    # AMD's four SIMDs hold 512 registers a lane at 4 warps, and 8 spill.
    warps = 4 if spec.is_amd else 16 if block_h >= 64 else 8
    return KernelPlan(
        **common(name, H, B, T, D, dtype, precision, spec),
        dialect="tile Triton",
        block_b=block_b,
        units=block_h,
        grid=(tiles(B, block_b), D),
        ctas=1,
        warps=warps,
        choices=_choices(spec, warps, [{}]),
        weight_bytes=weight_bytes,
        weight_place=place,
        shared_bytes=shared_bytes,
    )


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
        share = tiles(H, 16 * warps) * 16  # columns that a warp sums
        weight_bytes = gates * units * warps * share * dtype.itemsize
        # Beside W_hh: a piece of the state on its way into the product, or what the warps sum.
        pieces_bytes = warps * block_b * max(min(PIECE_BYTES[0], share * dtype.itemsize), units * 4)
        on_the_way = weight_bytes // gates
        shared_bytes = max(pieces_bytes, on_the_way) if place == "registers" else pieces_bytes + weight_bytes
        if weight_bytes > limit or shared_bytes > spec.shared_bytes:
            continue
        fits = (tiles(H, units), tiles(B, block_b), D)
        if math.prod(fits) <= spec.multiprocessors:
            return KernelPlan(
                **common(name, H, B, T, D, dtype, precision, spec),
                dialect="tile Triton",
                block_b=block_b,
                units=units,
                grid=fits,
                ctas=1,
                warps=warps,
                choices=_choices(
                    spec, warps, [{"K_TILES": pieces(share, size // dtype.itemsize)} for size in PIECE_BYTES]
                ),
                weight_bytes=weight_bytes,
                weight_place=place,
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


def _choices(spec: DeviceSpec, warps: int, forms: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], ...]]:
    """Forms of a kernel with the compiler's choice of registers, all that an only program can have, and a few less.

    ptxas, left alone, saves registers for a second program and spills 8 bytes of one kernel in fifty; told how many
    there are, it spills more of others; and given registers for it, it loads all pieces of the state at once.
    """
    most = registers(spec, warps)
    limits: list[dict[str, Any]] = [{}] if spec.is_amd else [{}, {"maxnreg": most}, {"maxnreg": most - 8}]
    both = tuple(limit | form for limit in limits for form in forms)
    return {"forward": both, "backward": both}


def pieces(size: int, at_most: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of powers of two that cover a size: 96 at most 64 is (0, 64), (64, 32)."""
    found, start = [], 0
    while start < size:
        piece = min(at_most, 1 << ((size - start).bit_length() - 1))
        found.append((start, piece))
        start += piece
    return tuple(found)


# Name: how to plan it, and why it is taken; in the order in which "auto" tries them.
TIERS = {
    "resident": (resident, "W_hh fits one program"),
    "cluster": (clusters.cluster, "a cluster of programs holds W_hh"),
    "cooperative": (cooperative, "its slices fit programs that run at once"),
}
