"""Plans of kernels/gluon/resident.py: W_hh in the registers and shared memory of one program, or of a cluster's.

Thresholds are what compiled without spilling in Triton 3.9.0; times were measured on an H100 (bench/measured/).
"""

import math

import torch

from ..compat import spills
from ..compat.cached import cached
from ..device import CLUSTERS, DeviceSpec
from . import prices, tuning
from .kernel_plan import KIB, KernelPlan, Request, as_text, common, registers, runs_gluon, tiles

BLOCK_B = 16  # the rows of tensor cores' left operand: more programs serve a large batch
# Units fill these rows where batch tiles are the 8 columns of the right operand: half of the work a step, in twice the
# programs. Simulated (sm_90, bf16, cycles forward and backward): LSTM, H=64, 1065 and 1044 to 691 and 678.
NARROW_B = 8
# Where programs come in waves: a step of 32 rows takes less than two of 16. Simulated (sm_90, bf16, cycles forward and
# backward): RNN, H=64, 465 and 509 to 704 and 746; LSTM, H=128, four programs, 1420 and 1322 to 2245 and 2188.
TALL_B = (32, 64)
# Numbers of a state that a thread of such a tile has: with 16 some spill (LSTM, H=256, four programs, 64 rows).
MOST_OF_A_STATE = 8
# 256 KiB in a program alone spill in every form (LSTM, H=128, fp32), 192 KiB in one of a cluster (GRU, H=384 on eight).
MOST_WEIGHTS = 192 * KIB
MOST_WEIGHTS_OF_CLUSTER = 128 * KIB
# A pass that must leave more in registers, for want of shared memory, may spill (GRU, H=128, tf32, sm_120, backward:
# 128 KiB); the RNN, which needs the fewest beside it, does not. In tall tiles it does, and others sooner (RNN, H=512,
# four programs: 128 KiB; GRU, H=256, tf32, eight programs, 64 rows: 32 KiB).
LEAST_IN_REGISTERS = 96 * KIB
LEAST_IN_REGISTERS_OF_TALL = 24 * KIB


def in_rows(request: Request, plan: KernelPlan) -> KernelPlan:
    """The plan in batch tiles of 8 rows where its programs run at once, of more, by price, where they come in waves."""
    narrow = held(request, plan.ctas, NARROW_B)
    if narrow and (narrow.grid == plan.grid or run_at_once(narrow, request.spec)):
        return narrow
    if run_at_once(plan, request.spec):
        return plan
    taller = [held(request, plan.ctas, rows) for rows in TALL_B]
    return prices.cheapest([plan, *[found for found in taller if found is not None]], request)


