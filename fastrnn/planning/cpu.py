"""Whether CPU tensors take our kernels, machine code of this CPU by LLVM: by price, as far as was measured.

fastrnn/planning/cpu.json, by `python -m bench.cpu --prices`, has how many times as fast as torch's kernel ours is, on
one thread: by cell, by what else a call asks for (KINDS), by pass, over T, B and H. Between what was measured the worst
of the neighbours counts. That file is of one machine: delete a cell from it, and torch's runs.
"""

import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from ..device import DeviceSpec

NAME = "cpu"
# Asked on import: torch.compile cannot trace the question.
MISSING = [package for package in ("llvmlite", "triton") if find_spec(package) is None]
DTYPES = (torch.float32, torch.float64)
SPEC = DeviceSpec(NAME, "this CPU", 1, 1 << 62, 1 << 62, 1, 1, has_tf32=False)
FILE = Path(__file__).with_suffix(".json")
PRICES: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
# Below it, what was measured may be chance, and the first call's compiling does not pay.
LEAST = 1.1
LEAST_ELEMENTS, LEAST_STEPS = 2048, 16
# What torch's kernels take several calls for, the least first: one that was not measured costs as much as that before.
KINDS = ("lengths", "resets", "cell states")


def spec(dtype: torch.dtype, device: "str | torch.device | None" = None) -> DeviceSpec:
    """The CPU, for tensors that its kernels take; raises NotImplementedError, naming what is missing, for others."""
    if device is not None and str(device) != "cpu":
        raise NotImplementedError(f"backend='cpu': its kernels run on CPU tensors; one for {device} is missing")
    if dtype not in DTYPES:
        raise NotImplementedError(f"backend='cpu': a kernel for {dtype} is missing; there are float32 and float64")
    if MISSING:
        raise NotImplementedError(f"backend='cpu': {' and '.join(MISSING)} is missing: pip install fastrnn[cpu]")
    return SPEC


def times_as_fast(cell: str, T: int, B: int, H: int, kind: str = "", training: bool = True) -> float | None:
    """As torch's kernel, or None where that was not measured; kind: one of KINDS, or none.

    >>> from fastrnn.planning.cpu import times_as_fast
    >>> times_as_fast("gru", 128, 8, 64) > 2
    True
    """
    ratios = _ratios(cell, kind, training)
    if ratios is None:
        return None
    places = [_around(PRICES[axis], size) for axis, size in (("T", T), ("B", B), ("H", H))]
    found = min(ratios[t][b][h] for t, b, h in product(*places))
    if kind == "lengths" and PRICES["T"][-1] < T:
        # torch runs what lies between two sequences' ends as one, which is the longer, the more steps there are.
        whole = times_as_fast(cell, T, B, H, "", training)
        return found if whole is None else min(found, whole)
    return found


def _ratios(cell: str, kind: str, training: bool) -> Any:
    """What was measured of this pass, or of both the less; else of the kind before."""
    measured = PRICES.get("ratios", {})
    for of_kind in KINDS[KINDS.index(kind) :: -1] if kind else ("",):
        name = f"{cell}, {of_kind}" if of_kind else cell
        for key in (f"{name}, {'training' if training else 'inference'}", name):
            if key in measured:
                return measured[key]
    return None


def _around(measured: list[int], size: int) -> set[int]:
    """The places of the next smaller and the next larger one."""
    place = sum([other < size for other in measured])  # torch.compile traces no bisect
    if place < len(measured) and measured[place] == size:
        return {place}
    return {max(place - 1, 0), min(place, len(measured) - 1)}


def choose(
    cell: str, sizes: tuple[int, int, int], dtype: torch.dtype, lacking: str = "", kind: str = "", training: bool = True
) -> tuple[str, str]:
    """The backend, and why; sizes: T, B and H. lacking: what torch's kernel lacks, if anything; kind: one of KINDS."""
    fallback = f"the reference: torch has no kernel {lacking}" if lacking else "torch's own kernel"
    backend = "reference" if lacking else "torch"
    try:
        spec(dtype)
    except NotImplementedError as reason:
        return backend, f"CPU tensors take {fallback}; {reason}"
    if lacking:
        return NAME, f"torch has no kernel {lacking}"
    if sizes[0] <= LEAST_STEPS and not kind:
        return backend, f"CPU tensors take {fallback}: {LEAST_STEPS} steps, or fewer, are over before a choice pays"
    found = times_as_fast(cell, *sizes, kind, training) if dtype == torch.float32 else None
    of_kind = f" with {kind}" if kind else ""
    if found is None:
        return backend, f"CPU tensors take {fallback}: ours was not measured{of_kind} at {dtype}"
    if found < LEAST:
        return backend, f"CPU tensors take {fallback}: ours was measured {found:.2f} times as fast{of_kind}, or less"
    return NAME, f"measured {found:.1f} times as fast as torch's kernel{of_kind}, at least"


def may_pay(mode: str, input: Any, batch_first: bool) -> bool:
    """Whether a plan may say "cpu" for a layer that torch has: less input takes torch as long as the question."""
    packed = isinstance(input, PackedSequence)
    if mode == "LSTM" and not packed:
        return False
    data = input.data if packed else input
    if data.numel() < LEAST_ELEMENTS:
        return False
    T = len(input.batch_sizes) if packed else data.shape[1 if batch_first and data.dim() == 3 else 0]
    return T > LEAST_STEPS
