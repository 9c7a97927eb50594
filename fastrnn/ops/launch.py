"""Allocate outputs and launch the kernels of both passes.

`forward` and `backward` run the two ops, whose states are one tensor. `launch_forward` and `launch_backward` serve them
and layer.py. These take one tensor for each state, h first. All tensors are contiguous, and of their shapes only the
order in memory matters.
"""

import torch
from torch import Tensor

from ..cells import CELLS
from ..kernels.arguments import Gradients, Inputs, Outputs, Saved, Sequences
from ..sequences import Slots
from .prepared import Prepared, prepare
from .schema import Args, BackwardArgs, BackwardResults, Results, contiguous
from .sums import Steps, bias_gradient, weight_gradient


def allocate_forward(args: Args) -> Results:
    """Allocate the outputs, without values. An output that this cell or call lacks has no elements."""
    cell, x_gates = CELLS[args.cell], args.x_gates
    *slots, R, _, K = x_gates.shape
    B = slots[1] if args.rows is None else args.rows.shape[1]
    saved, wide = cell.saved if args.save else 0, cell.state_dtype(x_gates.dtype)
    # How many states beside h are kept for all steps: all of them, or those that backward reads.
    others = len(cell.states) - 1 if args.all_steps else max(cell.kept_places) if args.save else 0
    # Kernels do not write frozen slots, and outputs are zero there.
    allocate = x_gates.new_zeros if args.rows is not None else x_gates.new_empty
    if args.state_0 is not None:
        finals = torch.empty_like(args.state_0, memory_format=torch.contiguous_format)
    else:
        finals = x_gates.new_empty(len(cell.states), R // args.heads, B, args.heads * K, dtype=wide)
    return Results(
        y=allocate(*slots, R, K),
        finals=finals,
        saved=x_gates.new_empty((*slots, R, saved, K) if saved else 0),
        steps=allocate((others, *slots, R, K) if others else 0, dtype=wide),
    )


def forward(args: Args) -> Results:
    """Run the persistent forward kernel of a tier."""
    args = contiguous(args)
    results = allocate_forward(args)
    launch_forward(
        prepare(args),
        Inputs(args.x_gates, args.W_hh, args.b_hh, _each(args.state_0)),
        Outputs(results.y, _each(_present(results.steps)), _present(results.saved), _each(results.finals)),
        Sequences(args.rows, args.reset, _each(args.starts), args.noise),
        args.by_step,
    )
    return results


def launch_forward(prepared: Prepared, inputs: Inputs, outputs: Outputs, sequences: Sequences, by_step: bool) -> None:
    """Launch the forward kernel."""
    if prepared.kernels is None:  # an empty batch needs no kernel
        return
    if inputs.b_hh is None and prepared.kernels.dialect == "tile Triton":
        # Without b_hh, LLVM aborts the process for the LSTM in full fp32 (an assertion in Triton 3.9.0's vectorizer).
        inputs = inputs._replace(b_hh=inputs.W_hh.new_zeros(inputs.W_hh.numel() // prepared.K))
    if sequences.reset is not None:
        sequences = sequences._replace(reset=_in_bytes(sequences.reset))
    prepared.kernels.launch("forward", prepared.T, prepared.ragged, by_step, (inputs, outputs, sequences))


def allocate_backward(args: BackwardArgs) -> BackwardResults:
    """Allocate the gradients, without values. A gradient that is not wanted has no elements."""
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

    Products and sums add in fp32 in a fixed order, so a run repeats bit by bit.
    """
    args = contiguous(args)
    prepared, y, starts = prepare(args), args.y, args.starts
    R, K = prepared.recurrences, prepared.K
    d_state_0 = None if args.state_0 is None else torch.empty_like(args.state_0)
    d_starts = None if starts is None else starts.new_zeros(len(starts), *prepared.slots, R, K)
    read = Saved(
        args.dy, _each(args.d_steps), _each(args.d_finals), args.W_hh, before=_each(args.state_0),
        kept=(y, *(_each(_present(args.steps)) or ())), tiles=_present(args.saved),
    )  # fmt: skip
    into = Gradients(*allocate_gates(prepared, y, args.rows), _each(d_state_0), _each(d_starts))
    sequences = Sequences(args.rows, args.reset, _each(starts), args.noise)
    h_0 = launch_backward(prepared, read, into, sequences, args.by_step)
    d_x_gates, d_last = into.d_x_gates, into.d_rec_last
    steps = Steps(prepared, y, h_0, sequences, args.by_step)
    dW_hh = weight_gradient(steps, d_x_gates, d_last).view(R, -1, K) if args.needs_dW else None
    db_hh = bias_gradient(d_x_gates, d_last, K).view(R, -1) if args.needs_db else None
    if d_starts is not None:
        by_step = d_starts.view(len(d_starts), *prepared.slots, prepared.D, prepared.N * K)
        d_starts = by_step if args.by_step else torch.stack([of_starts(prepared, args.rows, d) for d in d_starts])
    found = (d_x_gates.view(*y.shape[:-1], prepared.cell.gates, K), dW_hh, db_hh, d_state_0, d_starts)
    return BackwardResults(*(y.new_empty(0) if gradient is None else gradient for gradient in found))


def allocate_gates(
    prepared: Prepared, y: Tensor, rows: Tensor | None, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Allocate d_x_gates (slots, R*G*K) and, for a cell that splits its last gate, d_rec_last (slots, R*K).

    In such a cell the last gate's recurrent gradient differs from d_x_gates: for the GRU's n it is d_n * r. own:
    nobody outside the layer gets them.
    """
    units = prepared.recurrences * prepared.K
    new = prepared.keeps if own and prepared.keeps is not None else y.new_empty
    d_x_gates = new((prepared.count, prepared.cell.gates * units))
    # Freed before dx is allocated, which takes its place: memory that is kept for later calls would stand beside it.
    d_rec_last = y.new_empty(prepared.count, units) if prepared.cell.splits_last_gate else None
    if rows is not None:  # kernels write no frozen slot
        d_x_gates.zero_()
        if d_rec_last is not None:
            d_rec_last.zero_()
    return d_x_gates, d_rec_last


def launch_backward(
    prepared: Prepared, read: Saved, into: Gradients, sequences: Sequences, by_step: bool
) -> Tensor | None:
    """Launch the backward kernel. Return h_0 as the kernel saw it, or None for zeros.

    read.before, read.kept and sequences.starts have all states. The kernel gets only those that its cell keeps.
    """
    y, places, h_0 = read.kept[0], prepared.places, None
    before = None
    if read.before is not None:
        # Forward rounded the states inside a sequence when it kept them. Round the first states in the same way.
        h_0 = read.before[0].to(y.dtype)
        wide = prepared.cell.state_dtype(y.dtype)
        before = tuple([read.before[place].to(wide) if place else h_0 for place in places])
    if prepared.kernels is not None:
        if before is not None or len(places) < len(read.kept):
            kept = tuple([read.kept[place] for place in places])
            read = Saved(read.dy, read.d_steps, read.d_finals, read.W_hh, before, kept, read.tiles)
        rows, reset, starts, noise = sequences
        if reset is not None or starts is not None:
            starts = None if starts is None else tuple([starts[place] for place in places])
            sequences = Sequences(rows, _in_bytes(reset), starts, noise)
        prepared.kernels.launch("backward", prepared.T, prepared.ragged, by_step, (read, into, sequences))
    return h_0


def of_starts(prepared: Prepared, rows: Tensor | None, d_start: Tensor) -> Tensor:
    """Sum the gradients of every slot's restart, (*slots, R, K), to that of the state after resets, (D, B, N*K)."""
    if d_start.numel() == 0:
        return d_start.new_zeros(prepared.of_state)
    whole = d_start.view(*prepared.slots, prepared.D, prepared.N * prepared.K)
    summed = Slots.of(rows, torch.Size(prepared.slots), d_start.device).summed(whole)
    return summed.to(d_start.dtype).transpose(0, 1)


def _present(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _each(states: Tensor | None) -> tuple[Tensor, ...] | None:
    return None if states is None else states.unbind()


def _in_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
