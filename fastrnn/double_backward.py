"""The gradients' own gradients: a slow path in plain torch, run only where second derivatives are taken.

The kernels' backward pass computes d = J^T g, with J the Jacobian of (y, h_n, c_n) with respect to x_gates, W_hh, b_hh,
h_0, c_0, and g their upstream gradients. Its own gradients need J as a function: the reference recurrence is run again,
and differentiated twice by autograd. x_gates is not kept for this (it is as large as the saved gates), but computed
again, x_gates = W_ih x + b_ih, from what the graph of that product keeps anyway. (Where W_ih is frozen, x is kept.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import GATES, recurrence


def differentiate(
    cell: str,
    upstream: Sequence[Tensor | None],
    source: Sequence[Tensor | None],
    recurrent: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the backward pass with respect to upstream, source and recurrent; themselves differentiable.

    upstream: dy, dh_n, dc_n. source: x (T, B, I), W_ih (D*G*H, I), b_ih (D*G*H,). recurrent: W_hh, b_hh, h_0, c_0.
    second: what comes from above for d_x_gates, dW_hh, db_hh, dh_0 and dc_0; a missing tensor is None throughout.

    >>> import torch
    >>> x, W_ih, W_hh, h_0 = torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    >>> dy, v = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)  # y = tanh(W_ih x): d_x_gates = (1 - y^2) dy
    >>> args = (dy, None, None), (x, W_ih, None), (W_hh, None, h_0, None), (v, None, None, None, None)
    >>> of_upstream, _, _ = differentiate("rnn_tanh", *args)
    >>> of_upstream[0].item()
    1.0
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that gradients are partial even where one input was computed from another.
        everything = [_alias(tensor) for tensor in (*upstream, *source, *recurrent)]
        upstream, (x, W_ih, b_ih), (W_hh, b_hh, h_0, c_0) = everything[:3], everything[3:6], everything[6:]
        assert x is not None and W_ih is not None and W_hh is not None and h_0 is not None
        D, _, H = W_hh.shape
        x_gates = torch.nn.functional.linear(x, W_ih, b_ih).unflatten(-1, (D, GATES[cell], H))
        pairs = [
            (output, gradient)
            for output, gradient in zip(recurrence(cell, x_gates, W_hh, b_hh, h_0, c_0), upstream, strict=True)
            if output is not None and gradient is not None
        ]
        inputs = (x_gates, W_hh, b_hh, h_0, c_0)
        wanted = [i for i, (t, v) in enumerate(zip(inputs, second, strict=True)) if t is not None and v is not None]
        first = torch.autograd.grad(
            [output for output, _ in pairs],
            [inputs[i] for i in wanted],  # type: ignore[misc]
            [gradient for _, gradient in pairs],
            create_graph=True,
            materialize_grads=True,
        )
        present = [i for i, t in enumerate(everything) if t is not None]
        found = torch.autograd.grad(
            first,
            [everything[i] for i in present],  # type: ignore[misc]
            [second[i] for i in wanted],
            create_graph=again,
            allow_unused=True,
        )
    gradients: list[Tensor | None] = [None] * len(everything)
    for i, gradient in zip(present, found, strict=True):
        gradients[i] = gradient
    return gradients[:3], gradients[3:6], gradients[6:]


def _alias(tensor: Tensor | None) -> Tensor | None:
    """The same values and history as a tensor of its own, which has a gradient."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
