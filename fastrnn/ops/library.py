"""torch.library ops of the persistent recurrence: autograd, double backward, and what flop counters ask.

fastrnn::recurrence             forward over all of time
fastrnn::recurrence_backward    its gradients; theirs in turn by a slow path in torch (double_backward.py)

schema.py has their arguments, launch.py runs them.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..cells import CELLS
from ..planning.tiers import TIERS
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
    d_steps = d_steps if args.all_steps else None  # else they are what backward reads, nobody's result
    # Functions of the other arguments, by which double backward differentiates.
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
    args = args._replace(y=None, saved=None, steps=None)  # which the reference makes again
    ctx.tensors = tuple(name for name, value in args._asdict().items() if isinstance(value, Tensor))
    ctx.args = args._replace(**dict.fromkeys(ctx.tensors))
    ctx.save_for_backward(*(getattr(args, name) for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *second):
    args = ctx.args._replace(**dict(zip(ctx.tensors, ctx.saved_tensors, strict=True)))
    if args.x is None:
        raise NotImplementedError(
            "double backward through fastrnn.ops.recurrence without its source is missing: "
            "give source=(x, W_ih, b_ih), use fastrnn.lstm, gru, rnn or the modules, or fastrnn.reference.recurrence"
        )
    if args.clip_gradient >= 0:
        raise NotImplementedError(
            "second derivatives with clip_grad_state are missing: a gradient that was clipped is no function's gradient"
        )
    gradients = double_backward.differentiate(args, BackwardResults(*second))
    return NO_BACKWARD_GRADIENTS._replace(**gradients)


@register_flop_formula(torch.ops.fastrnn.recurrence)
def _flops(x_gates, W_hh, *args, out_shape=None, **kwargs) -> int:
    """Of W_hh h at every step, for torch.utils.flop_counter, which has shapes; of padded steps too."""
    return 2 * math.prod(x_gates) * W_hh[-1]


@register_flop_formula(torch.ops.fastrnn.recurrence_backward)
def _backward_flops(*args, out_shape=None, **kwargs):
    """Of the gradient of h at every step and, where it is wanted, of W_hh's."""
    given = BackwardArgs(*args, **kwargs)
    return 2 * math.prod(given.y) * given.W_hh[1] * (2 if given.needs_dW else 1)  # type: ignore[arg-type]


torch.library.register_autograd(_recurrence, _backward, setup_context=_save)
torch.library.register_autograd(_recurrence_backward, _double_backward, setup_context=_save_backward)
_Recurrence = torch_func.function(_recurrence, (Args, Results), _save, _backward)
_RecurrenceBackward = torch_func.function(
    _recurrence_backward, (BackwardArgs, BackwardResults), _save_backward, _double_backward
)


def observed(tensors: Iterable[Tensor]) -> bool:
    """Whether somebody wants to see operators: a compiler, a tracer, a mode, a transform, a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or torch_func.transforming()
        or not all([type(tensor) in PLAIN for tensor in tensors])
    )


PLAIN = (Tensor, torch.nn.Parameter)


def run(args: Args) -> Results:
    """The recurrence with its gradients, by the op; save is found out here."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError("ONNX has no form of fastrnn's kernels: export fastrnn.revert(model)")
    # Each level of nested transforms has an answer of its own to whether gradients are wanted: there, always.
    transforming = torch_func.transforming()
    # torch.jit.trace writes the answer down, for all calls of what it makes: it checks that under no_grad.
    asked = torch.is_grad_enabled() or torch.jit.is_tracing()
    wanted = (args.x_gates, args.W_hh, args.b_hh, args.state_0, args.starts)
    save = transforming or (asked and any(t is not None and t.requires_grad for t in wanted))
    args = args._replace(save=save)
    return Results(*(_Recurrence.apply if transforming else _recurrence)(*args))


def run_backward(args: BackwardArgs) -> BackwardResults:
    """Its gradients, which have gradients."""
    return BackwardResults(*(_RecurrenceBackward.apply if torch_func.transforming() else _recurrence_backward)(*args))


def by_direction(states: Tensor, heads: int) -> Tensor:
    """The op's (..., D*N, K) as (..., D, N*K); what a cell or call lacks stays as it is."""
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
    """Run one recurrent layer, D directions, over all of time in one persistent launch.

        rec = W_hh h + b_hh;   (h, c) = cell(x_gates[t], rec, (h, c));   y[t] = h

    cell: "lstm", "gru", "rnn_tanh" or "rnn_relu", with G = 4, 3, 1, 1 gates in torch's row order, "slstm", with i, f, z
    and o, or one of your own (fastrnn.cells.register). What is said of the LSTM's c holds for all cells that have one;
    the sLSTM's three, c, n and m, are one tensor, (3, D, B, H) where c is (D, B, H), and of all steps float32 at least.
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

    num_heads: N, of which each has a W_hh of its own and K = H / N units. x_gates is then (T, B, D*N, G, K), W_hh
    (D*N, G*K, K) and b_hh (D*N, G*K), the heads of direction 0 first; states and outputs are as without.

    Returns y (T, B, D, H), h_n (D, B, H), c_n (D, B, H) or None and, with cell_states (LSTM only), c (T, B, D, H), as
    rounded as y; differentiable with respect to every tensor, once without source and any number of times with it.
    The state is fp32 from step to step. Nothing is kept for backward where no gradient is wanted.

    Raises ValueError, with expected and got, for a wrong shape, dtype or device, and NotImplementedError where no
    kernel holds W_hh (fastrnn.plan says why) or the device has none, and fastrnn.LaunchRefusedError
    where the GPU refuses the launch.

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
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(map(repr, CELLS))}; got {cell!r}")
    if backend not in TIERS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, TIERS))}; got {backend!r}")
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
