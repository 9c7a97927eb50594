"""The torch.library ops of the persistent recurrence, with autograd, double backward and formulas for flop counters.

    fastrnn::recurrence             forward over all of time
    fastrnn::recurrence_backward    its gradients; double_backward.py differentiates them again, slowly, in torch

schema.py has the ops' arguments, and launch.py runs them.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..cells import CELLS
from ..planning.tiers import KERNELS
from ..reference import beside_h, stacked
from ..sequences import Sequences
from . import double_backward, launch, torch_func
from .checks import check_recurrence
from .schema import Args, BackwardArgs, BackwardResults, Results, define

_recurrence = define("fastrnn::recurrence", Args, Results, lambda args: launch.forward(args), launch.allocate_forward)
_recurrence_backward = define(
    "fastrnn::recurrence_backward",
    BackwardArgs,
    BackwardResults,
    lambda args: launch.backward(args),
    launch.allocate_backward,
)


def _save(ctx, inputs, output):
    args, results = Args(*inputs), Results(*output)
    tensors = {name: value for name, value in args._asdict().items() if value is None or isinstance(value, Tensor)}
    del tensors["x_gates"]
    ctx.args = args._replace(x_gates=None, **dict.fromkeys(tensors))
    ctx.saved = tuple(tensors)
    ctx.save_for_backward(*tensors.values(), results.y, results.saved, results.steps)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_finals, d_saved, d_steps):
    args = ctx.args
    if not args.save:
        raise RuntimeError("fastrnn::recurrence ran with save=False: nothing was kept for backward")
    *tensors, y, saved, steps = ctx.saved_tensors
    args = args._replace(**dict(zip(ctx.saved, tensors, strict=True)))
    needs = Args(*ctx.needs_input_grad)
    d_steps = d_steps if args.all_steps else None  # without all_steps, steps are no result but only read by backward
    # These are functions of the other arguments. Double backward differentiates by those.
    y, saved, steps = y.detach(), saved.detach(), steps.detach()
    given = BackwardArgs(
        dy, d_finals, d_steps, args.W_hh, args.state_0, y, saved, steps, args.cell, bool(needs.W_hh), bool(needs.b_hh),
        args.backend, args.b_hh, args.x, args.W_ih, args.b_ih, args.rows, args.reset, args.starts, args.by_step,
        args.heads, args.clip_gradient, args.clip_state, args.zoneout, args.noise,
    )  # fmt: skip
    found = run_backward(given)
    return NO_GRADIENTS._replace(
        x_gates=found.d_x_gates,
        W_hh=found.dW_hh if needs.W_hh else None,
        b_hh=found.db_hh if needs.b_hh else None,
        state_0=None if args.state_0 is None else found.d_state_0,
        starts=None if args.starts is None else found.d_starts,
    )


NO_GRADIENTS = Args(*[None] * len(Args._fields))  # type: ignore[arg-type]
NO_BACKWARD_GRADIENTS = BackwardArgs(*[None] * len(BackwardArgs._fields))  # type: ignore[arg-type]


def _save_backward(ctx, inputs, output):
    args = BackwardArgs(*inputs)
    args = args._replace(y=None, saved=None, steps=None)  # the reference computes them again
    ctx.tensors = tuple(name for name, value in args._asdict().items() if isinstance(value, Tensor))
    ctx.args = args._replace(**dict.fromkeys(ctx.tensors))
    ctx.save_for_backward(*(getattr(args, name) for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *second):
    args = ctx.args._replace(**dict(zip(ctx.tensors, ctx.saved_tensors, strict=True)))
    if args.x is None:
        raise NotImplementedError(
            "double backward through fastrnn.ops.recurrence without its source is missing: "
            "give source=(x, W_ih, b_ih), or use fastrnn.lstm, gru, rnn, the modules or fastrnn.reference.recurrence"
        )
    if args.clip_gradient >= 0:
        raise NotImplementedError(
            "second derivatives with clip_grad_state are missing: a clipped gradient is not the gradient of a function"
        )
    gradients = double_backward.differentiate(args, BackwardResults(*second))
    return NO_BACKWARD_GRADIENTS._replace(**gradients)


@register_flop_formula(torch.ops.fastrnn.recurrence)
def _flops(x_gates, W_hh, *args, out_shape=None, **kwargs) -> int:
    """Operations of W_hh h at every time step, padded steps included. The flop counter passes shapes, not tensors."""
    return 2 * math.prod(x_gates) * W_hh[-1]


@register_flop_formula(torch.ops.fastrnn.recurrence_backward)
def _backward_flops(*args, out_shape=None, **kwargs):
    """Operations of the gradient of h at every time step, and of the gradient of W_hh if it is wanted."""
    given = BackwardArgs(*args, **kwargs)
    return 2 * math.prod(given.y) * given.W_hh[1] * (2 if given.needs_dW else 1)  # type: ignore[arg-type]


torch.library.register_autograd(_recurrence, _backward, setup_context=_save)
torch.library.register_autograd(_recurrence_backward, _double_backward, setup_context=_save_backward)
_Recurrence = torch_func.function(_recurrence, (Args, Results), _save, _backward)
_RecurrenceBackward = torch_func.function(
    _recurrence_backward, (BackwardArgs, BackwardResults), _save_backward, _double_backward
)


def observed(tensors: Iterable[Tensor]) -> bool:
    """Whether something must see single operators: a compiler, tracer, mode, transform or subclass of Tensor."""
    return watching() or not all([type(tensor) in PLAIN for tensor in tensors])


def watching() -> bool:
    """The same, whatever the tensors are."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or torch_func.transforming()
    )


