"""A layer as one node of autograd: the input's product, the recurrence, and all their gradients.

    x_gates = W_ih x + b_ih;    y, finals = recurrence(x_gates, W_hh, b_hh, states)

Layers run this way in eager mode. Each operator, view and node of the graph costs the CPU microseconds, and a short
call lasts only a few. Where something must see single operators (a compiler, exporter, mode or transform), and for
gradients of gradients, the product and the ops of library.py run instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..compat import profiling
from ..kernels.arguments import PLAIN_STEPS, Gradients, Inputs, Outputs, Saved, Sequences
from ..sequences import Window
from . import launch, library, prepared, sums
from .prepared import Prepared
from .schema import Args, BackwardArgs

# y (*slots, D*H), the final states (D, B, H) and, if they are asked for, the other states of all steps.
Found = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]


class Layer(NamedTuple):
    """What defines a layer, beside its tensors."""

    cell: str
    backend: str  # a tier
    directions: int
    heads: int = 1
    each_step: tuple[float, float, float] = PLAIN_STEPS  # kernels/arguments.py

    def prepare(self, slots: tuple[int, ...], B: int, K: int, like: Tensor) -> Prepared:
        """Prepare calls for slots (T, B) or (total,). like has the dtype and the device."""
        return prepared.of_sizes(
            self.cell, self.backend, slots, B, (self.directions, self.heads, K), like, self.each_step
        )


class Call(NamedTuple):
    """A call of a layer: its Prepared, and how many tensors of each kind it has."""

    layer: Layer
    prepared: Prepared
    by_step: bool
    all_steps: bool
    # How many tensors follow x: first states (0 for zeros), states after resets, and weights.
    states: int
    starts: int
    weights: int
    noise: Tensor | None  # zoneout in training (noise.py)

    def split(self, given: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Split a list into x, first states, states after resets, and weights by role; the list may be of gradients.

        A role has one weight, or with two directions a list.
        """
        D, first = self.layer.directions, 1 + self.states
        second = first + self.starts
        end = second + self.weights
        roles = given[second:end] if D == 1 else [given[i : i + D] for i in range(second, end, D)]
        return given[0], given[1:first] or None, given[first:second] or None, roles

    def needed(self, needs: Sequence[bool]) -> tuple[bool, Sequence[bool]]:
        """Whether x needs a gradient, and whether each role does."""
        need_x, _, _, roles = self.split(needs)
        return need_x, roles if self.layer.directions == 1 else [True in of_role for of_role in roles]


def run(
    layer: Layer,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    window: Window,
    ready: Prepared | None = None,
) -> Found:
    """Run a layer over x (T, B, I) or (total, I).

    weights: W_ih of each direction, W_hh of each and, with biases, b_ih of each and b_hh of each. With heads, each has
    its heads one after the other, and each head its gates. ready: the Prepared of a call that nothing observes.
    """
    states, starts = states or (), window.starts or ()
    tensors = (x, *states, *starts, *weights)
    rows, reset = window.sequences if window.sequences is not None else (None, None)
    if ready is None and not library.observed(tensors):
        B = x.shape[1] if x.dim() == 3 else rows.shape[1]  # type: ignore[union-attr]
        ready = layer.prepare(tuple(x.shape[:-1]), B, weights[layer.directions].shape[-1], x)
    if ready is None or (ready.bytes > LARGE and torch.is_grad_enabled()):
        D = layer.directions
        W_ih, W_hh, b_ih, b_hh = (*(weights[i : i + D] for i in range(0, len(weights), D)), None, None)[:4]
        source = x, joined(W_ih), joined(b_ih)
        return by_op(layer, linear(*source), source, (W_hh, b_hh), states or None, window)
    reset = None if reset is None else reset.contiguous()
    call = Call(layer, ready, window.by_step, window.all_steps, len(states), len(starts), len(weights), window.noise)
    outputs = outputs_of(call, tensors, rows, reset)
    count = 1 + len(ready.cell.states)
    return outputs[0], outputs[1:count], outputs[count:] or None


def plain(layer: Layer, ready: Prepared, roles: int) -> Call | None:
    """The Call of a layer without states, resets and lengths. None if it takes two nodes."""
    if ready.bytes > LARGE and torch.is_grad_enabled():
        return None
    return Call(layer, ready, False, False, 0, 0, roles * layer.directions, None)


