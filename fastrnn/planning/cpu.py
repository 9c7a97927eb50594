"""Whether CPU tensors take our kernels, machine code of this CPU by LLVM: by price, as far as was measured.

fastrnn/planning/cpu.json, by `python -m bench.cpu --prices`, has how many times as fast as torch's kernel ours is, the
less of inference and training, one thread: by cell, with and without lengths, over T, B and H. Between what was
measured the worst of the neighbours counts. That file is of one machine: delete a cell from it, and torch's runs.
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


def spec(dtype: torch.dtype, device: "str | torch.device | None" = None) -> DeviceSpec:
    """The CPU, for tensors that its kernels take; raises NotImplementedError, naming what is missing, for others."""
    if device is not None and str(device) != "cpu":
        raise NotImplementedError(f"backend='cpu': its kernels run on CPU tensors; one for {device} is missing")
    if dtype not in DTYPES:
        raise NotImplementedError(f"backend='cpu': a kernel for {dtype} is missing; there are float32 and float64")
    if MISSING:
        raise NotImplementedError(f"backend='cpu': {' and '.join(MISSING)} is missing: pip install fastrnn[cpu]")
    return SPEC


def times_as_fast(cell: str, T: int, B: int, H: int, apart: bool = False) -> float | None:
    """As torch's kernel, or None where that was not measured; apart: with lengths or resets.

    >>> from fastrnn.planning.cpu import times_as_fast
    >>> times_as_fast("gru", 128, 8, 64) > 2
    True
    """
    ratios = PRICES.get("ratios", {}).get(f"{cell}, lengths" if apart else cell)
    if ratios is None:
        return None
    places = [_around(PRICES[axis], size) for axis, size in (("T", T), ("B", B), ("H", H))]
    return min(ratios[t][b][h] for t, b, h in product(*places))


def _around(measured: list[int], size: int) -> set[int]:
    """The places of the next smaller and the next larger one."""
    place = sum([other < size for other in measured])  # torch.compile traces no bisect
    if place < len(measured) and measured[place] == size:
        return {place}
    return {max(place - 1, 0), min(place, len(measured) - 1)}


def choose(
    cell: str, sizes: tuple[int, int, int], dtype: torch.dtype, lacking: str = "", apart: bool = False
) -> tuple[str, str]:
    """The backend, and why; sizes: T, B and H. lacking: what torch's kernel lacks, if anything; apart: with lengths."""
    fallback = f"the reference: torch has no kernel {lacking}" if lacking else "torch's own kernel"
    backend = "reference" if lacking else "torch"
    try:
        spec(dtype)
    except NotImplementedError as reason:
        return backend, f"CPU tensors take {fallback}; {reason}"
    if lacking:
        return NAME, f"torch has no kernel {lacking}"
    found = times_as_fast(cell, *sizes, apart) if dtype == torch.float32 else None
    if found is None:
        return backend, f"CPU tensors take {fallback}: ours was not measured at {dtype}"
    if found < LEAST:
        return backend, f"CPU tensors take {fallback}: ours was measured {found:.2f} times as fast, or less"
    return NAME, f"measured {found:.1f} times as fast as torch's kernel, at least"


def may_pay(mode: str, input: Any) -> bool:
    """Whether a plan may say "cpu" for a layer that torch has: less input takes torch as long as the question."""
    data = input.data if isinstance(input, PackedSequence) else input
    return mode != "LSTM" and data.numel() >= LEAST_ELEMENTS and max(data.shape[:-1]) > LEAST_STEPS
