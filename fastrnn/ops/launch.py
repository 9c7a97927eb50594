"""Allocate outputs and launch the kernels of a plan; what is left to one product and one sum is here too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..compat import driver, interpreter, profiling, spills
from ..device import DeviceSpec
from ..kernels.arguments import NO_CLIP, Exchange, Gradients, Inputs, Outputs, Saved, Sequences, Sizes
from ..planning import planner
from ..planning.kernel_plan import KernelPlan, Request
from ..planning.planner import kernel_for
from ..sequences import Sequences as Segments
from ..sequences import Slots, states_before
from .schema import Args, BackwardArgs, BackwardResults, Results, contiguous


def allocate_forward(args: Args) -> Results:
    """Outputs, unwritten; one that this cell or call lacks has no elements."""
    cell, x_gates = CELLS[args.cell], args.x_gates
    *slots, R, _, K = x_gates.shape
    saved = cell.saved if args.save else 0
    kept = max(cell.kept_places) if args.save else 0  # backward reads no state beyond
    others = len(cell.states) - 1 if args.all_steps else kept
    wide = cell.state_dtype(x_gates.dtype)
    # Kernels write no frozen slot: outputs are zero there.
    allocate = x_gates.new_zeros if args.rows is not None else x_gates.new_empty
    if args.state_0 is not None:
        finals = torch.empty_like(args.state_0, memory_format=torch.contiguous_format)
    else:
        finals = x_gates.new_empty(len(cell.states), R // args.heads, _batch(args), args.heads * K, dtype=wide)
    return Results(
        y=allocate(*slots, R, K),
        finals=finals,
        saved=x_gates.new_empty((*slots, R, saved, K) if saved else 0),
        steps=allocate((others, *slots, R, K) if others else 0, dtype=wide),
    )


def forward(args: Args) -> Results:
    """Run the persistent forward kernel of a tier."""
    args = contiguous(args)
    results, B = allocate_forward(args), _batch(args)
    if B == 0:  # an empty batch needs no kernel
        return results
    y, x_gates = results.y, args.x_gates
    request = _request(args, y, B)
    kernel = kernel_for(request, args.backend)
    b_hh = args.b_hh
    if b_hh is None and kernel.dialect == "tile Triton":
        # Without b_hh, LLVM aborts the process at the LSTM in full fp32 (Triton 3.9.0, an assertion of its vectorizer).
        b_hh = y.new_zeros(x_gates.shape[-3], x_gates.shape[-2] * x_gates.shape[-1])
    steps = _present(results.steps)
    groups = (
        Inputs(x_gates, args.W_hh, b_hh, _each(args.state_0)),
        Outputs(y, _each(steps), _present(results.saved), _each(results.finals)),
        Sequences(args.rows, _bytes(args.reset), _each(args.starts)),
    )
    _launch("forward", args, y, request, kernel, groups)
    return results


def allocate_backward(args: BackwardArgs) -> BackwardResults:
    """Gradients, unwritten; one that is not wanted has no elements."""
    *slots, R, K = args.y.shape
    gates = args.W_hh.shape[1]

    def like(tensor: Tensor | None) -> Tensor:
        absent = tensor is None
        return args.y.new_empty(0) if absent else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return BackwardResults(
        d_x_gates=args.y.new_empty(*slots, R, gates // K, K),
        dW_hh=args.y.new_empty((R, gates, K) if args.needs_dW else 0),
        db_hh=args.y.new_empty((R, gates) if args.needs_db else 0),
        d_state_0=like(args.state_0),
        d_starts=like(args.starts),
    )


def backward(args: BackwardArgs) -> BackwardResults:
    """Run the persistent backward kernel of a tier, then dW_hh (R, G*K, K) as one product, db_hh (R, G*K) as one sum.

    Products and sums accumulate in fp32 in a fixed order, so that a run can be repeated bit by bit.
    """
    args = contiguous(args)
    cell, y = CELLS[args.cell], args.y
    *slots, R, K = y.shape
    D = R // args.heads
    B = _batch(args)
    allocate = y.new_zeros if args.rows is not None else y.new_empty
    d_x_gates = allocate(*slots, R, cell.gates, K)
    # The last gate's recurrent share, where its gradient differs from d_x_gates (the GRU's n: d_n * r).
    d_rec_last = allocate(*slots, R, 1, K) if cell.splits_last_gate else None
    d_state_0 = None if args.state_0 is None else torch.empty_like(args.state_0)
    # States inside a sequence were rounded when they were kept; those before it must be, to be what they are inside.
    kept_dtype = cell.state_dtype(y.dtype)
    if args.state_0 is None:
        state_0 = y.new_zeros(len(cell.states), D, B, args.heads * K, dtype=kept_dtype)
    else:
        state_0 = args.state_0.to(kept_dtype)
    d_starts = None if args.starts is None else args.starts.new_zeros(len(cell.states), *slots, R, K)
    if B > 0:
        places, starts = cell.kept_places, args.starts
        read = Saved(
            args.dy,
            _each(args.d_steps),
            _each(args.d_finals),
            args.W_hh,
            before=tuple(state_0[place] for place in places),
            kept=tuple(y if place == 0 else args.steps[place - 1] for place in places),
            tiles=_present(args.saved),
        )
        kept_starts = None if starts is None else tuple(starts[place] for place in places)
        sequences = Sequences(args.rows, _bytes(args.reset), kept_starts)
        gradients = Gradients(d_x_gates, d_rec_last, _each(d_state_0), _each(d_starts))
        request = _request(args, y, B)
        _launch("backward", args, y, request, kernel_for(request, args.backend), (read, gradients, sequences))
    d_rec = [d_x_gates] if d_rec_last is None else [d_x_gates[..., :-1, :], d_rec_last]
    dW_hh, db_hh = y.new_empty(0), y.new_empty(0)
    if args.needs_dW:
        gradients = [_weight_gradient(args, r, d_rec, state_0[0].to(y.dtype)) for r in range(R)]
        dW_hh = gradients[0].unsqueeze(0) if R == 1 else torch.stack(gradients)
    if args.needs_db:
        sums = [d.flatten(0, -4).sum(0).flatten(1) for d in d_rec]
        db_hh = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
    return BackwardResults(
        d_x_gates,
        dW_hh,
        db_hh,
        y.new_empty(0) if d_state_0 is None else d_state_0,
        y.new_empty(0) if d_starts is None else _of_starts(args, d_starts),
    )


def _of_starts(args: BackwardArgs, d_starts: Tensor) -> Tensor:
    """The gradient of starts from that of every slot, (P, *slots, R, K)."""
    whole = d_starts.unflatten(-2, (-1, args.heads)).flatten(-2)
    if args.by_step or whole.numel() == 0:
        return whole if args.by_step else torch.zeros_like(args.starts)  # type: ignore[arg-type]
    slots = Slots.of(args.rows, args.y.shape[:-2])  # type: ignore[arg-type]
    return torch.stack([slots.summed(d).to(d.dtype).transpose(0, 1) for d in whole])


@profiling.inside("weight gradients")
def _weight_gradient(args: BackwardArgs, r: int, d_rec: list[Tensor], h_0: Tensor) -> Tensor:
    """dW_hh[r] (G*K, K) = sum over slots of d_rec[slot, r] (x) h_prev[slot, r]; d_rec by parts of the gates.

    h_prev is y one step before, h_0 (D, B, N*K) at the start. Plain sequences need no copy of it: the start is a
    product of its own, and y only shifted.
    """
    d, head, K = r // args.heads, r % args.heads, args.y.shape[-1]
    own = slice(head * K, (head + 1) * K)
    gradients, y, h_0 = [], args.y.select(-2, r), h_0[d, :, own]
    limit = args.clip_state if len(CELLS[args.cell].states) == 1 else NO_CLIP  # else h is not clipped, c is
    if limit >= 0:
        y, h_0 = y.clamp(-limit, limit), h_0.clamp(-limit, limit)
    if args.rows is not None:
        start = None
        if args.starts is not None:
            h_start = args.starts[0].to(y.dtype)
            h_start = h_start.clamp(-limit, limit) if limit >= 0 else h_start
            start = h_start[..., d, own] if args.by_step else h_start[d, :, own]
        segments = Segments(args.rows, args.reset)
        h_prev = states_before(d, y, h_0, segments, start, args.by_step).flatten(0, -2)
    for part in d_rec:
        d_gates = part.select(-3, r).flatten(-2)  # (T, B, G*K) or (total, G*K), a view
        if args.rows is not None:
            gradients.append(d_gates.flatten(0, -2).T @ h_prev)
            continue
        first, rest, shifted = (d_gates[0], d_gates[1:], y[:-1]) if d == 0 else (d_gates[-1], d_gates[:-1], y[1:])
        rest, shifted = rest.flatten(0, 1).T, shifted.flatten(0, 1)
        gradients.append(rest @ shifted if args.state_0 is None else torch.addmm(first.T @ h_0, rest, shifted))
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _batch(args: Args | BackwardArgs) -> int:
    if args.rows is not None:
        return args.rows.shape[1]
    return (args.x_gates if isinstance(args, Args) else args.y).shape[1]


def _present(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _each(states: Tensor | None) -> tuple[Tensor, ...] | None:
    """A pointer each: of one, the tensor itself, which begins where it does."""
    return None if states is None else (states,) if len(states) == 1 else states.unbind()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _request(args: Args | BackwardArgs, y: Tensor, B: int) -> Request:
    R, K = y.shape[-2:]
    spec = DeviceSpec.of(y.device)
    precision = planner.torch_precision()
    sizes = (K, B, R // args.heads, args.heads)
    return Request(args.cell, *sizes, y.dtype, precision, spec, args.clip_gradient, args.clip_state)


@profiling.inside("recurrence")
def _launch(
    which: str, args: Args | BackwardArgs, y: Tensor, request: Request, kernel: KernelPlan, groups: tuple
) -> None:
    """Launch the kernel of a pass for y (*slots, R, K), with groups of pointers as in kernels/arguments.py."""
    # Of ragged sequences, which the table bounds, a mean.
    T = max(1, y.shape[0] if y.dim() == 4 else y.shape[0] // request.B)
    if args.backend == "cooperative":
        groups = (*groups, _exchange(which, y, request, kernel))
    if interpreter.ENABLED:
        function, constants, as_launched = _function(which, args, y, request, kernel)
        form = as_launched(kernel.choices[which][0])["FORM"]
        _interpret(function, kernel, (*groups, T, request.B, *constants, form))
        return
    from ..compat import launcher

    # Triton launches on the tensors' GPU; nothing is done for CPU tensors.
    with torch.cuda.device_of(y):
        key = (which, args.backend, args.by_step, request, y.dim(), y.device, _pointers(groups))
        ready = _ready.get(key)
        try:
            if ready and ready.is_of(kernel, request.of_cell) and launcher.usable(ready.launcher):
                ready.launcher.launch(kernel.grid, (*groups, T, request.B, *ready.constants))
                return
            function, constants, as_launched = _function(which, args, y, request, kernel)
            arguments = (*groups, T, request.B, *constants)
            options: dict[str, Any] = {"num_warps": kernel.warps, "num_ctas": kernel.ctas, "enable_fp_fusion": True}
            if args.backend == "cooperative":
                # The driver refuses a grid whose programs cannot all be resident, instead of leaving it to hang.
                options["launch_cooperative_grid"] = True
            options |= spills.first_without_spills(
                function, request.spec, kernel.choices[which], arguments, kernel.grid, options, as_launched
            )
            compiled = function[kernel.grid](*arguments, **options)
        except Exception as error:
            driver.refuse(error, args.backend, args.cell, request.H, y.dtype, kernel, request.spec)
            raise
        _ready[key] = _Ready(launcher.ready(compiled), (*constants, options["FORM"]), kernel, request.of_cell)


def _pointers(groups: tuple) -> tuple:
    """What Triton compiles pointers for: dtypes, and which are multiples of 16; None where there is none."""
    found: list[Any] = []
    for group in groups:
        for member in group:
            if isinstance(member, tuple):
                found.append(tuple([(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in member]))
            else:
                found.append(None if member is None else (member.dtype, member.data_ptr() % 16 == 0))
    return tuple(found)


class _Ready(NamedTuple):
    """A kernel that was launched, and what it was compiled for beside the arguments."""

    launcher: Any
    constants: tuple
    kernel: KernelPlan
    cell: Cell

    def is_of(self, kernel: KernelPlan, cell: Cell) -> bool:
        """Tuning may have changed the one, and a test registered the other anew."""
        return self.cell is cell and (self.kernel is kernel or self.kernel == kernel)


_ready: dict[tuple, _Ready] = {}


def _function(
    which: str, args: Args | BackwardArgs, y: Tensor, request: Request, kernel: KernelPlan
) -> tuple[Any, tuple, Callable[[dict], dict]]:
    """The kernel of a pass, its constants but the Form, and what makes this and options of the launch of a choice."""
    if kernel.dialect == "Gluon":  # imported only here: Triton before 3.6 lacks what it needs
        from ..kernels.gluon import cooperative, resident
    else:
        from ..kernels.tile import cooperative, resident
    module, cell = cooperative if args.backend == "cooperative" else resident, request.of_cell
    sizes = Sizes(
        cell.gates, len(cell.states), len(cell.kept), cell.saved, request.D, request.N, request.H,
        args.rows is not None, args.by_step, y.dim() == 3, kernel.activations, kernel.precision,
        request.clip_gradient, request.clip_state,
    )  # fmt: skip

    def as_launched(choice: dict[str, Any]) -> dict[str, Any]:
        form = {name: value for name, value in choice.items() if name.isupper()}
        options = {name: value for name, value in choice.items() if not name.isupper()}
        return {"FORM": module.Form(**kernel.form, **form), **options}

    return getattr(module, which), (cell.kernel(which), sizes), as_launched


def _interpret(function: Any, kernel: KernelPlan, arguments: tuple) -> None:
    with interpreter.corrected():
        if len(kernel.grid) < 3:
            function[kernel.grid](*arguments)
        else:
            from ..compat import concurrent_interpreter

            concurrent_interpreter.launch(function, kernel.grid, *arguments)


def _exchange(which: str, y: Tensor, request: Request, kernel: KernelPlan) -> Exchange:
    """Where programs hand on h, of even and of odd steps, and the grid barrier's counters, zero at every launch."""
    from ..kernels.barrier import COUNTER_STRIDE

    _, batch_tiles, recurrences = kernel.grid
    counters = torch.zeros(batch_tiles * recurrences, COUNTER_STRIDE.value, dtype=torch.int64, device=y.device)
    return Exchange(y.new_empty(2, recurrences, request.B, request.H) if which == "forward" else None, counters)
