"""Checks of shape, dtype and device before anything runs; torch.nn's own error types and texts where it has them.

Source of those texts: torch/nn/modules/rnn.py and aten/src/ATen/native/RNN.cpp of torch 2.13.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, as torch.nn's on CUDA; float64 is never narrowed by it."""
    kind = input.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return input.dtype


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


def check_call(
    gates: int,
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    directions: int,
    bias: bool,
    batch_first: bool,
) -> None:
    """Everything that a kernel relies on; input is (T, B, I), or (B, T, I) if batch_first."""
    per_direction = 4 if bias else 2
    if len(params) != num_layers * directions * per_direction:
        raise ValueError(
            f"params: expected {num_layers} layers x {directions} directions x {per_direction} tensors, "
            f"{num_layers * directions * per_direction} in all; got {len(params)}"
        )
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    W_ih, W_hh = params[0], params[1]
    cast = compute_dtype(input) != input.dtype
    if input.dtype != W_ih.dtype and not cast:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({W_ih.dtype}). "
            f"Convert input: input.to({W_ih.dtype}), or convert model: model.to({input.dtype})"
        )
    I, H = W_ih.shape[-1], W_hh.shape[-1]
    if input.shape[-1] != I:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {I}, got {input.shape[-1]}")
    B, T = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
    expected = (num_layers * directions, B, H)
    for i, hidden in enumerate(state):
        if hidden.shape != expected:
            which = f"hidden[{i}]" if len(state) == 2 else "hidden"
            raise RuntimeError(f"Expected {which} size {expected}, got {list(hidden.shape)}")
    if T == 0:
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
    _check_params(gates, I, H, params, directions, per_direction)


def _check_params(gates: int, I: int, H: int, params: Sequence[Tensor], directions: int, per_direction: int) -> None:
    for i, tensor in enumerate(params):
        layer, role = i // (directions * per_direction), i % per_direction
        expected = [(gates * H, I if layer == 0 else directions * H), (gates * H, H), (gates * H,), (gates * H,)][role]
        if tensor.shape != expected:
            name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[role]
            raise ValueError(f"params[{i}] ({name}_l{layer}): expected {expected}, got {tuple(tensor.shape)}")
