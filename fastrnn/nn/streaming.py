"""One time step of a module, for input that arrives step by step; the state goes in and out."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .validation import check_rank


def step(module: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """What fastrnn.RNN, GRU and LSTM have as `step`."""
    name = module._name
    if module.bidirectional:
        raise ValueError(
            f"{name}.step: expected a layer of one direction; got a bidirectional one, "
            "whose other direction begins with the last time step, which a stream has not reached"
        )
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}.step: Expected input to be 1D or 2D, got {input.dim()}D instead")
    # Nothing stays on chip between calls: "auto" takes torch's cells, which have least to do beside the products.
    if module.backend in ("auto", "torch") and not module.proj_size and module._stack_is_torchs():
        return _by_cells(module, input, hx)
    time = 1 if module.batch_first and input.dim() == 2 else 0
    output, state = module.forward(input.unsqueeze(time), hx)
    return output.squeeze(time), state


def _by_cells(module: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """By torch's cells, layer by layer."""
    pair = module.mode == "LSTM"
    batched = input.dim() == 2
    check_rank(module._name, input.unsqueeze(0), hx)
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        h = x.new_zeros(module.num_layers, x.shape[0], module.hidden_size)
        states = (h, h) if pair else (h,)
    else:
        states = tuple(hx) if pair else (hx,)
        states = states if batched else tuple(s.unsqueeze(1) for s in states)
    module.check_forward_args(x.unsqueeze(1 if module.batch_first else 0), states if pair else states[0], None)

    cell = getattr(torch._VF, f"{module.mode.lower()}_cell")
    after = []
    of_layers = zip(*(s.unbind() for s in states), strict=True)
    for layer, (before, weights) in enumerate(zip(of_layers, module.all_weights, strict=True)):
        if layer and module.dropout and module.training:
            x = dropout(x, module.dropout)
        found = cell(x, before if pair else before[0], *weights)
        after.append(found if pair else (found,))
        x = after[-1][0]
    if len(after) == 1:
        stacked = [s.unsqueeze(0) for s in after[0]]
    else:
        stacked = [torch.stack(s) for s in zip(*after, strict=True)]
    if not batched:
        x, stacked = x.squeeze(0), [s.squeeze(1) for s in stacked]
    return x, tuple(stacked) if pair else stacked[0]
