"""Allocate outputs and launch the kernels of a plan; what is left to one product and one sum is here too."""

import torch
from torch import Tensor

from . import interpreter
from .device import DeviceSpec
from .planner import KernelPlan, plan
from .reference import GATES

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def allocate_forward(cell: str, x_gates: Tensor, save: bool) -> Tensors:
    """y, h_n, c_n, saved, c; an output that this cell or call lacks has no elements."""
    from .kernels.cells import CELLS

    T, B, D, _, H = x_gates.shape
    has_c, saved = CELLS[cell].has_c, CELLS[cell].saved if save else 0
    return (
        x_gates.new_empty(T, B, D, H),
        x_gates.new_empty(D, B, H),
        x_gates.new_empty((D, B, H) if has_c else 0),
        x_gates.new_empty((T, B, D, saved, H) if saved else 0),
        x_gates.new_empty((T, B, D, H) if save and has_c else 0),
    )


def forward(
    cell: str, x_gates: Tensor, W_hh: Tensor, b_hh: Tensor | None, h_0: Tensor, c_0: Tensor | None, save: bool
) -> Tensors:
    """Run the persistent forward kernel."""
    from .kernels.cells import CELLS
    from .kernels.tile import resident

    y, h_n, c_n, saved, c = outputs = allocate_forward(cell, x_gates, save)
    kernel = _kernel_plan(cell, x_gates)
    if kernel is not None:
        _launch(
            resident.forward, kernel, x_gates,
            x_gates, W_hh, b_hh, h_0, c_0, y, h_n, _present(c_n), _present(c), _present(saved),
            CELL=CELLS[cell].forward, G=GATES[cell], S=CELLS[cell].saved, HAS_C=CELLS[cell].has_c,
        )  # fmt: skip
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
) -> Tensors:
    """Run the persistent backward kernel, then dW_hh (D, G*H, H) as one product and db_hh (D, G*H) as one sum.

    Returns d_x_gates, dW_hh, db_hh, dh_0, dc_0. Products and sums accumulate in fp32 in a fixed order, so that a
    run can be repeated bit by bit.
    """
    from .kernels.cells import CELLS
    from .kernels.tile import resident

    spec = CELLS[cell]
    T, B, D, H = y.shape
    d_x_gates = y.new_empty(T, B, D, GATES[cell], H)
    # The last gate's recurrent share, where its gradient differs from d_x_gates (the GRU's n: d_n * r).
    d_rec_last = y.new_empty((T, B, D, 1, H) if spec.splits_last_gate else 0)
    dh_0 = y.new_empty(D, B, H)
    dc_0 = y.new_empty((D, B, H) if spec.has_c else 0)
    kept_0, kept = (c_0, c) if spec.has_c else (h_0, y)
    kernel = _kernel_plan(cell, d_x_gates)
    if kernel is not None:
        _launch(
            resident.backward, kernel, y,
            dy, dh_n, dc_n if spec.has_c else None, W_hh, kept_0, kept, _present(saved),
            d_x_gates, _present(d_rec_last), dh_0, _present(dc_0),
            CELL=spec.backward, G=GATES[cell], S=spec.saved, HAS_C=spec.has_c,
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


def _kernel_plan(cell: str, gates: Tensor) -> KernelPlan | None:
    """The plan for gates (T, B, D, G, H); None for an empty batch, which needs no kernel."""
    T, B, D, _, H = gates.shape
    if B == 0:
        return None
    return plan(
        cell,
        hidden_size=H,
        batch_size=B,
        seq_len=T,
        directions=D,
        dtype=gates.dtype,
        device=DeviceSpec.of(gates.device),
        backend="resident",
    ).kernel


def _launch(kernel, plan: KernelPlan, like: Tensor, *pointers: Tensor | None, **cell) -> None:
    T, B, D, H = like.shape[0], like.shape[1], like.shape[2], like.shape[-1]
    options = {"num_warps": plan.warps, "enable_fp_fusion": True} | (
        {"maxnreg": plan.max_registers} if plan.max_registers else {}
    )
    # torch.cuda.device_of makes Triton launch on the tensors' GPU, and does nothing for CPU tensors.
    with interpreter.corrected(), torch.cuda.device_of(like):
        kernel[(plan.programs // D, D)](
            *pointers, T, B,
            H=H, BLOCK_B=plan.block_b, BLOCK_H=plan.block_h, PRECISION=plan.precision,
            **cell, **options,
        )  # fmt: skip
