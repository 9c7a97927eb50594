"""Checks of shape, dtype and device before anything runs; torch.nn's own error types and texts where it has them.

Source of those texts: torch/nn/modules/rnn.py and aten/src/ATen/native/RNN.cpp of torch 2.13.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences

# Devices that autocast knows. Asked on import: torch.compile cannot trace the question before torch 2.12.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)
)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, as torch.nn's on CUDA; float64 is never narrowed by it."""
    kind = input.device.type
    if kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
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
    """The flat list of weights: of each layer and direction weight_ih, weight_hh, and bias_ih, bias_hh, weight_hr."""
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


class Options(NamedTuple):
    """What a call says of its sequences, beside input and state; checked, tensors are on the input's device."""

    lengths: Any = None  # (B,), a tensor, or a list; checked, a tensor
    cu_seqlens: Tensor | None = None  # (N + 1,)
    reset: Tensor | None = None  # (T, B) or (total,)
    reset_state: Any = None  # a tensor, or a pair; checked, a tuple or None
    cell_states: bool = False

    @property
    def plain(self) -> bool:
        return not self.cell_states and all(given is None for given in self[:-1])


PLAIN = Options()


def check_options(
    options: Options, input: Tensor, batch_first: bool, cell: str, states: int, sizes: tuple[int, int]
) -> tuple[int, int, Options]:
    """T, or total of a ragged input, and B; options with time first, each tensor on the input's device.

    Values are checked on the CPU; on a GPU, where that would have to wait, by an assertion on the device.
    """
    lengths, cu_seqlens, reset, reset_state, cell_states = options
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths: expected None beside cu_seqlens, got both")
        if input.dim() != 2:
            raise ValueError(f"input: expected (total, input_size) beside cu_seqlens, got {tuple(input.shape)}")
        _check_integers("cu_seqlens", cu_seqlens, input)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected (N + 1,) with N at least 1, got {tuple(cu_seqlens.shape)}")
        T, B = len(input), len(cu_seqlens) - 1
        increases = (cu_seqlens.diff() > 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T)
        _check_values(increases, f"cu_seqlens: expected increasing from 0 to total={T}", cu_seqlens)
        options = options._replace(cu_seqlens=cu_seqlens.to(input.device, non_blocking=True))
        slots: tuple[int, ...] = (T,)
    else:
        if input.dim() != 3:
            raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
        T, B = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
        slots = (B, T) if batch_first else (T, B)
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
        _check_integers("lengths", lengths, input)
        if lengths.shape != (B,):
            raise ValueError(f"lengths: expected ({B},), one for each sequence; got {tuple(lengths.shape)}")
        _check_values(((lengths > 0) & (lengths <= T)).all(), f"lengths: expected 1 to T={T}", lengths)
        options = options._replace(lengths=lengths.to(input.device, non_blocking=True))
    if reset is not None:
        if reset.dtype != torch.bool or reset.device != input.device or reset.shape != slots:
            raise ValueError(
                f"reset: expected {slots} of torch.bool on {input.device}; "
                f"got {tuple(reset.shape)} of {reset.dtype} on {reset.device}"
            )
        options = options._replace(reset=reset.T if batch_first and cu_seqlens is None else reset)
    if reset_state is not None:
        if reset is None:
            raise ValueError("reset_state: expected None without reset, which says where it is taken")
        options = options._replace(
            reset_state=_check_reset_state(reset_state, input, cell, states, T, B, sizes, len(slots))
        )
    if cell_states and cell != "lstm":
        raise ValueError(f"return_cell_states: expected False for {cell!r}, which has no cell state; got True")
    return T, B, options