PLAIN = (Tensor, torch.nn.Parameter)


def run(args: Args) -> Results:
    """Run the recurrence by its op, with gradients. args.save is set here."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError("ONNX has no operator for fastrnn's kernels: export fastrnn.revert(model)")
    # Each level of nested transforms may want gradients or not, so under transforms save always.
    transforming = torch_func.transforming()
    # torch.jit.trace records the answer for all later calls, and traces once more under no_grad to check itself.
    asked = torch.is_grad_enabled() or torch.jit.is_tracing()
    wanted = (args.x_gates, args.W_hh, args.b_hh, args.state_0, args.starts)
    save = transforming or (asked and any(t is not None and t.requires_grad for t in wanted))
    args = args._replace(save=save)
    return Results(*(_Recurrence.apply if transforming else _recurrence)(*args))


def run_backward(args: BackwardArgs) -> BackwardResults:
    """Run the backward pass by its op. Its results have gradients too."""
    return BackwardResults(*(_RecurrenceBackward.apply if torch_func.transforming() else _recurrence_backward)(*args))


def by_direction(states: Tensor, heads: int) -> Tensor:
    """The op's (..., D*N, K) as (..., D, N*K). An absent tensor, which has no elements, stays as it is."""
    return states.unflatten(-2, (-1, heads)).flatten(-2) if heads > 1 and states.dim() > 1 else states


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
    num_heads: int = 1,
) -> tuple[Any, ...]:
    """Run one recurrent layer of D directions over all of time, in one launch of a persistent kernel.

        rec = W_hh h + b_hh;   (h, c) = cell(x_gates[t], rec, (h, c));   y[t] = h

    This is the op below the modules: the caller computes the input's product x_gates = W_ih x + b_ih. Tensors have one
    device, one dtype (float32, bfloat16 or float16; for "cpu" float32 or float64) and any strides. Direction 1 walks
    time from its end. The kernel carries the state in fp32 from step to step.

    Args:
        cell (str): "lstm", "gru", "rnn_tanh" or "rnn_relu", with G = 4, 3, 1 and 1 gates in torch's row order. "slstm",
            with the gates i, f, z and o. Or the name of a cell that `fastrnn.cells.register` added.
        x_gates (Tensor): (T, B, D, G, H), or ragged (total, D, G, H).
        W_hh (Tensor): `(D, G*H, H)`.
        b_hh (Tensor | None): `(D, G*H)`.
        h_0 (Tensor): (D, B, H).
        c_0 (Tensor | None): (D, B, H) for the LSTM and for registered cells with a c. (3, D, B, H) for the sLSTM: c, n
            and m. None for other cells.
        backend (str): The tier: "resident", "cluster" or "cooperative"; on CPU tensors also "cpu".
        source (tuple | None): x (T, B, I), W_ih `(D*G*H, I)` and b_ih `(D*G*H,)` or None, which x_gates was made of.
            With it gradients are differentiable again: double backward runs the reference recurrence.
        sequences (Sequences | None): Made by `fastrnn.sequences.Sequences.of` from lengths, cu_seqlens or reset. Past
            the end of a sequence x_gates is not read, and y is zero.
        reset_h (Tensor | None): h after a reset, (D, B, H). None is zeros. With by_step one state a step, (T, B, D, H)
            or (total, D, H): the state of a segment's first step is used, in both directions.
        reset_c (Tensor | None): The state beside h after a reset, for cells that have one: shaped as reset_h, with a
            leading 3 for the sLSTM.
        by_step (bool): Whether reset_h and reset_c have one state a step.
        cell_states (bool): Whether to return the states beside h of all steps.
        num_heads (int): N heads of K = H / N units, each with its own W_hh. x_gates is then `(T, B, D*N, G, K)`, W_hh
            `(D*N, G*K, K)` and b_hh `(D*N, G*K)`. The heads of direction 0 come first. States and outputs keep their
            shapes.

    Returns:
        y (Tensor): h of all steps, (T, B, D, H), or ragged (total, D, H).
        h_n (Tensor): The final h, (D, B, H).
        c_n (Tensor | None): The final states beside h, shaped as c_0.
        c (Tensor): With cell_states only: (T, B, D, H), rounded as y is. For the sLSTM (3, T, B, D, H), float32 at
            least.

    Raises:
        ValueError: A shape, dtype or device is wrong. The message says what was expected and what was given.
        NotImplementedError: No kernel holds W_hh (`fastrnn.plan` says why), or the device has no kernel.
        LaunchRefusedError: The GPU refuses the launch.

    h_0, c_0, reset_h and reset_c may be float32 beside 16-bit x_gates. h_n, c_n and the gradients of the states are
    then float32 too, and a sequence that is run window by window gives the same bits as one run.

    Results are differentiable with respect to every tensor: once without source, any number of times with it. Nothing
    is kept for backward where no gradient is wanted.

    Source: the equations of torch.nn.LSTM, GRU and RNN. Diamos et al. 2016 introduced persistent recurrent kernels.

    Examples:
        >>> import torch, fastrnn
        >>> from fastrnn.ops import recurrence
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU with TRITON_INTERPRET=1
        >>> x_gates, W_hh, h_0 = torch.zeros(5, 2, 1, 3, 4), torch.zeros(1, 12, 4), torch.ones(1, 2, 4)
        >>> x_gates, W_hh, h_0 = (t.to(device) for t in (x_gates, W_hh, h_0))
        >>> y, h_n, _ = recurrence("gru", x_gates, W_hh, None, h_0, None)  # z is 1/2, n is 0: the state halves
        >>> h_n[0, 0, 0].item()
        0.03125
    """
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(map(repr, CELLS))}; got {cell!r}")
    if backend not in KERNELS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, KERNELS))}; got {backend!r}")
    states = len(CELLS[cell].states)
    if cell_states and states == 1:
        raise ValueError(f"cell_states: expected False for {cell!r}, which has no cell state; got True")
    given = {"W_hh": W_hh, "b_hh": b_hh, "h_0": h_0, "c_0": c_0, "reset_h": reset_h, "reset_c": reset_c}
    check_recurrence(CELLS[cell], x_gates, given, sequences, by_step, num_heads)
    state_0, starts = stacked(h_0, c_0), None if reset_h is None else stacked(reset_h, reset_c)
    x, W_ih, b_ih = source if source is not None else (None, None, None)
    rows, reset = sequences if sequences is not None else (None, None)
    found = run(
        Args(
            x_gates, W_hh, b_hh, state_0, cell, False, backend, x, W_ih, b_ih, rows, reset, starts, by_step,
            all_steps=cell_states, heads=num_heads,
        )
    )  # fmt: skip
    y, steps = by_direction(found.y, num_heads), by_direction(found.steps, num_heads)
    results = (y, found.finals[0], beside_h(found.finals))
    return (*results, beside_h(steps, 0)) if cell_states else results
