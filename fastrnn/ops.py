"""torch.library ops: schema, fake and autograd of the persistent recurrence. Kernels are launched by launch.py.

fastrnn::recurrence             forward over all of time
fastrnn::recurrence_backward    its gradients; theirs in turn by a slow path in torch (double_backward.py)
"""

import torch
from torch import Tensor

from . import double_backward, launch
from .reference import GATES
from .tiers import TIERS
from .validation import check_recurrence

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
) -> Outputs:
    # x, W_ih and b_ih, of which x_gates was made, are only passed on to double backward.
    x_gates, W_hh, h_0 = x_gates.contiguous(), W_hh.contiguous(), h_0.contiguous()
    return launch.forward(cell, x_gates, W_hh, _contiguous(b_hh), h_0, _contiguous(c_0), save, backend)


@_recurrence.register_fake
def _(x_gates, W_hh, b_hh, h_0, c_0, cell, save, backend, x=None, W_ih=None, b_ih=None):
    return launch.allocate_forward(cell, x_gates, h_0, c_0, save)


@torch.library.custom_op("fastrnn::recurrence_backward", mutates_args=())
def _recurrence_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
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
) -> Outputs:
    dy, dh_n, dc_n = _contiguous(dy), _contiguous(dh_n), _contiguous(dc_n)
    W_hh, h_0, c_0 = W_hh.contiguous(), h_0.contiguous(), _contiguous(c_0)
    return launch.backward(cell, dy, dh_n, dc_n, W_hh, h_0, c_0, y, saved, c, needs_dW, needs_db, backend)


@_recurrence_backward.register_fake
def _(
    dy,
    dh_n,
    dc_n,
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
):
    T, B, D, H = y.shape
    gates = W_hh.shape[1]
    return (
        y.new_empty(T, B, D, gates // H, H),
        y.new_empty((D, gates, H) if needs_dW else 0),
        y.new_empty((D, gates) if needs_db else 0),
        h_0.new_empty(D, B, H),
        y.new_empty(0) if c_0 is None else c_0.new_empty(D, B, H),
    )


def _save(ctx, inputs, output):
    _, W_hh, b_hh, h_0, c_0, ctx.cell, ctx.saved_for_backward, ctx.backend, *source = inputs
    y, _, _, saved, c = output
    ctx.save_for_backward(W_hh, h_0, c_0, y, saved, c, b_hh, *source)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh_n, dc_n, d_saved, d_c):
    if not ctx.saved_for_backward:
        raise RuntimeError("fastrnn::recurrence ran with save=False: nothing was kept for backward")
    W_hh, h_0, c_0, y, saved, c, *for_double_backward = ctx.saved_tensors
    needs_dW, needs_db = ctx.needs_input_grad[1:3]
    y, saved, c = (
        y.detach(),
        saved.detach(),
        c.detach(),
    )  # functions of the rest, by which double backward differentiates
    d_x_gates, dW_hh, db_hh, dh_0, dc_0 = _recurrence_backward(
        dy, dh_n, dc_n, W_hh, h_0, c_0, y, saved, c, ctx.cell, needs_dW, needs_db, ctx.backend, *for_double_backward
    )
    return (
        d_x_gates,
        dW_hh if needs_dW else None,
        db_hh if needs_db else None,
        dh_0,
        dc_0 if c_0 is not None else None,
        *[None] * 6,  # cell, save, backend, x, W_ih, b_ih: x_gates is what the gradient goes to
    )


def _save_backward(ctx, inputs, output):
    dy, dh_n, dc_n, W_hh, h_0, c_0, _, _, _, ctx.cell, _, _, _, b_hh, *source = inputs
    ctx.save_for_backward(dy, dh_n, dc_n, *source, W_hh, b_hh, h_0, c_0)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *second):
    upstream, source, recurrent = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
    if source[0] is None:
        raise NotImplementedError(
            "double backward through fastrnn.ops.recurrence without its source is missing: "
            "give source=(x, W_ih, b_ih), use fastrnn.lstm, gru, rnn or the modules, or fastrnn.reference.recurrence."
        )
    found = double_backward.differentiate(ctx.cell, upstream, source, recurrent, second)
    of_upstream, of_source, (dW_hh, db_hh, dh_0, dc_0) = found
    return (*of_upstream, dW_hh, dh_0, dc_0, *[None] * 7, db_hh, *of_source)


torch.library.register_autograd(_recurrence, _backward, setup_context=_save)
torch.library.register_autograd(_recurrence_backward, _double_backward, setup_context=_save_backward)


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one recurrent layer, D directions, over all of time in one persistent launch.

        rec = W_hh h + b_hh;   (h, c) = cell(x_gates[t], rec, (h, c));   y[t] = h

    cell: "lstm", "gru", "rnn_tanh" or "rnn_relu", with G = 4, 3, 1, 1 gates in torch's row order.
    x_gates (T, B, D, G, H): W_ih x_t + b_ih. W_hh (D, G*H, H). b_hh (D, G*H) or None. h_0, c_0 (D, B, H); c_0 is None
    but for the LSTM. All of one dtype (float32, bfloat16, float16) and device; any strides. Direction 1 walks time
    from its end. backend: the tier, "resident", "cluster" or "cooperative". source: x (T, B, I), W_ih (D*G*H, I) and
    b_ih (D*G*H,) or None, of which x_gates was made: it makes gradients differentiable, by the reference recurrence run
    again.

    h_0 and c_0 may be float32 beside a 16-bit x_gates: h_n, c_n and the gradients of states are then float32 too, and
    a sequence that is run window by window gives the bits of one run.

    Returns y (T, B, D, H), h_n (D, B, H) and c_n (D, B, H) or None, differentiable with respect to every tensor, once
    without source and any number of times with it.
    The state is fp32 from step to step. Nothing is kept for backward where no gradient is wanted.

    Raises ValueError, with expected and got, for a wrong shape, dtype or device, and NotImplementedError where no
    kernel holds W_hh (fastrnn.plan says why) or the device has none.

    Source: the equations of torch.nn.LSTM, GRU and RNN; the persistent form after Diamos et al. 2016.

    >>> import torch, fastrnn
    >>> from fastrnn.ops import recurrence
    >>> x_gates, W_hh, h_0 = torch.zeros(5, 2, 1, 3, 4), torch.zeros(1, 12, 4), torch.ones(1, 2, 4)
    >>> y, h_n, _ = recurrence("gru", x_gates, W_hh, None, h_0, None)  # z is 1/2, n is 0: the state halves
    >>> h_n[0, 0, 0].item()
    0.03125
    """
    if cell not in GATES:
        raise ValueError(f"cell: expected one of {', '.join(map(repr, GATES))}; got {cell!r}")
    if backend not in TIERS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, TIERS))}; got {backend!r}")
    inputs = (x_gates, W_hh, b_hh, h_0, c_0)
    check_recurrence(GATES[cell], *inputs, has_c=cell == "lstm")
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, h_n, c_n, _, _ = _recurrence(*inputs, cell, save, backend, *(source or ()))
    return y, h_n, c_n if c_0 is not None else None
