"""The arguments and results of the recurrence's two ops, each named once.

torch.library's schemas are flat lists. A NamedTuple here is one of them, and all code that handles an op's arguments or
gradients uses these names. The P states of a cell are one tensor, h first. R = D * N recurrences of K units run side by
side: D directions of N heads. slots are (T, B), or (total,) for ragged sequences.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.arguments import NO_CLIP


class Args(NamedTuple):
    """Arguments of fastrnn::recurrence."""

    x_gates: Tensor  # (*slots, R, G, K)
    W_hh: Tensor  # (R, G*K, K)
    b_hh: Tensor | None  # (R, G*K)
    state_0: Tensor | None  # (P, D, B, N*K); None is zeros
    cell: str
    save: bool  # whether to keep what backward needs
    backend: str
    # x_gates is the product of these three. Only double backward reads them.
    x: Tensor | None = None
    W_ih: Tensor | None = None
    b_ih: Tensor | None = None
    # The members of sequences.Sequences, and the states after resets: (P, D, B, N*K), or by_step (P, *slots, D, N*K).
    rows: Tensor | None = None
    reset: Tensor | None = None
    starts: Tensor | None = None
    by_step: bool = False
    all_steps: bool = False  # keep the states of all steps
    heads: int = 1  # N
    clip_gradient: float = NO_CLIP  # kernels/arguments.py
    clip_state: float = NO_CLIP
    zoneout: float = 0.0  # p
    noise: Tensor | None = None  # (1 + D) of int64: zoneout in training


class Results(NamedTuple):
    """Results of fastrnn::recurrence. A result that a cell or call lacks has no elements."""

    y: Tensor  # (*slots, R, K)
    finals: Tensor  # as state_0
    saved: Tensor  # (*slots, R, S, K)
    steps: Tensor  # the states of all steps beside h, (P - 1, *slots, R, K)


class BackwardArgs(NamedTuple):
    """Arguments of fastrnn::recurrence_backward: upstream gradients, which may be None, and what forward kept."""

    dy: Tensor | None
    d_finals: Tensor | None
    d_steps: Tensor | None
    W_hh: Tensor
    state_0: Tensor | None
    y: Tensor
    saved: Tensor
    steps: Tensor
    cell: str
    needs_dW: bool
    needs_db: bool
    backend: str
    b_hh: Tensor | None = None
    x: Tensor | None = None
    W_ih: Tensor | None = None
    b_ih: Tensor | None = None
    rows: Tensor | None = None
    reset: Tensor | None = None
    starts: Tensor | None = None
    by_step: bool = False
    heads: int = 1
    clip_gradient: float = NO_CLIP
    clip_state: float = NO_CLIP
    zoneout: float = 0.0  # p
    noise: Tensor | None = None  # (1 + D) of int64: zoneout in training


class BackwardResults(NamedTuple):
    """Gradients. One that is not wanted has no elements."""

    d_x_gates: Tensor
    dW_hh: Tensor
    db_hh: Tensor
    d_state_0: Tensor
    d_starts: Tensor


# The dimension of B in each tensor. It is 1, as in (T, B, ...), for dense tensors that are not listed here.
OF_STATES = ("state_0", "starts", "finals", "steps", "d_finals", "d_steps", "d_state_0", "d_starts")
BATCH_DIMS: dict[str, int] = dict.fromkeys(OF_STATES, 2)


def define(name: str, arguments: Any, results: Any, run: Callable, fake: Callable) -> Any:
    """Make a torch.library op with the schema of two NamedTuples. run and fake take the first and return the second."""

    def flat(*args: Any) -> tuple[Tensor, ...]:
        return tuple(run(arguments(*args)))

    parameters = inspect.signature(arguments).parameters.values()
    prototype = inspect.Signature(list(parameters), return_annotation=tuple[(Tensor,) * len(results._fields)])
    flat.__signature__ = prototype  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(flat, mutates_args=())
    op = torch.library.custom_op(name, flat, mutates_args=(), schema=schema)
    op.register_fake(lambda *args: tuple(fake(arguments(*args))))
    return op


def contiguous(args: Any) -> Any:
    """The same arguments with every tensor contiguous, because kernels require it."""
    strided = [
        name
        for name, arg in zip(args._fields, args, strict=True)
        if isinstance(arg, Tensor) and not arg.is_contiguous()
    ]
    return args._replace(**{name: getattr(args, name).contiguous() for name in strided}) if strided else args
