"""Triton's compiler, asked before a launch: which way of compiling a kernel spills no register.

Uses JITFunction.warmup and CompiledKernel.n_spills of Triton, read in 3.9.0 (the same in 3.6 to 3.8).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .cached import cached

_chosen: dict[tuple, dict[str, Any]] = {}


@dataclass(frozen=True)
class Pointer:
    """What compiles as a tensor does, and holds no memory."""

    dtype: torch.dtype
    address: int  # 16 for all multiples of it, as far as the compiler knows

    def data_ptr(self) -> int:
        return self.address

    @classmethod
    def like(cls, argument: Any) -> Any:
        """A kernel's argument with Pointers in place of its tensors."""
        if isinstance(argument, torch.Tensor):
            return cls(argument.dtype, 16 if argument.data_ptr() % 16 == 0 else 8)
        if isinstance(argument, tuple):
            members = map(cls.like, argument)
            return type(argument)(*members) if hasattr(argument, "_fields") else tuple(members)
        return argument


class Asked(NamedTuple):
    """The arguments of first_without_spills."""

    function: Any
    device: Hashable
    choices: Sequence[dict]
    arguments: tuple
    grid: tuple
    options: dict
    as_launched: Callable[[dict], dict] = dict

    @property
    def key(self) -> tuple:
        """What all that compiles alike has in common."""
        return self.function, self.device, tuple(self.options.items()), tuple(map(as_compiled, self.arguments))

    def options_of(self, choice: dict) -> dict[str, Any]:
        """Options and constants of a launch by one of the choices."""
        return self.options | self.as_launched(choice)

    def compiled(self, choice: dict) -> Any:
        """Triton's CompiledKernel of one of the choices; compiled now, where Triton's caches have none."""
        return self.function.warmup(*self.arguments, grid=self.grid, **self.options_of(choice))


# While kernels are only asked for (ahead.py), who is told of it.
listener: Callable[[Asked], None] | None = None


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
    asked = Asked(function, device, choices, arguments, grid, options, as_launched)
    if listener is not None:
        listener(asked)
        return as_launched(choices[0])
    key = asked.key
    if key not in _chosen:
        spills = []
        for choice in choices:
            spills.append(spilled_registers(asked.compiled(choice)))
            if spills[-1] == 0:
                break
        _chosen[key] = choices[spills.index(min(spills))]
    return as_launched(_chosen[key])


def is_chosen(asked: Asked) -> bool:
    """Whether first_without_spills knows the answer."""
    return asked.key in _chosen


def taken(name: str) -> list[dict[str, Any]]:
    """The choices taken so far for kernels of a name: "forward" or "backward", whose choices may look alike."""
    return [choice for (function, *_), choice in _chosen.items() if function.__name__ == name]


def as_compiled(argument: Any) -> Hashable:
    """What Triton compiles an argument for: a tensor's dtype, and whether it lies at a multiple of 16 bytes."""
    if isinstance(argument, torch.Tensor | Pointer):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):  # of pointers, or of constants
        return tuple(as_compiled(a) if isinstance(a, torch.Tensor | Pointer | tuple) else a for a in argument)
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
