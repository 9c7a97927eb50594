"""One layer: the input's product and the recurrence, over all of time or chunk by chunk.

A Step runs a layer over some time steps. It takes the inputs of the layer's D directions and the state before, and
returns y and the state after.

    x_gates = W_ih x + b_ih;    y, state = recurrence(x_gates, W_hh, b_hh, state)

`in_chunks` runs a Step over chunks of K time steps, each from the state that the chunk before left. `recomputed` makes
a Step that keeps only its inputs and runs again in backward. Both together need gates for K steps and T/K states,
instead of gates for T steps. Each direction counts chunks from its own start: chunk j of direction 1 is the times T -
(j+1)K to T - jK.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from .. import reference
from ..compat import profiling
from ..ops import layer
from ..ops.layer import Layer, joined, stacked
from ..sequences import PLAIN, Sequences, Window
from ..stack import Stack
from ..torch_path import packed
from . import projection


class State(NamedTuple):
    """The state of one layer between two steps."""

    states: tuple[Tensor, ...] | None  # all states of the cell, each (D, B, H), h first; None is zeros
    h_0: Tensor | None = None  # in a projected layer, h before the first step (projection.py)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*(self.states or ()), *(() if self.h_0 is None else (self.h_0,)))


Inputs = tuple[Tensor, ...]  # x (K, B, I) of each direction: in a chunk the directions read different times
# Returns y (K, B, D*H), the state after, and the other states of all steps, each shaped as y, if they are asked for.
# The state is a State; for torch's kernels it is a tuple of tensors (D, B, H).
Step = Callable[[Inputs, Any, Window], tuple[Tensor, Any, tuple[Tensor, ...] | None]]
# Returns a layer's parameters for one use, direction by direction: W_ih, W_hh, with biases b_ih and b_hh, W_hr last.
Weights = Callable[[], list[Tensor]]


def weights_of(params: Sequence[Tensor], dtype: torch.dtype, chunked: bool) -> Weights:
    """A layer's parameters in the dtype to compute in. Gradients of many chunks are summed in fp32, or in fp64."""
    rounded = [p if p.dtype == dtype else p.to(dtype) for p in params]
    if not chunked or dtype.itemsize > 2:
        return lambda: rounded
    sums = [p.float() for p in params]
    return lambda: [_Rounded.apply(s, r.detach()) for s, r in zip(sums, rounded, strict=True)]


