"""Allocate outputs and launch the kernels of a plan; what is left to one product and one sum is here too."""

from typing import Any

import torch
from torch import Tensor

from . import compiler, interpreter
from .device import DeviceSpec
from .planner import plan
from .reference import GATES

CACHE_LINE = 128  # bytes
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def allocate_forward(cell: str, x_gates: Tensor, h_0: Tensor, c_0: Tensor | None, save: bool) -> Tensors:
    """y, h_n, c_n, saved, c; an output that this cell or call lacks has no elements."""
    from .kernels.cells import CELLS

    T, B, D, _, H = x_gates.shape
    saved = CELLS[cell].saved if save else 0
    return (
        x_gates.new_empty(T, B, D, H),
        h_0.new_empty(D, B, H),
        x_gates.new_empty(0) if c_0 is None else c_0.new_empty(D, B, H),
        x_gates.new_empty((T, B, D, saved, H) if saved else 0),
        x_gates.new_empty((T, B, D, H) if save and c_0 is not None else 0),
    )


def forward(
    cell: str,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    save: bool,
    backend: str,
) -> Tensors:
    """Run the persistent forward kernel of a tier."""
    y, h_n, c_n, saved, c = outputs = allocate_forward(cell, x_gates, h_0, c_0, save)
    pointers = (x_gates, W_hh, b_hh, h_0, c_0, y, h_n, _present(c_n), _present(c), _present(saved))
    if backend == "cooperative":  # programs exchange the state in y's dtype, the one before the first step too
        pointers += (None if h_0.dtype == y.dtype else h_0.to(y.dtype),)
    _launch("forward", cell, backend, y, *pointers)
    return outputs


def backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    W_hh: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    y: Tensor,
    saved: Tensor,
    c: Tensor,
    needs_dW: bool,
    needs_db: bool,
    backend: str,
) -> Tensors:
    """Run the persistent backward kernel of a tier, then dW_hh (D, G*H, H) as one product, db_hh (D, G*H) as one sum.

    Returns d_x_gates, dW_hh, db_hh, dh_0, dc_0. Products and sums accumulate in fp32 in a fixed order, so that a
    run can be repeated bit by bit.
    """
    from .kernels.cells import CELLS

    spec = CELLS[cell]
    T, B, D, H = y.shape
    d_x_gates = y.new_empty(T, B, D, GATES[cell], H)
    # The last gate's recurrent share, where its gradient differs from d_x_gates (the GRU's n: d_n * r).
    d_rec_last = y.new_empty((T, B, D, 1, H) if spec.splits_last_gate else 0)
    dh_0 = h_0.new_empty(D, B, H)
    dc_0 = y.new_empty(0) if c_0 is None else c_0.new_empty(D, B, H)
    # States inside a sequence were rounded when they were kept; those before it must be, to be what they are inside.
    h_0, c_0 = h_0.to(y.dtype), None if c_0 is None else c_0.to(y.dtype)
    kept_0, kept = (c_0, c) if spec.has_c else (h_0, y)
    _launch(
        "backward", cell, backend, y,
        dy, dh_n, dc_n if spec.has_c else None, W_hh, kept_0, kept, _present(saved),
        d_x_gates, _present(d_rec_last), dh_0, _present(dc_0),
    )  # fmt: skip
    d_rec = [d_x_gates[..., :-1, :], d_rec_last] if spec.splits_last_gate else [d_x_gates]
    dW_hh = torch.cat([_weight_gradient(d, h_0, y) for d in d_rec], dim=1) if needs_dW else y.new_empty(0)
    db_hh = torch.cat([d.sum((0, 1)) for d in d_rec], dim=1).flatten(1) if needs_db else y.new_empty(0)
    return d_x_gates, dW_hh, db_hh, dh_0, dc_0


def _weight_gradient(d_rec: Tensor, h_0: Tensor, y: Tensor) -> Tensor:
    """dW_hh[d] = sum over t, b of d_rec[t, b, d] (x) h_prev[t, b, d]; h_prev is y one step before, h_0 at the start.

    d_rec (T, B, D, N, H) gives (D, N*H, H). The start is a product of its own: y need not be copied to shift it.
    """
    gradients = []
    for d in range(y.shape[2]):
        d_gates = d_rec[:, :, d].flatten(2)  # (T, B, N*H), a view
        first, rest, h_prev = (
            (d_gates[0], d_gates[1:], y[:-1, :, d]) if d == 0 else (d_gates[-1], d_gates[:-1], y[1:, :, d])
        )
        gradients.append(torch.addmm(first.T @ h_0[d], rest.flatten(0, 1).T, h_prev.flatten(0, 1)))
    return torch.stack(gradients)


def _present(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _launch(which: str, cell: str, backend: str, y: Tensor, *pointers: Tensor | None) -> None:
    """Launch the tier's kernel, "forward" or "backward", by its plan for y (T, B, D, H); an empty batch needs none."""
    from .kernels.cells import CELLS
    from .kernels.tile import cooperative, resident

    T, B, D, H = y.shape
    if B == 0:
        return
    spec = CELLS[cell]
    sizes = {"hidden_size": H, "batch_size": B, "seq_len": T, "directions": D}
    device = DeviceSpec.of(y.device)
    kernel = plan(cell, **sizes, dtype=y.dtype, device=device, backend=backend).kernel  # type: ignore[arg-type]
    assert kernel is not None
    constants = {
        "CELL": getattr(spec, which),
        "G": GATES[cell],
        "S": spec.saved,
        "HAS_C": spec.has_c,
        "ACTIVATIONS": kernel.activations,
        "H": H,
        "BLOCK_B": kernel.block_b,
        "PRECISION": kernel.precision,
    }
    options: dict[str, Any] = {"num_warps": kernel.warps, "num_ctas": kernel.ctas, "enable_fp_fusion": True}
    # torch.cuda.device_of makes Triton launch on the tensors' GPU, and does nothing for CPU tensors.
    with interpreter.corrected(), torch.cuda.device_of(y):
        if kernel.dialect == "Gluon":  # imported only here: Triton before 3.7 lacks what it needs
            from .kernels.gluon import cooperative, resident

            constants["D"] = D
        if backend != "cooperative":
            function, arguments = getattr(resident, which), (*pointers, T, B)
            constants["BLOCK_H"] = kernel.units * kernel.ctas
        else:
            # Counters of the grid barrier, zero at every launch; each on a cache line of its own.
            _, batch_tiles, directions = kernel.grid
            counters = torch.zeros(batch_tiles * directions, CACHE_LINE // 8, dtype=torch.int64, device=y.device)
            function, arguments = getattr(cooperative, which), (*pointers, counters, T, B)
            constants |= {
                "BLOCK_N": kernel.units,
                "WARPS": kernel.warps,
                "SPIN_ON_LOAD": kernel.spin_on_load,
                "COUNTER_STRIDE": counters.stride(0),
            }
            # The driver refuses a grid whose programs cannot all be resident, instead of leaving it to hang.
            options["launch_cooperative_grid"] = True
        choices = kernel.choices[which]
        if not interpreter.ENABLED:
            variant = (
                device,
                *constants.values(),
                *(None if pointer is None else pointer.dtype for pointer in pointers),
            )
            options |= constants
            options |= compiler.first_without_spills(function, variant, list(choices), arguments, kernel.grid, options)
            function[kernel.grid](*arguments, **options)
        elif backend != "cooperative":
            function[kernel.grid](*arguments, **constants)
        else:
            from . import together

            together.launch(function, kernel.grid, *arguments, **constants, **choices[0])
