"""The gradients' own gradients: a slow path in plain torch, run only where second derivatives are taken.

The kernels' backward pass computes d = J^T g, with J the Jacobian of (y, h_n, c_n, c) with respect to x_gates, W_hh,
b_hh, h_0, c_0, reset_h, reset_c, and g their upstream gradients. Its own gradients need J as a function: the reference
recurrence is run again, and differentiated twice, by torch.func, so that its transforms can take this too. x_gates is
not kept for this (it is as large as the saved gates), but computed again, x_gates = W_ih x + b_ih, from what the graph
of that product keeps anyway. (Where W_ih is frozen, x is kept.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ..reference import GATES, recurrence
from ..sequences import Sequences


def differentiate(
    cell: str,
    upstream: Sequence[Tensor | None],
    source: Sequence[Tensor | None],
    recurrent: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    sequences: Sequences | None = None,
    by_step: bool = False,
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the backward pass with respect to upstream, source and recurrent; themselves differentiable.

    upstream: dy, dh_n, dc_n, dc. source: x (T, B, I), W_ih (D*G*H, I), b_ih (D*G*H,). recurrent: W_hh, b_hh, h_0, c_0,
    reset_h, reset_c. second: what comes from above for the gradients of x_gates and of recurrent; a missing tensor is
    None throughout. sequences and by_step are the recurrence's.

    >>> import torch
    >>> x, W_ih, W_hh, h_0 = torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    >>> dy, v = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)  # y = tanh(W_ih x): d_x_gates = (1 - y^2) dy
    >>> recurrent = W_hh, None, h_0, None, None, None
    >>> args = (dy, None, None, None), (x, W_ih, None), recurrent, (v, *[None] * 6)
    >>> of_upstream, _, _ = differentiate("rnn_tanh", *args)
    >>> of_upstream[0].item()
    1.0
    """
    everything = [*upstream, *source, *recurrent]
    present = [i for i, t in enumerate(everything) if t is not None]
    wanted = [
        i
        for i, (t, v) in enumerate(zip((*source[:1], *recurrent), second, strict=True))
        if t is not None and v is not None
    ]

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(present, tensors, strict=True))
        upstream, (x, W_ih, b_ih), recurrent = (
            [given.get(i) for i in part] for part in (range(4), range(4, 7), range(7, 13))
        )
        assert x is not None and W_ih is not None and recurrent[0] is not None
        D, _, H = recurrent[0].shape
        x_gates = torch.nn.functional.linear(x, W_ih, b_ih).unflatten(-1, (D, GATES[cell], H))
        inputs: list[Any] = [x_gates, *recurrent]

        def forward(*chosen: Tensor) -> list[Tensor]:
            chosen_by_place = dict(zip(wanted, chosen, strict=True))
            replaced: list[Any] = [chosen_by_place.get(i, inputs[i]) for i in range(7)]
            *replaced, reset_h, reset_c = replaced
            resets: dict[str, Any] = {"reset_h": reset_h, "reset_c": reset_c, "by_step": by_step}
            outputs = recurrence(cell, *replaced, sequences=sequences, **resets, cell_states=True)
            # A cell without c has no fourth output, and no gradient of one.
            return [o for o, g in zip(outputs, upstream) if o is not None and g is not None]  # noqa: B905

        pull_back = vjp(forward, *(inputs[i] for i in wanted))[1]
        return pull_back([g for g in upstream if g is not None])

    pull_back = vjp(backward, *(everything[i] for i in present))[1]
    found = dict(zip(present, pull_back(tuple(second[i] for i in wanted)), strict=True))
    gradients = [found.get(i) for i in range(len(everything))]
    return gradients[:4], gradients[4:7], gradients[7:]