def _check_integers(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device.type not in ("cpu", input.device.type):
        raise ValueError(
            f"{name}: expected torch.int64 or torch.int32 on {input.device} or the CPU; "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_values(right: Tensor, expected: str, got: Tensor) -> None:
    if torch.compiler.is_compiling() or got.device.type != "cpu":
        torch._assert_async(right, expected)
    elif not right:
        raise ValueError(f"{expected}; got {got.tolist()}")


def _check_reset_state(
    reset_state: Any, input: Tensor, cell: str, states: int, T: int, B: int, sizes: tuple[int, int], slot_dims: int
) -> tuple[Tensor, ...]:
    """A tuple of (states, B or 1, H), or by step of (T, states, B or 1, H), (total, states, 1, H) if ragged."""
    count = 2 if cell == "lstm" else 1
    given = tuple(reset_state) if count == 2 and isinstance(reset_state, tuple | list) else (reset_state,)
    if len(given) != count or not all(isinstance(state, Tensor) for state in given):
        raise ValueError(f"reset_state: expected {'a pair of tensors' if count == 2 else 'a tensor'}, as hx")
    rows = (B,) if slot_dims == 2 else (1,)
    for state, H in zip(given, sizes, strict=False):  # h, and c, of another size where h is projected
        by_row, by_step = (states, B, H), (T, states, *rows, H)
        expected = by_step if state.dim() == 4 else by_row
        fits = state.dim() in (3, 4) and state.shape[-1] == H and state.shape[-3] == states
        fits = fits and state.shape[-2] in (1, expected[-2]) and (state.dim() == 3 or state.shape[0] == T)
        if not fits or state.dim() != given[0].dim():
            raise ValueError(
                f"reset_state: expected {by_row}, or by step {by_step}, with 1 for {B} where all sequences share it; "
                f"got {tuple(state.shape)}"
            )
        if state.device != input.device or not state.is_floating_point():
            raise ValueError(
                f"reset_state: expected floating point on {input.device}; got {state.dtype} on {state.device}"
            )
    return given


def check_call(
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    directions: int,
    T: int,
    B: int,
) -> None:
    """Input of check_options' T and B, and state, against the weights, and dtypes and devices of all."""
    W_ih, W_hh = params[0], params[1]
    cast = compute_dtype(input) != input.dtype
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
        expected = (num_layers * directions, B, sizes[i])
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
    gates: int,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    sequences: Sequences | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    by_step: bool,
    *,
    has_c: bool,
) -> None:
    """Arguments of the bare op, so that no kernel reads outside of a tensor."""
    ragged = x_gates.dim() == 4 and sequences is not None
    slots = x_gates.shape[: 1 if ragged else 2]
    first = "total" if ragged else "T, B"
    if x_gates.dim() - len(slots) != 3 or x_gates.shape[-2] != gates or x_gates.shape[-3] not in (1, 2):
        raise ValueError(f"x_gates: expected ({first}, D, {gates}, H) with D 1 or 2, got {tuple(x_gates.shape)}")
    D, _, H = x_gates.shape[-3:]
    B = sequences.rows.shape[1] if ragged else slots[1]  # type: ignore[union-attr]
    if slots[0] == 0 or H == 0:
        raise ValueError(f"x_gates: expected at least one time step and hidden unit, got {tuple(x_gates.shape)}")
    if (c_0 is not None) != has_c:
        raise ValueError(
            f"c_0: expected {'a tensor' if has_c else 'None'}, got {'None' if c_0 is None else 'a tensor'}"
        )
    rows, reset = sequences or (None, None)
    if reset is None and reset_h is not None:
        raise ValueError("reset_h: expected None without a reset, got a tensor")
    if (reset_c is not None) != (has_c and reset_h is not None):
        raise ValueError("reset_c: expected a tensor beside reset_h where the cell has a c, else None")
    start = (*slots, D, H) if by_step else (D, B, H)
    for name, tensor, expected in (
        ("W_hh", W_hh, (D, gates * H, H)),
        ("b_hh", b_hh, (D, gates * H)),
        ("h_0", h_0, (D, B, H)),
        ("c_0", c_0, (D, B, H)),
        ("reset_h", reset_h, start),
        ("reset_c", reset_c, start),
        ("sequences.rows", rows, (3, B)),
        ("sequences.reset", reset, tuple(slots)),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
        dtypes = {"sequences.rows": [torch.int64], "sequences.reset": [torch.bool]}.get(name, [x_gates.dtype])
        if name in ("h_0", "c_0", "reset_h", "reset_c") and x_gates.dtype.itemsize == 2:
            dtypes.append(torch.float32)
        if tensor.dtype not in dtypes or tensor.device != x_gates.device:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dtypes))} on {x_gates.device}, as x_gates; "
                f"got {tensor.dtype} on {tensor.device}"
            )
