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


def check_checkpoint_every(K: int | None) -> None:
    """Steps of a chunk, or None."""
    if K is not None and (not isinstance(K, int) or isinstance(K, bool) or K < 1):
        raise ValueError(f"checkpoint_every: expected a positive int or None, got {K!r}")


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
    """The flat list of weights: for each layer and direction weight_ih, weight_hh and, if bias, bias_ih and bias_hh."""
    per_direction = 4 if bias else 2
    count = num_layers * directions * per_direction
    if len(params) != count:
        raise ValueError(
            f"params: expected {num_layers} layers x {directions} directions x {per_direction} tensors, "
            f"{count} in all; got {len(params)}"
        )
    I, H = params[0].shape[-1], params[1].shape[-1]
    for i, tensor in enumerate(params):
        layer, role = i // (directions * per_direction), i % per_direction
        expected = [(gates * H, I if layer == 0 else directions * H), (gates * H, H), (gates * H,), (gates * H,)][role]
        if tensor.shape != expected:
            name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[role]
            raise ValueError(f"params[{i}] ({name}_l{layer}): expected {expected}, got {tuple(tensor.shape)}")


def check_call(
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    directions: int,
    batch_first: bool,
) -> None:
    """Input (T, B, I), or (B, T, I) if batch_first, and state against the weights, and dtypes and devices of all."""
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


def check_recurrence(
    gates: int, x_gates: Tensor, W_hh: Tensor, b_hh: Tensor | None, h_0: Tensor, c_0: Tensor | None, has_c: bool
) -> None:
    """Arguments of the bare op, so that no kernel reads outside of a tensor."""
    if x_gates.dim() != 5 or x_gates.shape[3] != gates or x_gates.shape[2] not in (1, 2):
        raise ValueError(f"x_gates: expected (T, B, D, {gates}, H) with D 1 or 2, got {tuple(x_gates.shape)}")
    T, B, D, _, H = x_gates.shape
    if T == 0 or H == 0:
        raise ValueError(f"x_gates: expected at least one time step and hidden unit, got {tuple(x_gates.shape)}")
    if (c_0 is not None) != has_c:
        raise ValueError(
            f"c_0: expected {'a tensor' if has_c else 'None'}, got {'None' if c_0 is None else 'a tensor'}"
        )
    for name, tensor, expected in (
        ("W_hh", W_hh, (D, gates * H, H)),
        ("b_hh", b_hh, (D, gates * H)),
        ("h_0", h_0, (D, B, H)),
        ("c_0", c_0, (D, B, H)),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
        dtypes = [x_gates.dtype]
        if name in ("h_0", "c_0") and x_gates.dtype.itemsize == 2:
            dtypes.append(torch.float32)
        if tensor.dtype not in dtypes or tensor.device != x_gates.device:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dtypes))} on {x_gates.device}, as x_gates; "
                f"got {tensor.dtype} on {tensor.device}"
            )
