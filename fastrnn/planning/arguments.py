"""Checks of plain arguments that a planner and a layer share."""

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_int(size: Any) -> Any:
    """Make a Python int of NumPy's or torch.jit.trace's, which torch and the planner need. Return others unchanged.

    >>> import numpy as np
    >>> from fastrnn.planning.arguments import as_int
    >>> type(as_int(np.int64(4))), as_int(None)
    (<class 'int'>, None)
    """
    traced = isinstance(size, Tensor) and torch.jit.is_tracing()
    return int(size) if traced or isinstance(size, np.integer) else size


def check_checkpoint_every(K: int | None) -> None:
    """Check the time steps of a chunk, or None."""
    if K is not None and (not isinstance(K, int) or isinstance(K, bool) or K < 1):
        raise ValueError(f"checkpoint_every: expected a positive int or None, got {K!r}")


def check_heads(num_heads: int, hidden_size: int) -> None:
    """Check that W_hh can have this many blocks of equal size."""
    fits = isinstance(num_heads, int) and not isinstance(num_heads, bool) and num_heads > 0
    if not fits or hidden_size % num_heads:
        raise ValueError(f"num_heads: expected a divisor of hidden_size, which is {hidden_size}; got {num_heads!r}")


def check_clips(**limits: float | None) -> None:
    """Check the limits of clips to [-limit, limit], or None."""
    for name, limit in limits.items():
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (is_number and 0 <= limit < float("inf")):
            raise ValueError(f"{name}: expected a number from 0 on, or None; got {limit!r}")


def check_share(name: str, p: float) -> None:
    """Check a probability, as torch.nn checks dropout."""
    if not isinstance(p, Real) or isinstance(p, bool) or not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {p!r}")


def expect(name: str, got: object, allowed: tuple) -> None:
    """Raise ValueError, with expected and got, if an argument is none of the allowed values."""
    if got not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}; got {got!r}")
