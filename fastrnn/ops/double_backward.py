"""Gradients of gradients: a slow path in plain torch, which runs only where second derivatives are taken.

The kernels' backward pass computes d = J^T g. J is the Jacobian of the results with respect to x_gates, W_hh, b_hh,
state_0 and starts, and g are the upstream gradients. Differentiating d needs J as a function: the reference recurrence
runs again, and torch.func differentiates it twice, so that its transforms work here too. x_gates is as large as the
saved gates, so it is not kept: x_gates = W_ih x + b_ih is computed again from tensors that the graph of this product
keeps anyway. (Where W_ih is frozen, x is kept.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from .. import reference
from ..cells import CELLS
from ..sequences import Sequences
from .schema import BackwardArgs, BackwardResults

UPSTREAM = ("dy", "d_finals", "d_steps")  # upstream gradients, in the order of the reference's results
SOURCE = ("x", "W_ih", "b_ih")
RECURRENT = ("W_hh", "b_hh", "state_0", "starts")
# The arguments that the backward pass has gradients for, and the names of these.
WANTED = {"x_gates": "d_x_gates", "W_hh": "dW_hh", "b_hh": "db_hh", "state_0": "d_state_0", "starts": "d_starts"}


def differentiate(args: BackwardArgs, second: BackwardResults) -> dict[str, Tensor]:
    """Differentiate the backward pass: its gradients by the argument's name, differentiable in turn.

    second has the upstream gradients of its results, or None. y, saved and steps of args are not read.

    >>> import torch
    >>> from fastrnn.ops.schema import BackwardArgs, BackwardResults
    >>> x, W_ih, W_hh, h_0 = torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)
    >>> dy, v = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)  # y = tanh(W_ih x): d_x_gates = (1 - y^2) dy
    >>> given = BackwardArgs(
    ...     dy, None, None, W_hh, h_0, None, None, None, "rnn_tanh", False, False, "resident", x=x, W_ih=W_ih
    ... )
    >>> differentiate(given, BackwardResults(v, None, None, None, None))["dy"].item()
    1.0
    """
    present = [name for name in (*UPSTREAM, *SOURCE, *RECURRENT) if getattr(args, name) is not None]
    wanted = [
        name
        for name, gradient in WANTED.items()
        if getattr(second, gradient) is not None and (name == "x_gates" or getattr(args, name) is not None)
    ]

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = args._replace(**dict(zip(present, tensors, strict=True)))
        assert given.x is not None and given.W_ih is not None
        R, _, K = given.W_hh.shape
        x_gates = torch.nn.functional.linear(given.x, given.W_ih, given.b_ih).unflatten(
            -1, (R, CELLS[args.cell].gates, K)
        )
        inputs = {name: getattr(given, name) for name in RECURRENT} | {"x_gates": x_gates}
        upstream = [getattr(given, name) for name in UPSTREAM]

        def forward(*chosen: Tensor) -> list[Tensor]:
            of_call: dict[str, Any] = inputs | dict(zip(wanted, chosen, strict=True))
            sequences = None if args.rows is None and args.reset is None else Sequences(args.rows, args.reset)
            results = reference.run(
                args.cell, **of_call, sequences=sequences, by_step=args.by_step, heads=args.heads,
                clip_state=args.clip_state, zoneout=args.zoneout, noise=args.noise,
            )  # fmt: skip
            y, finals, steps = results
            results = _by_recurrence(y, args.heads), finals, _by_recurrence(steps, args.heads)
            return [result for result, g in zip(results, upstream, strict=True) if g is not None]

        pull_back = vjp(forward, *(inputs[name] for name in wanted))[1]
        return pull_back([g for g in upstream if g is not None])

    pull_back = vjp(backward, *(getattr(args, name) for name in present))[1]
    return dict(zip(present, pull_back(tuple(getattr(second, WANTED[name]) for name in wanted)), strict=True))


def _by_recurrence(states: Tensor, heads: int) -> Tensor:
    """(..., D, N*K) in the op's form, (..., D*N, K)."""
    return states.unflatten(-1, (heads, -1)).flatten(-3, -2) if heads > 1 else states
