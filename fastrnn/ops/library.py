"""torch.library ops: schema, fake and autograd of the persistent recurrence. Kernels are launched by launch.py.

fastrnn::recurrence             forward over all of time
fastrnn::recurrence_backward    its gradients; theirs in turn by a slow path in torch (double_backward.py)
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..planning.tiers import TIERS
from ..reference import GATES, HAS_C
from ..sequences import Sequences
from . import double_backward, launch, torch_func
from .checks import check_recurrence


@torch.library.custom_op("fastrnn::recurrence", mutates_args=())
def _recurrence(
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    cell: str,
    save: bool,
    backend: str,
    x: Tensor | None = None,
    W_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    rows: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    by_step: bool = False,
    cell_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # x, W_ih and b_ih, of which x_gates was made, are only passed on to double backward.
    x_gates, W_hh, h_0 = x_gates.contiguous(), W_hh.contiguous(), h_0.contiguous()
    b_hh, c_0, *of_sequences = map(_contiguous, (b_hh, c_0, rows, reset, reset_h, reset_c))
    return launch.forward(
        cell, x_gates, W_hh, b_hh, h_0, c_0, save, backend, *of_sequences, by_step=by_step, cell_states=cell_states
    )


@_recurrence.register_fake
def _(
    x_gates,
    W_hh,
    b_hh,
    h_0,
    c_0,
    cell,
    save,
    backend,
    x=None,
    W_ih=None,
    b_ih=None,
    rows=None,
    reset=None,
    reset_h=None,
    reset_c=None,
    by_step=False,
    cell_states=False,
):
    return launch.allocate_forward(cell, x_gates, h_0, c_0, save, rows, cell_states)


@torch.library.custom_op("fastrnn::recurrence_backward", mutates_args=())
def _recurrence_backward(
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
    cell: str,
    needs_dW: bool,
    needs_db: bool,
    backend: str,
    b_hh: Tensor | None = None,
    x: Tensor | None = None,
    W_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    rows: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    by_step: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, dh_n, dc_n, dc, c_0 = map(_contiguous, (dy, dh_n, dc_n, dc, c_0))
    of_sequences = map(_contiguous, (rows, reset, reset_h, reset_c))
    W_hh, h_0 = W_hh.contiguous(), h_0.contiguous()
    y, saved, c = y.contiguous(), saved.contiguous(), c.contiguous()  # vmap may give slices
    return launch.backward(
        cell, dy, dh_n, dc_n, dc, W_hh, h_0, c_0, y, saved, c, needs_dW, needs_db, backend,
        *of_sequences, by_step=by_step,
    )  # fmt: skip


@_recurrence_backward.register_fake
def _(
    dy,
    dh_n,
    dc_n,
    dc,
    W_hh,
    h_0,
    c_0,
    y,
    saved,
    c,
    cell,
    needs_dW,
    needs_db,
    backend,
    b_hh=None,
    x=None,
    W_ih=None,
    b_ih=None,
    rows=None,
    reset=None,
    reset_h=None,
    reset_c=None,
    by_step=False,
):
    *slots, D, H = y.shape
    gates = W_hh.shape[1]

    def like(tensor):
        return y.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return (
        y.new_empty(*slots, D, gates // H, H),
        y.new_empty((D, gates, H) if needs_dW else 0),
        y.new_empty((D, gates) if needs_db else 0),
        *map(like, (h_0, c_0, reset_h, reset_c)),
    )


def _save(ctx, inputs, output):
    _, W_hh, b_hh, h_0, c_0, ctx.cell, ctx.saved_for_backward, ctx.backend, *rest = inputs
    *source_and_sequences, ctx.by_step, _ = rest
    y, _, _, saved, c = output
    ctx.save_for_backward(W_hh, h_0, c_0, y, saved, c, b_hh, *source_and_sequences)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh_n, dc_n, d_saved, dc):
    if not ctx.saved_for_backward:
        raise RuntimeError("fastrnn::recurrence ran with save=False: nothing was kept for backward")
    W_hh, h_0, c_0, y, saved, c, *rest = ctx.saved_tensors
    needs_dW, needs_db = ctx.needs_input_grad[1:3]
    # Functions of the rest, by which double backward differentiates.
    y, saved, c = y.detach(), saved.detach(), c.detach()
    run = _RecurrenceBackward.apply if torch_func.transforming() else _recurrence_backward
    d_x_gates, dW_hh, db_hh, *of_states = run(
        dy, dh_n, dc_n, dc, W_hh, h_0, c_0, y, saved, c, ctx.cell, needs_dW, needs_db, ctx.backend, *rest, ctx.by_step
    )
    given = (h_0, c_0, *rest[-2:])
    dh_0, dc_0, d_reset_h, d_reset_c = (None if state is None else d for state, d in zip(given, of_states, strict=True))
    return (
        d_x_gates,
        dW_hh if needs_dW else None,
        db_hh if needs_db else None,
        dh_0,
        dc_0,
        *[None] * 8,  # cell, save, backend, x, W_ih, b_ih (x_gates is what the gradient goes to), rows, reset
        d_reset_h,
        d_reset_c,
        None,
        None,
    )


def _save_backward(ctx, inputs, output):
    upstream, (W_hh, h_0, c_0), inputs = inputs[:4], inputs[4:7], inputs[7:]
    _, _, _, ctx.cell, _, _, _, b_hh, *source, rows, reset, reset_h, reset_c, ctx.by_step = inputs
    ctx.save_for_backward(*upstream, *source, W_hh, b_hh, h_0, c_0, reset_h, reset_c, rows, reset)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *second):
    kept = ctx.saved_tensors
    upstream, source, recurrent, (rows, reset) = kept[:4], kept[4:7], kept[7:13], kept[13:]
    if source[0] is None:
        raise NotImplementedError(
            "double backward through fastrnn.ops.recurrence without its source is missing: "
            "give source=(x, W_ih, b_ih), use fastrnn.lstm, gru, rnn or the modules, or fastrnn.reference.recurrence"
        )
    sequences = None if rows is None else Sequences(rows, reset)
    found = double_backward.differentiate(ctx.cell, upstream, source, recurrent, second, sequences, ctx.by_step)
    of_upstream, of_source, (dW_hh, db_hh, *of_states) = found
    dh_0, dc_0, d_reset_h, d_reset_c = of_states
    return (*of_upstream, dW_hh, dh_0, dc_0, *[None] * 7, db_hh, *of_source, None, None, d_reset_h, d_reset_c, None)


@register_flop_formula(torch.ops.fastrnn.recurrence)
def _flops(x_gates, W_hh, *args, out_shape=None, **kwargs) -> int:
    """Of W_hh h at every step, for torch.utils.flop_counter, which has shapes; of padded steps too."""
    return 2 * math.prod(x_gates) * W_hh[-1]


@register_flop_formula(torch.ops.fastrnn.recurrence_backward)
def _backward_flops(dy, dh_n, dc_n, dc, W_hh, h_0, c_0, y, saved, c, cell, needs_dW, *args, out_shape=None, **kwargs):
    """Of the gradient of h at every step and, where it is wanted, of W_hh's."""
    return 2 * math.prod(y) * W_hh[1] * (2 if needs_dW else 1)


