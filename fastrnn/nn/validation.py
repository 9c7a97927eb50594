"""Checks of shape, dtype and device before anything runs, with torch.nn's error types and texts where it has them.

Source of those texts: torch/nn/modules/rnn.py and aten/src/ATen/native/RNN.cpp of torch 2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..planning.arguments import check_heads, check_share
from ..stack import Stack

# The devices that autocast supports. Found on import, because torch.compile before 2.12 cannot trace the call.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)
)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's if it is on, as for torch.nn on CUDA. Autocast never narrows float64."""
    return torch.get_autocast_dtype(input.device.type) if _autocasts(input) else input.dtype


def _autocasts(input: Tensor) -> bool:
    """Whether autocast casts input, parameters and states. Any of them may have its dtype already."""
    kind = input.device.type
    if kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return False
    return input.is_floating_point() and input.dtype != torch.float64


def check_rank(name: str, input: Tensor, hx: "Tensor | tuple[Tensor, Tensor] | None") -> None:
    """Check that a module's input is (T, B, I) or, unbatched, (T, I), and that the state has as many dimensions."""
    if input.dim() not in (2, 3):
        tensor = " tensor" if name == "RNN" else ""
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
    if hx is None:
        return
    kind = "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
    if name == "SLSTM":
        if isinstance(hx, tuple | list) and any(s.dim() != input.dim() for s in hx if isinstance(s, Tensor)):
            got = ", ".join(f"{state.dim()}-D" for state in hx if isinstance(state, Tensor))
            raise RuntimeError(f"For {kind} input, all of hx should also be {input.dim()}-D but got ({got}) tensors")
    elif name == "LSTM":
        h, c = hx[0].dim(), hx[1].dim()
        if h != input.dim() or c != input.dim():
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {input.dim()}-D but got ({h}-D, {c}-D) tensors"
            )
    elif hx.dim() != input.dim():  # type: ignore[union-attr]
        raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")  # type: ignore[union-attr]


def check_params(stack: Stack, params: Sequence[Tensor]) -> None:
    """Check the list of parameters. A layer and direction has weight_ih, weight_hh, bias_ih, bias_hh, weight_hr."""
    gates, num_layers, directions, bias = stack.of_cell.gates, stack.num_layers, stack.directions, stack.bias
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers: expected a positive int, got {num_layers!r}")
    if stack.tie_directions and not stack.bidirectional:
        raise ValueError("tie_directions: expected False for a layer of one direction, got True")
    check_share("drop_connect", stack.drop_connect)
    check_share("zoneout", stack.zoneout)
    own = 1 if stack.tie_directions else directions  # directions that have their own parameters
    per_direction = 4 if bias else 2
    if stack.cell == "lstm" and len(params) == num_layers * own * (per_direction + 1):
        per_direction += 1  # the LSTM's weight_hr
    count = num_layers * own * per_direction
    if len(params) != count:
        raise ValueError(
            f"params: expected {num_layers} layers x {own} directions x {per_direction} tensors, "
            f"{count} in all; got {len(params)}"
        )
    projected = per_direction % 2 == 1
    if projected and stack.num_heads != 1:
        raise NotImplementedError("num_heads with a projection (proj_size) is missing")
    if projected and stack.zoneout:
        raise NotImplementedError("zoneout with a projection (proj_size) is missing")
    I, P = params[0].shape[-1], params[1].shape[-1]
    H = params[per_direction - 1].shape[-1] if projected else P
    if stack.num_heads != 1:
        H = P = params[0].shape[0] // gates
        check_heads(stack.num_heads, H)
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else []), *(["weight_hr"] if projected else [])]
    for i, tensor in enumerate(params):
        layer, role = i // (own * per_direction), i % per_direction
        expected = {
            "weight_ih": (gates * H, I if layer == 0 else directions * P),
            "weight_hh": (gates * H, P // stack.num_heads),
            "weight_hr": (P, H),
        }.get(names[role], (gates * H,))
        if tensor.shape != expected:
            raise ValueError(f"params[{i}] ({names[role]}_l{layer}): expected {expected}, got {tuple(tensor.shape)}")


def tensors_of(states: int) -> str:
    """How an error names a state of this many tensors."""
    return {1: "a tensor", 2: "a pair of tensors"}.get(states, f"a tuple of {states} tensors")


def check_state(state: Sequence[Any], states: int) -> None:
    """Check that a state is one tensor, the LSTM's two, or a tuple of more."""
    if len(state) != states and states == 2:
        raise RuntimeError("lstm expects two hidden states")
    if len(state) != states or not all(isinstance(s, Tensor) for s in state):
        got = [type(s).__name__ for s in state]
        raise ValueError(f"hx: expected {tensors_of(states)}, got {', '.join(got)}")


def check_call(
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    of_state: tuple[int, int, tuple[int, ...]],
    T: int,
    may_be_empty: bool,
    wide: bool,
) -> None:
    """Check input and state against the parameters, and the dtypes and devices of all tensors.

    of_state: the state's rows, B, and the last size of each tensor. T is what check_options found. If wide is True,
    states may be float32 beside 16-bit input.
    """
    W_ih, (rows, B, sizes) = params[0], of_state
    cast = _autocasts(input)
    if input.dtype != W_ih.dtype and not cast:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({W_ih.dtype}). "
            f"Convert input: input.to({W_ih.dtype}), or convert model: model.to({input.dtype})"
        )
    I = W_ih.shape[-1]
    if input.shape[-1] != I:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {I}, got {input.shape[-1]}")
    for i, hidden in enumerate(state):
        expected = (rows, B, sizes[i])
        if hidden.shape != expected:
            which = f"hidden[{i}]" if len(state) > 1 else "hidden"
            raise RuntimeError(f"Expected {which} size {expected}, got {list(hidden.shape)}")
    if T == 0 and not may_be_empty:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for kind, tensors in (("hidden", state), ("parameter", params)):
        for tensor in tensors:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} "
                    f"and {kind} tensor at {tensor.device}"
                )
            if wide and kind == "hidden" and tensor.dtype == torch.float32 and input.dtype.itemsize == 2:
                continue
            if tensor.dtype != input.dtype and not cast:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {input.dtype} "
                    f"and {kind} tensor with {tensor.dtype}"
                )