def outputs_of(
    call: Call, tensors: Sequence[Tensor], rows: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run a Call that nothing observes. Return y, the final states and, if they are asked for, those of all steps."""
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return _Node.apply(call, rows, reset, *tensors)  # type: ignore[return-value]
    return _forward(call, rows, reset, tensors, save=False)[0]


# If x_gates has more bytes than this, a layer is two nodes in training. One node frees what forward saved only after it
# has all gradients, that of x too, so its peak memory is higher. Kernels of such sizes run so long that they hide what
# two nodes cost the CPU.
LARGE = 64 << 20


def by_op(layer: Layer, x_gates: Tensor, source: tuple, recurrent: tuple, states: Any, window: Window) -> Found:
    """Run the layer by the op. source: the x, W_ih and b_ih of x_gates. recurrent: W_hh and b_hh of each direction."""
    (W_hh, b_hh), (rows, reset) = recurrent, window.sequences if window.sequences is not None else (None, None)
    R, K = layer.directions * layer.heads, W_hh[0].shape[-1]
    (x, W_ih, b_ih), starts = source, stacked(window.starts)
    found = library.run(
        Args(
            x_gates.unflatten(-1, (R, -1, K)), joined(W_hh).view(R, -1, K),
            None if b_hh is None else joined(b_hh).view(R, -1), stacked(states), layer.cell, False, layer.backend,
            x, W_ih, b_ih, rows, reset, starts, window.by_step, window.all_steps, layer.heads,
            *layer.each_step, window.noise,
        )
    )  # fmt: skip
    finals = tuple(found.finals[n] for n in range(len(found.finals)))
    return found.y.flatten(-2), finals, tuple(found.steps.flatten(-2)) if window.all_steps else None


def _forward(
    call: Call, rows: Tensor | None, reset: Tensor | None, tensors: Sequence[Tensor], save: bool
) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[Tensor, ...]]:
    """Return the outputs, and what else backward needs: the saved tiles, and the other states of all steps."""
    ready, cell = call.prepared, call.prepared.cell
    x, states, starts, (W_ih, W_hh, *b) = call.split(tensors)
    b_ih, b_hh = (joined(b[0]), joined(b[1]).contiguous()) if b else (None, None)
    x_gates = _product(ready, x, joined(W_ih), b_ih)
    new, of_y = x_gates.new_empty, ready.of_y
    allocate = new if rows is None else x_gates.new_zeros  # kernels write no frozen slot
    states = contiguous(states)
    if states is None:
        finals = tuple([new(ready.of_state, **ready.wide) for _ in cell.states])
    else:
        finals = tuple([torch.empty_like(state) for state in states])
    y = allocate(of_y)
    saved = (ready.keeps or new)((cell.saved, *of_y)) if save and cell.saved else None
    others = ready.others if call.all_steps else ready.kept if save else 0
    steps = tuple([allocate(of_y, **ready.wide) for _ in range(others)]) if others else ()
    launch.launch_forward(
        ready,
        Inputs(x_gates.contiguous(), W_hh if ready.keeps else joined(W_hh).contiguous(), b_hh, states),
        Outputs(y, steps or None, saved, finals),
        Sequences(rows, reset, contiguous(starts), call.noise),
        call.by_step,
    )
    return (y, *finals, *steps) if call.all_steps else (y, *finals), saved, steps


@profiling.inside("input product", traced=False)
def _product(ready: Prepared, x: Tensor, W_ih: Tensor, b_ih: Tensor | None) -> Tensor:
    if ready.keeps is None:
        return linear(x, W_ih, b_ih)
    rows = x.flatten(0, -2)
    out = ready.keeps((rows.shape[0], W_ih.shape[0]))
    torch.mm(rows, W_ih.T, out=out) if b_ih is None else torch.addmm(b_ih, rows, W_ih.T, out=out)
    return out.view(*x.shape[:-1], -1)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, rows: Tensor | None, reset: Tensor | None, *tensors: Tensor) -> Any:
        outputs, saved, steps = _forward(call, rows, reset, tensors, save=True)
        ctx.call = call
        ctx.save_for_backward(*tensors, rows, reset, outputs[0], saved, *steps)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *d_others: Tensor | None) -> Any:
        # The ops' results have gradients themselves, and tools can see the ops.
        tensors = ctx.saved_tensors
        find = _by_op if torch.is_grad_enabled() or library.observed(tensors[:1]) else _by_launch
        return find(ctx.call, tensors, ctx.needs_input_grad, dy, d_others)


def _by_launch(
    call: Call, tensors: Sequence[Any], needs: Sequence[bool], dy: Tensor | None, d_others: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of the node; None where one is not needed."""
    ready, P = call.prepared, len(call.prepared.cell.states)
    x, states, starts, (W_ih, W_hh, *_) = call.split(tensors)
    rows, reset, y, saved, *steps = tensors[1 + call.states + call.starts + call.weights :]
    need_x, (need_W_ih, need_W_hh, *need_b) = call.needed(needs[3:])
    sequences = Sequences(rows, reset, contiguous(starts), call.noise)
    d_finals, d_steps = complete(d_others[:P]), complete(d_others[P:])
    dy, W = None if dy is None else dy.contiguous(), W_hh if ready.keeps else joined(W_hh).contiguous()
    read = Saved(dy, d_steps, d_finals, W, contiguous(states), (y, *steps), saved)
    d_gates, d_last = launch.allocate_gates(ready, y, rows, own=True)
    d_states = None if states is None else tuple([torch.empty_like(state) for state in read.before])
    d_starts = None
    if starts is not None:
        d_starts = tuple([start.new_zeros(*ready.slots, ready.recurrences, ready.K) for start in starts])
    into = Gradients(d_gates, d_last, d_states, d_starts)
    h_0 = launch.launch_backward(ready, read, into, sequences, call.by_step)
    if d_starts is not None and call.by_step:
        d_starts = tuple([d.view(start.shape) for d, start in zip(d_starts, starts or (), strict=True)])
    elif d_starts is not None:
        d_starts = tuple([launch.of_starts(ready, rows, d) for d in d_starts])
    dW_hh = db_ih = db_hh = None
    if need_W_hh:
        dW_hh = sums.weight_gradient(sums.Steps(ready, y, h_0, sequences, call.by_step), d_gates, d_last)
    if True in need_b:
        db_ih = d_gates.sum(0)
        db_hh = sums.bias_gradient(d_gates, d_last, ready.K, db_ih) if need_b[1] else None
    del into, d_last  # before dx is allocated
    dx, dW_ih = of_product(d_gates, x, W_ih, need_x, need_W_ih)
    return _in_order(call, (dx, d_states, d_starts, (dW_ih, dW_hh, db_ih, db_hh)))


def _by_op(
    call: Call, tensors: Sequence[Any], needs: Sequence[bool], dy: Tensor | None, d_others: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The same gradients by operators, which have gradients themselves."""
    layer, ready, P = call.layer, call.prepared, len(call.prepared.cell.states)
    x, states, starts, (W_ih, W_hh, *b) = call.split(tensors)
    rows, reset, *of_steps = tensors[1 + call.states + call.starts + call.weights :]
    # These are functions of the other tensors. Double backward differentiates by those.
    detached: list[Any] = [None if tensor is None else tensor.detach() for tensor in of_steps]
    y, saved, *steps = detached
    need_x, (need_W_ih, need_W_hh, *need_b) = call.needed(needs[3:])
    R, K = ready.recurrences, ready.K
    b_ih, b_hh = map(joined, b) if b else (None, None)
    of_step, none, d_steps = (*ready.slots, R, K), y.new_empty(0), complete(d_others[P:])
    found = library.run_backward(
        BackwardArgs(
            None if dy is None else dy.reshape(of_step),
            stacked(complete(d_others[:P])),
            None if d_steps is None else stacked([d.reshape(of_step) for d in d_steps]),
            joined(W_hh).view(R, -1, K),
            stacked(states),
            y.view(of_step),
            none if saved is None else saved.view(*ready.slots, R, ready.cell.saved, K),
            stacked([step.view(of_step) for step in steps]) if steps else none,
            *(layer.cell, need_W_hh, need_b[1:] == [True], layer.backend),
            *(None if b_hh is None else b_hh.view(R, -1), x, joined(W_ih), b_ih),
            *(rows, reset, stacked(starts), call.by_step, layer.heads, *layer.each_step, call.noise),
        )
    )
    d_gates = found.d_x_gates.view(ready.count, ready.cell.gates * R * K)
    db_ih = d_gates.sum(0) if need_b[:1] == [True] else None
    dx, dW_ih = of_product(d_gates, x, W_ih, need_x, need_W_ih)
    d_states = None if states is None else found.d_state_0.unbind()
    d_starts = None if starts is None else found.d_starts.unbind()
    dW_hh = found.dW_hh.view(-1, K) if need_W_hh else None
    db_hh = found.db_hh.flatten() if need_b[1:] == [True] else None
    return _in_order(call, (dx, d_states, d_starts, (dW_ih, dW_hh, db_ih, db_hh)))


def of_product(
    d_gates: Tensor, x: Tensor, W_ih: Any, need_x: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of all directions' W_ih, from the gradient of their product."""
    dx = torch.mm(d_gates, joined(W_ih)).view(x.shape) if need_x else None
    return dx, torch.mm(d_gates.t(), x.flatten(0, -2)) if need_W else None


def _in_order(call: Call, found: tuple) -> tuple[Tensor | None, ...]:
    """Put gradients into the order of the node's inputs: x, states, starts, then W_ih, W_hh, b_ih and b_hh.

    Each of the last four comes for all directions at once, one after the other. autograd drops those that nobody needs.
    """
    dx, d_states, d_starts, (*d_roles,) = found
    D = call.layer.directions
    if D > 1:
        d_roles = [d for d_role in d_roles for d in ([None] * D if d_role is None else d_role.chunk(D))]
    return None, None, None, dx, *(d_states or ()), *(d_starts or ()), *d_roles[: call.weights]


def complete(gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """Make all gradients contiguous, with zeros for None. None if all are None."""
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return None
    return tuple([torch.zeros_like(given[0]) if g is None else g.contiguous() for g in gradients])


def joined(tensors: Sequence[Tensor] | Tensor | None) -> Any:
    """Concatenate N tensors (R, ...) to (N*R, ...). One tensor is returned itself, in a list or not."""
    if tensors is None or isinstance(tensors, Tensor):
        return tensors
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def stacked(tensors: Sequence[Tensor] | None) -> Any:
    """Stack N tensors to (N, ...). One tensor is returned as a view."""
    return None if tensors is None else tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def contiguous(tensors: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if tensors is None else tuple([tensor.contiguous() for tensor in tensors])
