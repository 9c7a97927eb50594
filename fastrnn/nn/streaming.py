"""One time step of a module, for input that arrives step by step. The caller keeps the state."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from .validation import check_rank


def step(module: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """Run the `step` of a module."""
    if module.bidirectional:
        raise ValueError(
            f"{module._name}.step: expected a layer of one direction; got a bidirectional one. "
            "Its second direction starts at the last time step, which a stream has not reached"
        )
    if input.dim() not in (1, 2):
        name = module._name
        raise ValueError(f"{name}.step: Expected input to be 1D or 2D, got {input.dim()}D instead")
    # Nothing stays on chip between two calls, so "auto" takes torch's cells: they do the least beside the products.
    if (
        module.backend in ("auto", "torch")
        and not module.proj_size
        and module._stack_is_torchs(dropping=module.training)
    ):
        return _by_cells(module, input, hx)
    time = 1 if module.batch_first and input.dim() == 2 else 0
    output, state = module.forward(input.unsqueeze(time), hx)
    return output.squeeze(time), state


def _by_cells(module: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """Run torch's cells, layer by layer."""
    pair, batched = module.mode == "LSTM", input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        h = x.new_zeros(module.num_layers, x.shape[0], module.hidden_size)
        states = (h, h) if pair else (h,)
    else:
        states = tuple(hx) if pair else (hx,)
        states = states if batched else tuple(s.unsqueeze(1) for s in states)
    params = module._params()
    if not _fit(module, x, params[0].dtype, states):
        _check(module, input, hx, x, states)

    cell, after = _CELLS[module.mode], []
    if module.num_layers == 1:
        before = tuple([s.squeeze(0) for s in states])
        found = cell(x, before if pair else before[0], *params)
        x, stacked = (found[0] if pair else found), [s.unsqueeze(0) for s in (found if pair else (found,))]
    else:
        count = len(params) // module.num_layers
        for layer, before in enumerate(zip(*states, strict=True)):
            weights = params[layer * count : (layer + 1) * count]
            if layer and module.dropout and module.training:
                x = dropout(x, module.dropout)
            found = cell(x, before if pair else before[0], *weights)
            after.append(found if pair else (found,))
            x = after[-1][0]
        stacked = [torch.stack(s) for s in zip(*after, strict=True)]
    if not batched:
        x, stacked = x.squeeze(0), [s.squeeze(1) for s in stacked]
    return x, tuple(stacked) if pair else stacked[0]


_CELLS = {mode: getattr(torch._VF, f"{mode.lower()}_cell") for mode in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")}


def _fit(module: Any, x: Tensor, dtype: torch.dtype, states: tuple[Tensor, ...]) -> bool:
    """Whether sizes and dtypes are right. This test is cheap; `_check` finds out what is wrong."""
    sizes = (module.num_layers, x.shape[0], module.hidden_size)
    if x.shape[1] != module.input_size or x.dtype != dtype:
        return False
    return states[0].shape == sizes and states[-1].shape == sizes


def _check(module: Any, input: Tensor, hx: Any, x: Tensor, states: Any) -> None:
    """Raise the errors of torch.nn's forward."""
    check_rank(module._name, input.unsqueeze(0), hx)
    time = 1 if module.batch_first else 0
    module.check_forward_args(x.unsqueeze(time), states if len(states) > 1 else states[0], None)
