"""The tiers: which sizes each holds; pure functions from shapes and a DeviceSpec to a KernelPlan.

Here: the resident tier in tile Triton, and the table of all. Thresholds are what compiled without spilling in Triton
3.9.0. Cycles are modelled, not measured: change a choice here and `python -m fastrnn inspect` says what it gave.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..compat.cached import cached
from ..device import DeviceSpec
from ..reference import GATES
from . import cluster, cooperative
from .kernel_plan import KIB, KernelPlan, as_text, common, register_limits, tiles, weight_place


def _resident_limit(spec: DeviceSpec, dtype: torch.dtype, precision: str) -> int:
    """The most bytes of W_hh that one resident program holds without spilling."""
    # AMD: above 64 KiB (LSTM, H=128) 200 registers and more spill. FMA: the GRU at H=128 (192 KiB) spills 880 bytes.
    if spec.is_amd or (precision == "ieee" and dtype == torch.float32 and spec.has_tf32):
        return min(64 * KIB, spec.shared_bytes)
    return spec.shared_bytes


@cached
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
    if plan := cluster.held(name, H, B, T, D, dtype, precision, spec, ctas=1):
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
        choices=dict.fromkeys(("forward", "backward"), register_limits(spec, warps)),
        weight_bytes=weight_bytes,
        weight_place=place,
        shared_bytes=shared_bytes,
    )


class Tier(NamedTuple):
    """One way to hold W_hh on chip."""

    plan: Callable[..., KernelPlan]
    why: str  # it is taken


# The fewest programs first.
TIERS = {
    "resident": Tier(resident, "W_hh fits one program"),
    "cluster": Tier(cluster.cluster, "a cluster of programs holds W_hh"),
    "cooperative": Tier(cooperative.cooperative, "its slices fit programs that run at once"),
}


def in_order(
    name: str, H: int, B: int, T: int, D: int, dtype: torch.dtype, precision: str, spec: DeviceSpec
) -> dict[str, str]:
    """The tiers in the order in which "auto" tries them, and why each is taken.

    One program is the slower one where a cluster has a multiprocessor for each of its own. Measured (H100, bf16, B=16,
    us a step forward and backward): LSTM, H=128, 1.02 and 0.75 by clusters of four, 1.53 and 1.28 by one program; GRU
    0.83 and 0.70, 1.21 and 1.05. Other architectures, float32 and smaller sizes were not measured.
    """
    order = {tier: TIERS[tier].why for tier in TIERS}
    if spec.arch == "sm_90" and dtype.itemsize == 2 and GATES[name] > 1 and 64 < H <= 128:
        try:
            together = cluster.cluster(name, H, B, T, D, dtype, precision, spec)
        except NotImplementedError:
            return order
        if cluster.run_at_once(together, spec):
            del order["cluster"]
            return {"cluster": "a cluster of programs takes less time than one that holds all of W_hh"} | order
    return order
