"""Checks of the op's arguments, before anything runs."""

import torch
from torch import Tensor

from ..cells import Cell
from ..sequences import Sequences


def check_recurrence(
    cell: Cell, x_gates: Tensor, given: dict[str, Tensor | None], sequences: Sequences | None, by_step: bool, heads: int
) -> None:
    """Check the arguments of fastrnn.ops.recurrence, so that no kernel reads outside a tensor.

    given: W_hh, b_hh, h_0, c_0, reset_h and reset_c by name. c_0 and reset_c have all states beside h.
    """
    gates, others = cell.gates, len(cell.states) - 1
    has_c = others > 0
    ragged = x_gates.dim() == 4 and sequences is not None
    slots = x_gates.shape[: 1 if ragged else 2]
    first = "total" if ragged else "T, B"
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {heads!r}")
    if x_gates.dim() - len(slots) != 3 or x_gates.shape[-2] != gates or x_gates.shape[-3] not in (heads, 2 * heads):
        shape = f"({first}, D, {gates}, H)" if heads == 1 else f"({first}, D * {heads}, {gates}, H / {heads})"
        raise ValueError(f"x_gates: expected {shape} with D 1 or 2, got {tuple(x_gates.shape)}")
    R, _, K = x_gates.shape[-3:]
    D, H = R // heads, heads * K
    if ragged and sequences.rows is None:  # type: ignore[union-attr]
        raise ValueError(f"sequences: expected rows beside ragged x_gates {tuple(x_gates.shape)}, got None")
    B = sequences.rows.shape[1] if ragged else slots[1]  # type: ignore[union-attr]
    if slots[0] == 0 or H == 0:
        raise ValueError(f"x_gates: expected at least one time step and hidden unit, got {tuple(x_gates.shape)}")
    c_0, reset_h, reset_c = given["c_0"], given["reset_h"], given["reset_c"]
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
    several = (others,) if others > 1 else ()
    shapes = {
        "W_hh": (R, gates * K, K),
        "b_hh": (R, gates * K),
        "h_0": (D, B, H),
        "c_0": (*several, D, B, H),
        "reset_h": start,
        "reset_c": (*several, *start),
        "sequences.rows": (3, B),
        "sequences.reset": tuple(slots),
    }
    for name, tensor in (given | {"sequences.rows": rows, "sequences.reset": reset}).items():
        expected = shapes[name]
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
