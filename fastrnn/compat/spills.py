"""Ask Triton's compiler before a launch which way of compiling a kernel spills no register.

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
    """Compiles as a tensor does, and holds no memory."""

    dtype: torch.dtype
    address: int  # 16 stands for every multiple of 16: the compiler sees no other difference

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
        """Equal for all launches that compile to the same kernel."""
        forms = tuple([tuple(self.as_launched(choice).items()) for choice in self.choices])
        return self.function, self.device, tuple(self.options.items()), tuple(map(as_compiled, self.arguments)), forms

    def options_of(self, choice: dict) -> dict[str, Any]:
        """Options and constants of a launch with one of the choices."""
        return self.options | self.as_launched(choice)

    def compiled(self, choice: dict) -> Any:
        """Triton's CompiledKernel for one of the choices. It is compiled now if Triton's caches do not have it."""
        return self.function.warmup(*self.arguments, grid=self.grid, **self.options_of(choice))


# Called with each question instead of compiling, while ahead.py collects kernels.
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
    """The launch options of the first choice that spills no register, or else of the one with the fewest spills.

    The compiler is asked once for all launches that compile alike. It knows a thread's registers only at its end, and
    no rule was found for which choice spills.
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
    """The choices taken so far for kernels of a name, "forward" or "backward". Their choices may look alike."""
    return [choice for (function, *_), choice in _chosen.items() if function.__name__ == name]


def as_compiled(argument: Any) -> Hashable:
    """What Triton compiles an argument for: a tensor's dtype, and whether its address is a multiple of 16 bytes."""
    if isinstance(argument, torch.Tensor | Pointer):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):  # of pointers, or of constants
        return tuple(as_compiled(a) if isinstance(a, torch.Tensor | Pointer | tuple) else a for a in argument)
    return type(argument) if isinstance(argument, int) else argument  # sizes are not specialized


@cached
def triton_version() -> tuple[int, int]:
    """Triton's version as two numbers: (3, 9) for 3.9.0."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def spilled_registers(compiled: Any) -> int:
    """Registers of a thread that a kernel keeps in local memory. The driver counts them when it loads the kernel."""
    compiled._init_handles()
    return compiled.n_spills
