"""Both passes of a recurrence on the CPU: compiled at first use, and run over tiles of the batch, by threads."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..compat import profiling
from ..kernels.arguments import Gradients, Inputs, Outputs, Saved, Sequences, Sizes
from ..planning.kernel_plan import Request
from . import loop, memory, threads
from .build import Compiled, machine
from .language import on_vectors
from .rows import Tile
from .values import I8, I64, Code, Pointer

GROUPS = {"forward": (Inputs, Outputs, Sequences), "backward": (Saved, Gradients, Sequences)}


class Kernels:
    """What ops/prepared.py launches, as it launches a GPU's."""

    dialect = "LLVM"

    def __init__(self, request: Request) -> None:
        self.request, self.cell = request, request.of_cell
        self.compiled: dict[tuple, Compiled] = {}
        self.scratch = self._constants("forward", False, False, False).scratch

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory that calls use again."""
        return memory.empty(shape, self.request.dtype)

    @profiling.inside("recurrence", traced=False)
    def launch(self, which: str, T: int, ragged: bool, by_step: bool, groups: tuple) -> None:
        """Run a pass over T steps, with groups of tensors as in kernels/arguments.py."""
        request, (first, second, sequences) = self.request, groups
        R, H, B = request.recurrences, request.H, request.B
        if sequences.noise is not None:
            sequences = sequences._replace(noise=self._stays(sequences.noise, first, second))
        panel = machine().columns * machine().bytes // request.dtype.itemsize
        # A list has a tensor a direction: they are copied here anyway, into panels.
        of_directions = [first.W_hh] if isinstance(first.W_hh, Tensor) else first.W_hh
        W = [W.reshape(R // len(of_directions), -1, H) for W in of_directions]
        first = first._replace(W_hh=packed([W.mT for W in W] if which == "forward" else W, panel))
        if which == "forward" and first.b_hh is not None and request.gates * H % panel:
            bias = first.b_hh.view(R, -1)
            first = first._replace(b_hh=torch.nn.functional.pad(bias, (0, -bias.shape[1] % panel)))
        tensors: list[Tensor] = []
        form = flatten((first, second, sequences), tensors)
        key = which, ragged, by_step, form
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.compiled[key] = self._compile(which, form, ragged, by_step)
        addresses = (ctypes.c_int64 * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
        sizes = threads.Pass(T, R, B, B * R * request.gates * H * H, self.scratch)
        threads.run(compiled.call, ctypes.addressof(addresses), sizes, request.dtype)

    def _constants(self, which: str, own_lengths: bool, ragged: bool, by_step: bool) -> loop.Constants:
        cell, request, on = self.cell, self.request, machine()
        sizes = Sizes(
            cell.gates, len(cell.states), len(cell.kept), cell.saved, request.D, request.N, request.H,
            own_lengths, by_step, ragged, "exact", "ieee", request.clip_gradient, request.clip_state, request.zoneout,
        )  # fmt: skip
        width = on.bytes // request.dtype.itemsize
        return loop.Constants(on_vectors(cell.kernel(which)), sizes, cell.kept_places, (on.rows, on.columns), width)

    def _compile(self, which: str, form: tuple, ragged: bool, by_step: bool) -> Compiled:
        def write(code: Code) -> None:
            addresses, T, B, recurrence, first, count, scratch = code.arguments
            given = iter(range(1 << 30))

            def pointer(of: Any) -> Pointer:
                table = code.pointer(addresses, I64)
                return code.pointer(table.element(next(given)), of)

            types = {torch.int64: I64, torch.bool: I8, torch.uint8: I8}

            def made(of_group: Any) -> Any:
                if of_group is None:
                    return None
                if isinstance(of_group, tuple):
                    return tuple(made(member) for member in of_group)
                return pointer(types.get(of_group, code.real))

            first_group, second, sequences = (
                kind(*made(of_group)) for kind, of_group in zip(GROUPS[which], form, strict=True)
            )
            K = self._constants(which, sequences.rows is not None, ragged, by_step)
            tile = Tile(code, K.sizes, sequences, T, B, recurrence, first, count)
            getattr(loop, which)(K, tile, first_group, second, code.pointer(scratch, code.real))

        return Compiled(f"{self.request.cell}_{which}", 7, self.request.dtype, write)

    def _stays(self, seeds: Tensor, first: Any, second: Any) -> Tensor:
        """Of zoneout in training: which units keep their h, by slot."""
        R, H = self.request.recurrences, self.request.H
        y = second.y if isinstance(second, Outputs) else first.kept[0]
        slots = torch.arange(y.numel() // (R * H))
        before = seeds[1:].repeat_interleave(self.request.N)
        return noise.stays(seeds, self.request.zoneout, slots[:, None] + before, torch.arange(R * H).view(R, H))


def packed(matrices: list[Tensor], panel: int) -> Tensor:
    """All (n, K, N), one after the other, in panels of columns (R, N / panel, K, panel), the last filled with zeros."""
    n, K, N = matrices[0].shape
    full, rest = divmod(N, panel)
    out = matrices[0].new_empty(n * len(matrices), full + (rest > 0), K, panel)
    for own, W in zip(out.split(n), matrices, strict=True):
        own[:, :full] = W[..., : full * panel].unflatten(-1, (full, panel)).transpose(1, 2)
        if rest:
            own[:, full, :, :rest] = W[..., full * panel :]
            own[:, full, :, rest:] = 0
    return out


def flatten(member: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors of groups; returns the groups with a dtype for each, which is their form.

    No closure of its own: a function that names itself is a cycle, which would keep the tensors until it is collected.
    """
    if isinstance(member, Tensor):
        tensors.append(member)
        return member.dtype
    return member if member is None else tuple([flatten(inner, tensors) for inner in member])