class _Rounded(torch.autograd.Function):
    """Return the second tensor, and send its gradient to the first in fp32. Autograd then sums there over all uses."""

    @staticmethod
    def forward(ctx, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


def windows_of(call: Any, dtype: torch.dtype) -> list[Window]:
    """Make each layer's Window from the options of a checked call."""
    stack, (lengths, cu_seqlens, reset, reset_state, cell_states) = call.stack, call.options
    T, B, D, ragged = call.route.T, call.route.B, stack.directions, cu_seqlens is not None
    if call.rows is not None:
        sequences: Sequences | None = Sequences(call.rows, reset)
    else:
        sequences = Sequences.of(T, B, lengths=lengths, cu_seqlens=cu_seqlens, reset=reset)
    if reset_state is None:
        windows = [Window(sequences)] * stack.num_layers
    else:
        by_step, windows = reset_state[0].dim() == 4, []
        for n in range(stack.num_layers):
            starts = [_of_layer(state, n, (D, B), dtype, by_step, ragged) for state in reset_state]
            projected = None
            if len(starts) == 2 and starts[0].shape[-1] != starts[1].shape[-1]:
                projected, starts[0] = starts[0], torch.zeros_like(starts[1])
            windows.append(Window(sequences, tuple(starts), by_step, projected))
    if cell_states:
        windows[-1] = windows[-1]._replace(all_steps=True)
    return windows


def _of_layer(state: Tensor, n: int, sizes: tuple[int, int], dtype: torch.dtype, by_step: bool, ragged: bool) -> Tensor:
    """Layer n's part of a reset_state, in the form of Window.starts."""
    D, B = sizes
    own = state.narrow(-3, n * D, D).to(dtype)
    own = own.expand(*own.shape[:-2], 1 if by_step and ragged else B, -1)
    if not by_step:
        return own
    # (T, D, B, H) as (T, B, D, H), or (total, D, 1, H) as (total, D, H)
    return own.squeeze(-2) if ragged else own.transpose(1, 2)


def step_of(stack: Stack, backend: str, weights: Weights) -> Step:
    """Make the Step of a layer for a backend: "torch", "reference" or a tier."""
    if backend == "torch":
        return functools.partial(_torch_step, stack, weights)
    return functools.partial(_step, stack, backend, weights)


def by_role(params: Sequence[Tensor], directions: int) -> list[Sequence[Tensor]]:
    """Group a layer's parameters: W_ih of each direction, W_hh of each, and b_ih, b_hh and W_hr if there are any."""
    per_direction = len(params) // directions
    return [params[role::per_direction] for role in range(per_direction)]


def _step(
    stack: Stack, backend: str, weights: Weights, xs: Inputs, state: State, window: Window = PLAIN
) -> tuple[Tensor, State, tuple[Tensor, ...] | None]:
    W_ih, W_hh, *b = by_role(weights(), len(xs))
    b = list(b)  # a tuple where torch 2.11 compiles
    W_hr = stacked(b.pop()) if len(b) in (1, 3) else None
    if W_hr is not None:
        xs, W_ih = projection.with_starts(xs, W_ih, W_hh, state.h_0, window)
        W_hh = projection.combined(stacked(W_hh), W_hr).unbind()
    of_layer = layer_of(stack, backend)
    if stack.num_heads > 1:
        W_ih, W_hh, *b = (by_head(stack, role) for role in (W_ih, W_hh, *b))
    if backend != "reference" and all(x is xs[0] for x in xs):
        y, finals, steps = layer.run(
            of_layer, xs[0], [W for role in (W_ih, W_hh, *b) for W in role], state.states, window
        )
    else:
        b_ih, b_hh = b or (None, None)
        with profiling.named("input product"):
            source, x_gates = _product(xs, W_ih, b_ih)
        run = by_reference if backend == "reference" else layer.by_op
        y, finals, steps = run(of_layer, x_gates, source, (W_hh, b_hh), state.states, window)
    if W_hr is not None:
        y = projection.projected(y, W_hr, window)
    return y, State(finals), steps


def layer_of(stack: Stack, backend: str) -> Layer:
    """The record that the ops take of a stack's layers."""
    return Layer(stack.cell, backend, stack.directions, stack.num_heads, stack.each_step)


def by_head(stack: Stack, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Reorder the rows of weights or biases: row g*H + n*K + k moves to n*G*K + g*K + k, in each direction.

    x_gates then leaves its product head by head, as the kernels read it. Reordering costs least in the weights.
    """
    shape = (stack.of_cell.gates, stack.num_heads, -1)
    return [tensor.unflatten(0, shape).transpose(0, 1).flatten(0, 2) for tensor in tensors]


def _product(xs: Inputs, W_ih: Sequence[Tensor], b_ih: Sequence[Tensor] | None) -> tuple[tuple, Tensor]:
    """x_gates (K, B, D*G*H), and the x, W_ih and b_ih of its product if one product made it."""
    if all(x is xs[0] for x in xs):
        source = xs[0], joined(W_ih), joined(b_ih)
        return source, linear(*source)
    biases = b_ih or [None] * len(xs)
    gates = [linear(x, W, b) for x, W, b in zip(xs, W_ih, biases, strict=True)]
    return (None, None, None), torch.cat(gates, -1)


@profiling.inside("recurrence")
def by_reference(of_layer: Layer, x_gates: Tensor, source: tuple, recurrent: tuple, states: Any, window: Window) -> Any:
    # The reference is differentiable any number of times, so it does not need the source.
    (W_hh, b_hh), K = recurrent, recurrent[0][0].shape[-1]
    R = of_layer.directions * of_layer.heads
    y, finals, steps = reference.run(
        of_layer.cell, x_gates.unflatten(-1, (R, -1, K)), joined(W_hh).view(R, -1, K),
        None if b_hh is None else joined(b_hh).view(R, -1), stacked(states),
        sequences=window.sequences, starts=stacked(window.starts), by_step=window.by_step, heads=of_layer.heads,
        clip_gradient=of_layer.each_step[0], clip_state=of_layer.each_step[1], zoneout=of_layer.each_step[2],
        noise=window.noise,
    )  # fmt: skip
    return y.flatten(-2), finals.unbind(), tuple(steps.flatten(-2)) if window.all_steps else None


@profiling.inside("layer of torch's")
def _torch_step(
    stack: Stack, weights: Weights, xs: Inputs, state: tuple[Tensor, ...], window: Window = PLAIN
) -> tuple[Tensor, tuple[Tensor, ...], None]:
    """Run torch's own kernel, once for each direction: its bidirectional kernel gives both the same times."""
    params, outputs, finals = weights(), [], []
    per_direction = len(params) // len(xs)
    alone = Stack(stack.cell, bias=stack.bias, training=stack.training)
    for d, x in enumerate(xs):
        of_direction = packed.on_its_own(params[d * per_direction : (d + 1) * per_direction], stack.bias)
        before = tuple(s[d : d + 1] for s in state)
        y, *final = alone.torch_kernel(x.flip(0) if d else x, state=before, params=of_direction)
        outputs.append(y.flip(0) if d else y)
        finals.append(final)
    return torch.cat(outputs, -1), tuple(torch.cat(of_all) for of_all in zip(*finals, strict=True)), None


def recomputed(step: Step) -> Step:
    """The same step, but it keeps only its inputs for backward, and backward runs it again."""
    return functools.partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def split(x: Tensor, K: int, directions: int) -> list[Inputs]:
    """Cut x (T, B, I) into chunks of K time steps, counted from each direction's own start. The last may be shorter."""
    T = x.shape[0]
    if K >= T:
        return [(x,) * directions]
    lengths = [min(K, T - start) for start in range(0, T, K)]
    # One split joins all its gradients at once. A slice's gradient would be as long as x.
    ahead = x.split(lengths)
    if directions == 1:
        return [(chunk,) for chunk in ahead]
    return list(zip(ahead, reversed(x.split(lengths[::-1])), strict=True))


def join(ys: Sequence[Tensor], directions: int) -> Tensor:
    """Make y (T, B, D*H) from its chunks (K, B, D*H). This is the inverse of `split`."""
    if len(ys) == 1:
        return ys[0]
    by_direction = zip(*(y.chunk(directions, -1) for y in ys), strict=True)
    whole = [torch.cat(of_one[::-1] if d else of_one) for d, of_one in enumerate(by_direction)]
    return torch.cat(whole, -1) if len(whole) > 1 else whole[0]


def in_chunks(
    step: Step, x: Tensor, state: Any, K: int, directions: int, window: Window = PLAIN
) -> tuple[Tensor, Any, list[Tensor]]:
    """Run a layer over x (T, B, I) in chunks of K time steps. Return y (T, B, D*H), the final and other states.

    A Window that is not plain can be cut along time in layers of one direction only. Ragged x (total, I) is one chunk.
    """
    ys, cs = [], []
    for chunk, xs in enumerate(split(x, K, directions)):
        of_chunk = window if x.shape[0] <= K else window.of_times(chunk * K, xs[0].shape[0])
        y, state, steps = step(xs, state, of_chunk)
        ys.append(y)
        cs.append(steps)
    others = zip(*cs, strict=True) if window.all_steps else ()
    return join(ys, directions), state, [join(of_state, directions) for of_state in others]