def held(request: Request, ctas: int, block_b: int = BLOCK_B) -> KernelPlan | None:
    """The plan for clusters of so many programs, None where they do not hold W_hh or cannot run."""
    if not runs_gluon(request):
        return None
    spec, gates, block_h, itemsize = request.spec, request.gates, request.padded, request.dtype.itemsize
    units = block_h // ctas
    weight_bytes = gates * block_h * units * itemsize
    gate_bytes = weight_bytes // gates
    # Measured (H100, bf16, B=16, us a step forward and backward): at the LSTM's H=128, 8 warps take 1.53 and 1.28, 16
    # take 1.68 and 1.38. Only 16 keep a gate of 128 KiB in registers: RNN, H=256, 0.93 and 1.01 against 0.85 and 1.38.
    warps = 16 if gate_bytes >= 128 * KIB and block_b > NARROW_B else min(8, block_h // 8)
    if weight_bytes > (MOST_WEIGHTS if ctas == 1 else MOST_WEIGHTS_OF_CLUSTER):
        return None
    is_tall = block_b > BLOCK_B
    if is_tall and block_b * units > MOST_OF_A_STATE * 32 * warps:
        return None
    most_in_registers = LEAST_IN_REGISTERS_OF_TALL if is_tall else LEAST_IN_REGISTERS if gates > 1 else MOST_WEIGHTS
    choices, shared_bytes = {}, 0
    for which in ("forward", "backward"):
        shares = _shares(which, gates, block_h, units, block_b, warps, ctas, itemsize)
        forms: list[dict[str, int]] = []
        for in_registers in range(gates, -1, -1):
            in_shared = (gates - in_registers) * gate_bytes
            fitting = [(count, kept) for count, kept in shares if kept + in_shared <= spec.shared_bytes]
            if fitting and in_registers * gate_bytes <= _register_room(spec, warps):
                count, kept = fitting[0]
                form = {"SHARES": count, "IN_REGISTERS": in_registers}
                forms += [form] if which == "backward" else [form | {"BIAS_KEPT": stays} for stays in (True, False)]
                shared_bytes = max(shared_bytes, kept + in_shared)
        if not forms or forms[-1]["IN_REGISTERS"] * gate_bytes > most_in_registers:
            return None
        choices[which] = tuple(forms)
    return KernelPlan(
        **common(request),
        dialect="Gluon",
        block_b=block_b,
        units=units,
        grid=(tiles(request.B, block_b), request.recurrences),
        ctas=ctas,
        warps=warps,
        form={"BLOCK_B": block_b, "BLOCK_H": block_h},
        choices=choices,
        weight_bytes=weight_bytes,
        weight_place="registers and shared memory",
        shared_bytes=shared_bytes,
    )


def _register_room(spec: DeviceSpec, warps: int) -> int:
    """Bytes of registers that W_hh may take: no kernel compiled with fewer than 60 a thread beside it."""
    return (registers(spec, warps) - 60) * 4 * 32 * warps


def _shares(
    which: str, gates: int, block_h: int, units: int, block_b: int, warps: int, ctas: int, itemsize: int
) -> list[tuple[int, int]]:
    """How many groups of warps may share a product's sum, and the bytes of shared memory that it takes beside W_hh.

    Those that leave each warp 8 columns (16 where they are the left operand's) and 16 units at least; first those that
    move the fewest bytes through shared memory in a step: operands, which each warp of a group reads whole, and
    summands, written and read once.
    """
    found = []
    depth, columns = (block_h, units) if which == "forward" else (units, block_h)
    operands = 1 if which == "forward" else gates
    sums = gates if which == "forward" else 1
    for shares in (1, 2, 4, 8, 16):
        if depth // shares >= 16 and 1 <= warps // shares <= columns // (16 if block_b == NARROW_B else 8):
            operand = operands * block_b * depth * itemsize
            summand = sums * shares * block_b * columns * 4
            moved = operand * warps // shares + 2 * summand
            if which == "forward":  # h, double in the exchange between programs or for the only one
                kept = (2 * operand if ctas == 1 else operand + 2 * operand // ctas) + summand
            else:
                kept = operand + 2 * summand
            found.append((moved, shares, kept))
    return [(shares, kept) for _, shares, kept in sorted(found)]


@cached
def cluster(request: Request) -> KernelPlan:
    """Plan W_hh over the programs of a cluster: as many as shorten a step while all clusters run at once."""
    spec = request.spec
    if spec.cluster_limit == 1:
        raise NotImplementedError(f"{spec.arch} has no thread-block clusters")
    if spills.triton_version() < (3, 8):
        raise NotImplementedError("clusters in Gluon need Triton 3.8 or newer")
    if request.dtype == torch.float32 and request.precision == "ieee":
        raise NotImplementedError("a kernel for full-precision float32 products over clusters is missing; tf32 runs")
    # Measured (H100, bf16, B=16, us a step forward and backward): LSTM, H=256, eight programs take 1.31 and 1.33, four
    # 1.55 and 1.53; H=128, four 1.02 and 0.75, two 1.13 and 0.95. Fewer than 32 units each are for what fits no others.
    sizes = [ctas for ctas in CLUSTERS if ctas <= spec.cluster_limit and spec.at_once(ctas)]
    plans = [in_rows(request, plan) for plan in [held(request, ctas) for ctas in sizes] if plan is not None]
    wide = [plan for plan in plans if plan.units >= 32] or plans[:1]
    fits = prices.cheapest(wide, request) if wide else None
    key = tuning.cluster_key(request, tiles(request.B, BLOCK_B) * request.recurrences)
    ctas = tuning.of(spec.arch).ctas.get(key, 0)
    if 0 < ctas <= spec.cluster_limit and spec.at_once(ctas):
        tuned = held(request, ctas)
        fits = fits if tuned is None else in_rows(request, tuned)
    if fits is None:
        largest = max([1, *sizes])
        raise NotImplementedError(
            f"W_hh does not fit a cluster of {largest} programs: "
            f"{as_text(request.gates * request.padded**2 * request.dtype.itemsize)} at H={request.H} "
            f"(padded to {request.padded}) on {spec.arch}"
        )
    return fits


def run_at_once(kernel: KernelPlan, spec: DeviceSpec, launches: int = 1) -> bool:
    """Whether no program of so many launches must wait for a multiprocessor."""
    return launches * kernel.parts * math.prod(kernel.grid) <= spec.at_once(kernel.ctas)
