"""How a persistent kernel is launched: what the rules of a tier's file decide, and the launcher follows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..cells import CELLS, Cell
from ..compat import spills
from ..device import DeviceSpec
from ..kernels.arguments import NO_CLIP

KIB = 1024
# Not exact where the tensors' rounding hides it: `python -m bench.accuracy` and kernels/activations.py.
ACTIVATIONS = {torch.bfloat16: "tanh.approx", torch.float16: "exp2"}


class GridTooLargeError(ValueError):
    """Raised if more programs must run at once than the device has room for."""


class Request(NamedTuple):
    """What a kernel is planned for: D directions of N heads, H units each, over B sequences."""

    cell: str
    H: int
    B: int
    D: int
    N: int
    dtype: torch.dtype
    precision: str  # of fp32 products: "ieee" or "tf32"
    spec: DeviceSpec
    clip_gradient: float = NO_CLIP  # kernels/arguments.py
    clip_state: float = NO_CLIP
    zoneout: float = 0.0

    @property
    def of_cell(self) -> Cell:
        return CELLS[self.cell]

    @property
    def gates(self) -> int:
        return CELLS[self.cell].gates

    @property
    def recurrences(self) -> int:
        """How many run side by side."""
        return self.D * self.N

    @property
    def padded(self) -> int:
        """H as resident kernels see it: a power of two, as Triton's ranges, and what tensor cores take at least."""
        return max(16, 1 << (self.H - 1).bit_length())


@dataclass(frozen=True)
class KernelPlan:
    """How a persistent kernel is launched: tiles, warps, programs, and where W_hh stays."""

    dialect: str
    block_b: int  # rows of a batch tile
    units: int  # hidden units that a program owns, padding included
    grid: tuple[int, ...]  # (batch tiles, D * N), or (slices of H, batch tiles, D * N)
    ctas: int  # programs of a cluster; an entry of the grid is a cluster
    warps: int
    # Of the kernel's Form, in capitals, what is the same in all ways of compiling it.
    form: Mapping[str, Any] = field(hash=False)
    # By pass: ways of compiling it, as more of the Form and launch options, in the order to try them. The first that
    # spills no register is taken: which one does follows no rule that was found.
    choices: Mapping[str, tuple[dict[str, Any], ...]] = field(hash=False)
    precision: str  # of fp32 products, as Triton's input_precision: "ieee" or "tf32"
    activations: str  # how they are computed, as kernels/activations.py names it
    weight_bytes: int  # of W_hh in one program, padding included
    weight_place: str
    shared_bytes: int  # upper bound for one program
    shared_limit: int  # what the device gives one program
    saved_bytes: int = 0  # kept for backward
    parts: int = 1  # of the batch: launches of such a grid, one after the other, the last one's perhaps smaller

    @property
    def programs(self) -> int:
        return math.prod(self.grid) * self.ctas


def common(request: Request) -> dict[str, Any]:
    """Return the fields of a plan that do not depend on its tiles."""
    spec = request.spec
    return {
        "precision": request.precision,
        "activations": ACTIVATIONS.get(request.dtype, "exact") if spec.arch.startswith("sm_") else "exact",
        "shared_limit": spec.shared_bytes,
    }


def saved_bytes(request: Request, steps: int) -> int:
    """Return the bytes that are kept for backward, for so many steps."""
    cell, dtype = request.of_cell, request.dtype
    of_unit = cell.saved * dtype.itemsize + max(cell.kept_places) * cell.state_dtype(dtype).itemsize
    return steps * request.B * request.recurrences * request.H * of_unit


def as_text(size: int) -> str:
    """Return bytes as text for people, such as 1.5 MiB."""
    return f"{size / KIB:,.0f} KiB" if size < 1024 * KIB else f"{size / KIB**2:,.1f} MiB"


def registers(spec: DeviceSpec, warps: int) -> int:
    """The most registers that a thread of an only program can have."""
    return min(255, spec.register_bytes // (4 * spec.warp_size * warps))


def weight_place(spec: DeviceSpec) -> str:
    """Say where a program's W_hh stays, because Triton decides where an operand loaded before the loop lies."""
    return "arrays" if spec.arch == "interpreter" else "registers" if spec.is_amd else "shared memory"


def runs_gluon(request: Request) -> bool:
    on_tensor_cores = request.dtype != torch.float32 or request.precision == "tf32"
    return request.spec.arch.startswith("sm_") and on_tensor_cores and spills.triton_version() >= (3, 6)


def register_limits(spec: DeviceSpec, warps: int) -> tuple[dict[str, Any], ...]:
    """The compiler's choice, all that a thread of an only program can have, and a few less: launch options to try.

    ptxas, left alone, saves registers for a second program and spills 8 bytes of one kernel in fifty; told how many
    there are, it spills more of others; and given registers for it, it loads all pieces of the state at once.
    """
    most = registers(spec, warps)
    return ({},) if spec.is_amd else ({}, {"maxnreg": most}, {"maxnreg": most - 8}, {"maxnreg": most // 8 * 8 - 16})


def tiles(size: int, tile: int) -> int:
    """How many of a tile cover a size."""
    return -(-size // tile)
