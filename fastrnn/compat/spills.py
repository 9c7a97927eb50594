"""Triton's compiler, asked before a launch: which way of compiling a kernel spills no register.

Uses JITFunction.warmup and CompiledKernel.n_spills of Triton, read in 3.9.0 (the same in 3.6 to 3.8).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from .cached import cached

_chosen: dict[tuple, dict[str, Any]] = {}


def first_without_spills(
    function: Any,
    device: Hashable,
    choices: Sequence[dict],
    arguments: tuple,
    grid: tuple,
    options: dict,
    as_launched: Callable[[dict], dict] = dict,
) -> dict[str, Any]:
    """Launch options of the first of the choices with which no register spills; else of that with the fewest.

    Asked once for all that compiles alike: a thread's registers are known to the compiler only at the end, and whether
    a choice spills follows no rule that was found.
    """
    key = (function, device, tuple(options.items()), tuple(map(as_compiled, arguments)))
    if key not in _chosen:
        spills = []
        for choice in choices:
            compiled = function.warmup(*arguments, grid=grid, **options, **as_launched(choice))
            spills.append(spilled_registers(compiled))
            if spills[-1] == 0:
                break
        _chosen[key] = choices[spills.index(min(spills))]
    return as_launched(_chosen[key])


def taken(name: str) -> list[dict[str, Any]]:
    """The choices taken so far for kernels of a name: "forward" or "backward", whose choices may look alike."""
    return [choice for (function, *_), choice in _chosen.items() if function.__name__ == name]


def as_compiled(argument: Any) -> Hashable:
    """What Triton compiles an argument for: a tensor's dtype, and whether it lies at a multiple of 16 bytes."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):  # of pointers, or of constants
        return tuple(as_compiled(a) if isinstance(a, torch.Tensor | tuple) else a for a in argument)
    return type(argument) if isinstance(argument, int) else argument  # sizes are not specialized


@cached
def triton_version() -> tuple[int, int]:
    """(3, 9) of Triton 3.9.0."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def spilled_registers(compiled: Any) -> int:
    """Registers a thread that a compiled kernel keeps in local memory: the driver counts when it loads the kernel."""
    compiled._init_handles()
    return compiled.n_spills