torch.library.register_autograd(_recurrence, _backward, setup_context=_save)
torch.library.register_autograd(_recurrence_backward, _double_backward, setup_context=_save_backward)
_Recurrence = torch_func.function(_recurrence, _save, _backward)
_RecurrenceBackward = torch_func.function(_recurrence_backward, _save_backward, _double_backward)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def recurrence(
    cell: str,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    backend: str = "resident",
    source: tuple[Tensor, Tensor, Tensor | None] | None = None,
    sequences: Sequences | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    by_step: bool = False,
    cell_states: bool = False,
) -> tuple[Any, ...]:
    """Run one recurrent layer, D directions, over all of time in one persistent launch.

        rec = W_hh h + b_hh;   (h, c) = cell(x_gates[t], rec, (h, c));   y[t] = h

    cell: "lstm", "gru", "rnn_tanh" or "rnn_relu", with G = 4, 3, 1, 1 gates in torch's row order, or one of your own
    (fastrnn.cells.register; what is said of the LSTM's c holds for all cells that have one).
    x_gates (T, B, D, G, H): W_ih x_t + b_ih. W_hh (D, G*H, H). b_hh (D, G*H) or None. h_0, c_0 (D, B, H); c_0 is None
    but for the LSTM. All of one dtype (float32, bfloat16, float16) and device; any strides. Direction 1 walks time
    from its end. backend: the tier, "resident", "cluster" or "cooperative". source: x (T, B, I), W_ih (D*G*H, I) and
    b_ih (D*G*H,) or None, of which x_gates was made: it makes gradients differentiable, by the reference recurrence run
    again.

    sequences: fastrnn.sequences.Sequences.of lengths, cu_seqlens or reset; each sequence then has its own length, and
    where they are ragged x_gates is (total, D, G, H), y (total, D, H). Past a sequence's end x_gates is not read, and y
    is zero. At resets the state starts anew from zero, or from reset_h and, LSTM, reset_c: (D, B, H), or by_step
    (T, B, D, H) or (total, D, H), given at the first step of the later segment for both directions.

    h_0, c_0, reset_h and reset_c may be float32 beside a 16-bit x_gates: h_n, c_n and the gradients of states are then
    float32 too, and a sequence that is run window by window gives the bits of one run.

    Returns y (T, B, D, H), h_n (D, B, H), c_n (D, B, H) or None and, with cell_states (LSTM only), c (T, B, D, H), as
    rounded as y; differentiable with respect to every tensor, once without source and any number of times with it.
    The state is fp32 from step to step. Nothing is kept for backward where no gradient is wanted.

    Raises ValueError, with expected and got, for a wrong shape, dtype or device, and NotImplementedError where no
    kernel holds W_hh (fastrnn.plan says why) or the device has none.

    Source: the equations of torch.nn.LSTM, GRU and RNN; the persistent form after Diamos et al. 2016.

    >>> import torch, fastrnn
    >>> from fastrnn.ops import recurrence
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU with TRITON_INTERPRET=1
    >>> x_gates, W_hh, h_0 = torch.zeros(5, 2, 1, 3, 4), torch.zeros(1, 12, 4), torch.ones(1, 2, 4)
    >>> x_gates, W_hh, h_0 = (t.to(device) for t in (x_gates, W_hh, h_0))
    >>> y, h_n, _ = recurrence("gru", x_gates, W_hh, None, h_0, None)  # z is 1/2, n is 0: the state halves
    >>> h_n[0, 0, 0].item()
    0.03125
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError("ONNX has no form of fastrnn's kernels: export fastrnn.revert(model)")
    if cell not in GATES:
        raise ValueError(f"cell: expected one of {', '.join(map(repr, GATES))}; got {cell!r}")
    if backend not in TIERS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, TIERS))}; got {backend!r}")
    has_c = cell in HAS_C
    if cell_states and not has_c:
        raise ValueError(f"cell_states: expected False for {cell!r}, which has no cell state; got True")
    inputs = (x_gates, W_hh, b_hh, h_0, c_0)
    check_recurrence(GATES[cell], *inputs, sequences, reset_h, reset_c, by_step, has_c=has_c)
    wanted = (*inputs, reset_h, reset_c)
    # Each level of nested transforms has an answer of its own to whether gradients are wanted: there, always.
    transforming = torch_func.transforming()
    # torch.jit.trace writes the answer down, for all calls of what it makes: it checks that under no_grad.
    asked = torch.is_grad_enabled() or torch.jit.is_tracing()
    save = transforming or (asked and any(t is not None and t.requires_grad for t in wanted))
    run = _Recurrence.apply if transforming else _recurrence
    rows, reset = sequences if sequences is not None else (None, None)
    x, W_ih, b_ih = source if source is not None else (None, None, None)
    y, h_n, c_n, _, c = run(
        *inputs, cell, save, backend, x, W_ih, b_ih, rows, reset, reset_h, reset_c, by_step, cell_states
    )
    found = (y, h_n, c_n if has_c else None)
    return (*found, c) if cell_states else found
