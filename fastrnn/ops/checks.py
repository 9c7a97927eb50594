"""Checks of the bare op's arguments, before anything runs."""

import torch
from torch import Tensor

from ..sequences import Sequences


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
