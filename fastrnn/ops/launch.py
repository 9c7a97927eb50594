"""Allocate outputs and launch the kernels of a plan; what is left to one product and one sum is here too."""

from typing import Any

import torch
from torch import Tensor

from ..compat import driver, interpreter, profiling, spills
from ..device import DeviceSpec
from ..planning.planner import plan
from ..reference import GATES
from ..sequences import Sequences, Slots, states_before

CACHE_LINE = 128  # bytes
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def allocate_forward(
    cell: str,
    x_gates: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    save: bool,
    rows: Tensor | None = None,
    cell_states: bool = False,
) -> Tensors:
    """y, h_n, c_n, saved, c; an output that this cell or call lacks has no elements."""
    from ..kernels.cells import CELLS

    *slots, D, _, H = x_gates.shape
    saved = CELLS[cell].saved if save else 0
    has_c = c_0 is not None and (save or cell_states)
    # Kernels write no frozen slot: outputs are zero there.
    allocate = x_gates.new_zeros if rows is not None else x_gates.new_empty
    return (
        allocate(*slots, D, H),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        x_gates.new_empty(0) if c_0 is None else torch.empty_like(c_0, memory_format=torch.contiguous_format),
        x_gates.new_empty((*slots, D, saved, H) if saved else 0),
        allocate((*slots, D, H) if has_c else 0),
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
    rows: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    by_step: bool = False,
    cell_states: bool = False,
) -> Tensors:
    """Run the persistent forward kernel of a tier."""
    y, h_n, c_n, saved, c = outputs = allocate_forward(cell, x_gates, h_0, c_0, save, rows, cell_states)
    pointers = (x_gates, W_hh, b_hh, h_0, c_0, y, h_n, _present(c_n), _present(c), _present(saved))
    pointers += (rows, _bytes(reset), reset_h, reset_c)
    if backend == "cooperative":  # h of even steps and of odd ones, as programs exchange it
        pointers += (y.new_empty(2, *h_0.shape),)
    _launch("forward", cell, backend, y, h_0.shape[1], rows, by_step, *pointers)
    return outputs


def backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    W_hh: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    y: Tensor,
    saved: Tensor,
    c: Tensor,
    needs_dW: bool,
    needs_db: bool,
    backend: str,
    rows: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    by_step: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the persistent backward kernel of a tier, then dW_hh (D, G*H, H) as one product, db_hh (D, G*H) as one sum.

    Returns d_x_gates, dW_hh, db_hh, dh_0, dc_0, d_reset_h, d_reset_c. Products and sums accumulate in fp32 in a fixed
    order, so that a run can be repeated bit by bit.
    """
    from ..kernels.cells import CELLS

    spec = CELLS[cell]
    *slots, D, H = y.shape
    B = h_0.shape[1]
    allocate = y.new_zeros if rows is not None else y.new_empty
    d_x_gates = allocate(*slots, D, GATES[cell], H)
    # The last gate's recurrent share, where its gradient differs from d_x_gates (the GRU's n: d_n * r).
    d_rec_last = allocate((*slots, D, 1, H) if spec.splits_last_gate else 0)
    dh_0 = torch.empty_like(h_0)
    dc_0 = y.new_empty(0) if c_0 is None else torch.empty_like(c_0)
    d_resets = [y.new_zeros(0) if s is None else s.new_zeros(*slots, D, H) for s in (reset_h, reset_c)]
    # States inside a sequence were rounded when they were kept; those before it must be, to be what they are inside.
    h_0, c_0 = h_0.to(y.dtype), None if c_0 is None else c_0.to(y.dtype)
    kept_0, kept, reset_kept = (c_0, c, reset_c) if spec.has_c else (h_0, y, reset_h)
    _launch(
        "backward", cell, backend, y, B, rows, by_step,
        dy, dh_n, *((dc_n, dc) if spec.has_c else (None, None)), W_hh, kept_0, kept, _present(saved),
        rows, _bytes(reset), reset_kept,
        d_x_gates, _present(d_rec_last), dh_0, _present(dc_0), *map(_present, d_resets),
    )  # fmt: skip
    d_rec = [d_x_gates[..., :-1, :], d_rec_last] if spec.splits_last_gate else [d_x_gates]
    dW_hh, db_hh = y.new_empty(0), y.new_empty(0)
    if needs_dW:
        sequences = None if rows is None else Sequences(rows, reset)
        start = None if reset_h is None else reset_h.to(y.dtype)
        dW_hh = torch.stack([_weight_gradient(d, d_rec, y, h_0, sequences, start, by_step) for d in range(D)])
    if needs_db:
        db_hh = torch.cat([d.flatten(0, -4).sum(0) for d in d_rec], dim=1).flatten(1)
    if not by_step and reset_h is not None:
        of = Slots.of(rows, y.shape[:-2])  # type: ignore[arg-type]
        d_resets = [d if d.numel() == 0 else of.summed(d).to(d.dtype).transpose(0, 1).contiguous() for d in d_resets]
    d_reset_h, d_reset_c = d_resets
    return d_x_gates, dW_hh, db_hh, dh_0, dc_0, d_reset_h, d_reset_c


@profiling.inside("weight gradients")
def _weight_gradient(
    d: int,
    d_rec: list[Tensor],
    y: Tensor,
    h_0: Tensor,
    sequences: Sequences | None,
    reset_h: Tensor | None,
    by_step: bool,
) -> Tensor:
    """dW_hh[d] (G*H, H) = sum over slots of d_rec[slot, d] (x) h_prev[slot, d]; d_rec by parts of the gates.

    h_prev is y one step before, h_0 at the start. Plain sequences need no copy of it: the start is a product of its
    own, and y only shifted.
    """
    gradients, y = [], y.select(-2, d)
    if sequences is not None:
        start = None if reset_h is None else reset_h.select(-2, d) if by_step else reset_h[d]
        h_prev = states_before(d, y, h_0[d], sequences, start, by_step).flatten(0, -2)
    for part in d_rec:
        d_gates = part.select(-3, d).flatten(-2)  # (T, B, N*H) or (total, N*H), a view
        if sequences is not None:
            gradients.append(d_gates.flatten(0, -2).T @ h_prev)
            continue
        first, rest, shifted = (d_gates[0], d_gates[1:], y[:-1]) if d == 0 else (d_gates[-1], d_gates[:-1], y[1:])
        gradients.append(torch.addmm(first.T @ h_0[d], rest.flatten(0, 1).T, shifted.flatten(0, 1)))
    return torch.cat(gradients)


def _present(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


@profiling.inside("recurrence")
def _launch(
    which: str,
    cell: str,
    backend: str,
    y: Tensor,
    B: int,
    rows: Tensor | None,
    by_step: bool,
    *pointers: Tensor | None,
) -> None:
    """Launch the tier's kernel, "forward" or "backward", by its plan for y (T, B, D, H), or (total, D, H) if ragged."""
    from ..kernels.cells import CELLS
    from ..kernels.tile import cooperative, resident

    if B == 0:  # an empty batch needs no kernel
        return
    D, H = y.shape[-2:]
    T = max(1, y.shape[0] if y.dim() == 4 else y.shape[0] // B)  # of ragged sequences, which the table bounds: a mean
    spec = CELLS[cell]
    sizes = {"hidden_size": H, "batch_size": B, "seq_len": T, "directions": D}
    device = DeviceSpec.of(y.device)
    kernel = plan(cell, **sizes, dtype=y.dtype, device=device, backend=backend).kernel  # type: ignore[arg-type]
    assert kernel is not None
    if which == "forward" and pointers[2] is None and kernel.dialect == "tile Triton":
        # Without b_hh, LLVM aborts the process at the LSTM in full fp32 (Triton 3.9.0, an assertion of its vectorizer).
        pointers = (*pointers[:2], y.new_zeros(D, GATES[cell] * H), *pointers[3:])
    constants = {
        "CELL": getattr(spec, which),
        "G": GATES[cell],
        "S": spec.saved,
        "HAS_C": spec.has_c,
        "ACTIVATIONS": kernel.activations,
        "RAGGED": y.dim() == 3,
        "BY_STEP": by_step,
        "H": H,
        "BLOCK_B": kernel.block_b,
        "PRECISION": kernel.precision,
    }
    options: dict[str, Any] = {"num_warps": kernel.warps, "num_ctas": kernel.ctas, "enable_fp_fusion": True}
    # torch.cuda.device_of makes Triton launch on the tensors' GPU, and does nothing for CPU tensors.
    with interpreter.corrected(), torch.cuda.device_of(y):
        if kernel.dialect == "Gluon":  # imported only here: Triton before 3.6 lacks what it needs
            from ..kernels.gluon import cooperative, resident

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
            options |= constants
            try:
                options |= spills.first_without_spills(function, device, choices, arguments, kernel.grid, options)
                function[kernel.grid](*arguments, **options)
            except Exception as error:
                driver.refuse(error, backend, cell, H, y.dtype, kernel, device)
                raise
        elif backend != "cooperative":
            function[kernel.grid](*arguments, **constants)
        else:
            from ..compat import concurrent_interpreter

            concurrent_interpreter.launch(function, kernel.grid, *arguments, **constants, **choices[0])
