"""One layer: the input's product and the recurrence, over all of time or chunk by chunk.

A Step runs a layer over some of time: from the inputs of its D directions and the state before, y and the state after.

    x_gates = W_ih x + b_ih;    y, state = recurrence(x_gates, W_hh, b_hh, state)

`in_chunks` walks time with a Step in chunks of K time steps, each from the state that the one before it left;
`recomputed` makes a Step that keeps only its inputs and runs again in backward. Together they need gates for K steps
and T/K states, instead of gates for T steps. Chunks are counted from each direction's own start: chunk j of direction
1 is times T - (j+1)K to T - jK.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from . import ops, reference
from .reference import GATES

State = tuple[Tensor, ...]  # (h,) or (h, c), each (D, B, H)
Inputs = tuple[Tensor, ...]  # x of each direction, (K, B, I): the same times over all of time, other times in a chunk
Step = Callable[[Inputs, State], tuple[Tensor, State]]
Weights = Callable[[], list[Tensor]]  # of one use of a layer: W_ih, W_hh, b_ih, b_hh of each direction in turn


def weights_of(params: Sequence[Tensor], dtype: torch.dtype, chunked: bool) -> Weights:
    """A layer's parameters in the dtype to compute in; gradients of many chunks are summed in fp32, or fp64."""
    rounded = [p.to(dtype) for p in params]
    if not chunked or dtype.itemsize > 2:
        return lambda: rounded
    sums = [p.float() for p in params]
    return lambda: [_Rounded.apply(s, r.detach()) for s, r in zip(sums, rounded, strict=True)]


class _Rounded(torch.autograd.Function):
    """The second tensor; its gradient goes to the first, in fp32, where autograd sums those of all uses."""

    @staticmethod
    def forward(ctx, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


def step_of(cell: str, backend: str, weights: Weights, bias: bool, training: bool) -> Step:
    """The Step of a layer by a backend: "torch", "reference" or a tier."""
    per_direction = 4 if bias else 2
    if backend == "torch":
        return functools.partial(_torch_step, cell, weights, per_direction, training)
    recurrence = _reference if backend == "reference" else functools.partial(ops.recurrence, backend=backend)
    return functools.partial(_step, cell, recurrence, weights, per_direction)


def _reference(*inputs, source) -> tuple[Tensor, Tensor, Tensor | None]:
    return reference.recurrence(*inputs)  # differentiable any number of times: needs no source


def _step(
    cell: str, recurrence: Callable, weights: Weights, per_direction: int, xs: Inputs, state: State
) -> tuple[Tensor, State]:
    params = weights()
    W_ih, W_hh, *b = (params[role::per_direction] for role in range(per_direction))
    b_ih, b_hh = b or (None, None)
    gates = (GATES[cell], W_hh[0].shape[-1])
    source = None
    if all(x is xs[0] for x in xs):  # one product for both directions
        source = xs[0], _stack(W_ih).flatten(0, 1), None if b_ih is None else _stack(b_ih).flatten()
        x_gates = linear(*source).unflatten(-1, (len(xs), *gates))
    else:
        biases = b_ih or [None] * len(xs)
        x_gates = torch.stack([linear(*of_one) for of_one in zip(xs, W_ih, biases, strict=True)], 2)
        x_gates = x_gates.unflatten(-1, gates)
    h_0, c_0 = (*state, None)[:2]
    b_hh = None if b_hh is None else _stack(b_hh)
    y, h_n, c_n = recurrence(cell, x_gates, _stack(W_hh), b_hh, h_0, c_0, source=source)
    return y, (h_n,) if c_n is None else (h_n, c_n)


def _torch_step(
    cell: str, weights: Weights, per_direction: int, training: bool, xs: Inputs, state: State
) -> tuple[Tensor, State]:
    """By torch's own kernel, each direction on its own: its bidirectional one walks the same times both ways."""
    params, outputs, finals = weights(), [], []
    for d, x in enumerate(xs):
        hidden = tuple(s[d : d + 1] for s in state)
        of_direction = params[d * per_direction : (d + 1) * per_direction]
        y, *final = getattr(torch._VF, cell)(
            x.flip(0) if d else x,
            hidden if len(hidden) == 2 else hidden[0],
            of_direction,
            per_direction == 4,
            1,
            0.0,
            training,
            False,
            False,
        )
        outputs.append(y.flip(0) if d else y)
        finals.append(final)
    return torch.stack(outputs, 2), tuple(torch.cat(states) for states in zip(*finals, strict=True))


def recomputed(step: Step) -> Step:
    """The step, keeping nothing for backward but its inputs: backward runs it again."""
    return functools.partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def split(x: Tensor, K: int, directions: int) -> list[Inputs]:
    """x (T, B, I) in chunks of K time steps, counted from each direction's own start; the last may be shorter."""
    T = x.shape[0]
    if K >= T:
        return [(x,) * directions]
    lengths = [min(K, T - start) for start in range(0, T, K)]
    # Of one split all gradients are joined at once; a slice's own gradient would be as long as x.
    ahead = x.split(lengths)
    if directions == 1:
        return [(chunk,) for chunk in ahead]
    return list(zip(ahead, reversed(x.split(lengths[::-1])), strict=True))


def join(ys: Sequence[Tensor]) -> Tensor:
    """y (T, B, D*H) of its chunks (K, B, D, H): the inverse of `split`."""
    if len(ys) == 1:
        return ys[0].flatten(2)
    by_direction = zip(*(y.unbind(2) for y in ys), strict=True)
    whole = [torch.cat(of_one[::-1] if d else of_one) for d, of_one in enumerate(by_direction)]
    return torch.cat(whole, -1) if len(whole) > 1 else whole[0]


def in_chunks(step: Step, x: Tensor, state: State, K: int) -> tuple[Tensor, State]:
    """Run a layer over x (T, B, I) in chunks of K time steps; y (T, B, D*H) and the final state."""
    ys = []
    for xs in split(x, K, state[0].shape[0]):
        y, state = step(xs, state)
        ys.append(y)
    return join(ys), state


def _stack(directions: Sequence[Tensor]) -> Tensor:
    """(D, ...) of D tensors; a view where there is one."""
    return directions[0].unsqueeze(0) if len(directions) == 1 else torch.stack(tuple(directions))
