"""Names for the parts of a layer in a profiler's trace: the input's product, the recurrence, gradients of weights.

torch.profiler shows them as they are; `torch.autograd.profiler.emit_nvtx` hands them to NVTX, for Nsight. Where no
profiler runs they cost one question (0.2 us; torch's record_function itself 14 us, on one core of an EPYC, torch 2.13).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def named(name: str) -> contextlib.AbstractContextManager[Any]:
    """What happens inside the block appears under "fastrnn: name"."""
    # torch.compile traces past it: in compiled code the ops' own names remain.
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(f"fastrnn: {name}")


def inside(name: str, traced: bool = True) -> Callable[[F], F]:
    """A decorator: the whole function under that name. traced: torch.compile may look into the function."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if (traced and torch.compiler.is_compiling()) or not torch.autograd._profiler_enabled():
                return function(*args, **kwargs)
            with named(name):
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate
