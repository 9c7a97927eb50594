"""Plans of the resident tier: one program holds all of W_hh, in Gluon (cluster.py) or, here, in tile Triton.

Thresholds are what compiled without spilling in Triton 3.9.0. Cycles are modelled, not measured: change a choice here
and `python -m fastrnn inspect` says what it gave.
"""

import torch

from ..compat.cached import cached
from .cluster import BLOCK_B, held, in_rows
from .kernel_plan import KIB, KernelPlan, Request, as_text, common, register_limits, tiles, weight_place


def _limit(request: Request) -> int:
    """The most bytes of W_hh that one program holds without spilling."""
    spec = request.spec
    # AMD: the sLSTM, of four states, spills 160 bytes with 64 KiB (H=64 in fp32), and none with 32.
    if spec.is_amd and request.of_cell.wide:
        return 32 * KIB
    # AMD: above 64 KiB (LSTM, H=128) 200 registers and more spill. FMA: the GRU at H=128 (192 KiB) spills 880 bytes.
    if spec.is_amd or (request.precision == "ieee" and request.dtype == torch.float32 and spec.has_tf32):
        return min(64 * KIB, spec.shared_bytes)
    return spec.shared_bytes


@cached
def resident(request: Request) -> KernelPlan:
    spec, gates, block_h = request.spec, request.gates, request.padded
    if not spec.has_tf32:
        request = request._replace(precision="ieee")
    weight_bytes = gates * block_h**2 * request.dtype.itemsize
    if plan := held(request, ctas=1):
        return in_rows(request, plan)
    # In tile Triton a batch tile of 32 was modelled at 1.6 times the cycles of 16 (LSTM, H=64, sm_90: 2848 and 1745)
    # and spilled at H=128: more programs serve a large batch.
    block_b = BLOCK_B
    # Beside W_hh, layout conversions pass through shared memory: at most one operand tile a gate.
    conversions = max(2, gates) * block_b * block_h * 4
    limit, place = _limit(request), weight_place(spec)
    # On its way to registers W_hh passes through shared memory gate by gate, before the loop.
    shared_bytes = max(conversions, weight_bytes // gates) if place == "registers" else conversions + weight_bytes
    if weight_bytes > limit or shared_bytes > spec.shared_bytes:
        raise NotImplementedError(
            f"W_hh does not fit one program: {as_text(weight_bytes)} at H={request.H} (padded to {block_h}) of at most "
            f"{as_text(limit)} in {place} on {spec.arch}"
        )
    # Modelled for sm_90, LSTM, bf16: at H=64 16 warps take 1745 cycles a step, 8 take 2131; at H=32 1807 and 1790.
    # AMD's four SIMDs hold 512 registers a lane at 4 warps, and 8 spill.
    warps = 4 if spec.is_amd else 16 if block_h >= 64 else 8
    return KernelPlan(
        **common(request),
        dialect="tile Triton",
        block_b=block_b,
        units=block_h,
        grid=(tiles(request.B, block_b), request.recurrences),
        ctas=1,
        warps=warps,
        form={"BLOCK_B": block_b, "BLOCK_H": block_h},
        choices=dict.fromkeys(("forward", "backward"), register_limits(spec, warps)),
        weight_bytes=weight_bytes,
        weight_place=place,
        shared_bytes=shared_bytes,
    )
