"""Checks of shape, dtype and device before anything runs; torch.nn's own error types and texts where it has them.

Source of those texts: torch/nn/modules/rnn.py and aten/src/ATen/native/RNN.cpp of torch 2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Devices that autocast knows. Asked on import: torch.compile cannot trace the question before torch 2.12.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)
)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, as torch.nn's on CUDA; float64 is never narrowed by it."""
    return torch.get_autocast_dtype(input.device.type) if _autocasts(input) else input.dtype


def _autocasts(input: Tensor) -> bool:
    """Whether input, parameters and states are cast to autocast's dtype, which any of them may have already."""
    kind = input.device.type
    if kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return False
    return input.is_floating_point() and input.dtype != torch.float64


def check_rank(name: str, input: Tensor, hx: "Tensor | tuple[Tensor, Tensor] | None") -> None:
    """Input of a module is (T, B, I) or, unbatched, (T, I); the state has as many dimensions."""
    if input.dim() not in (2, 3):
        tensor = " tensor" if name == "RNN" else ""
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
    if hx is None:
        return
    kind = "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
    if name == "LSTM":
        h, c = hx[0].dim(), hx[1].dim()
        if h != input.dim() or c != input.dim():
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {input.dim()}-D but got ({h}-D, {c}-D) tensors"
            )
    elif hx.dim() != input.dim():  # type: ignore[union-attr]
        raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")  # type: ignore[union-attr]


def check_params(gates: int, params: Sequence[Tensor], num_layers: int, directions: int, bias: bool) -> None:
    """The flat list of weights: of each layer and direction weight_ih, weight_hh, and bias_ih, bias_hh, weight_hr."""
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers: expected a positive int, got {num_layers!r}")
    per_direction = 4 if bias else 2
    if gates == 4 and len(params) == num_layers * directions * (per_direction + 1):
        per_direction += 1  # the LSTM's weight_hr
    count = num_layers * directions * per_direction
    if len(params) != count:
        raise ValueError(
            f"params: expected {num_layers} layers x {directions} directions x {per_direction} tensors, "
            f"{count} in all; got {len(params)}"
        )
    projected = per_direction % 2 == 1
    I, P = params[0].shape[-1], params[1].shape[-1]
    H = params[per_direction - 1].shape[-1] if projected else P
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else []), *(["weight_hr"] if projected else [])]
    for i, tensor in enumerate(params):
        layer, role = i // (directions * per_direction), i % per_direction
        expected = {
            "weight_ih": (gates * H, I if layer == 0 else directions * P),
            "weight_hh": (gates * H, P),
            "weight_hr": (P, H),
        }.get(names[role], (gates * H,))
        if tensor.shape != expected:
            raise ValueError(f"params[{i}] ({names[role]}_l{layer}): expected {expected}, got {tuple(tensor.shape)}")


def check_state(state: Sequence[Any], states: int) -> None:
    """One tensor, or the LSTM's two."""
    if len(state) != states:
        raise RuntimeError("lstm expects two hidden states")
    if not all(isinstance(s, Tensor) for s in state):
        expected, got = "a pair of tensors" if states == 2 else "a tensor", [type(s).__name__ for s in state]
        raise ValueError(f"hx: expected {expected}, got {', '.join(got)}")


def check_call(
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: int,
    T: int,
    B: int,
    may_be_empty: bool,
) -> None:
    """Input of check_options' T and B, and a state of so many rows, against the weights; dtypes and devices of all."""
    W_ih, W_hh = params[0], params[1]
    cast = _autocasts(input)
    if input.dtype != W_ih.dtype and not cast:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({W_ih.dtype}). "
            f"Convert input: input.to({W_ih.dtype}), or convert model: model.to({input.dtype})"
        )
    I = W_ih.shape[-1]
    if input.shape[-1] != I:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {I}, got {input.shape[-1]}")
    sizes = (W_hh.shape[-1], W_ih.shape[0] // 4)  # of h and of the LSTM's c: another where h is projected
    for i, hidden in enumerate(state):
        expected = (rows, B, sizes[i])
        if hidden.shape != expected:
            which = f"hidden[{i}]" if len(state) == 2 else "hidden"
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
            if tensor.dtype != input.dtype and not cast:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {input.dtype} "
                    f"and {kind} tensor with {tensor.dtype}"
                )
