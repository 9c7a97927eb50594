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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from .. import reference
from ..compat import profiling
from ..ops import library
from ..ops.schema import Args
from ..sequences import PLAIN, Sequences, Window
from ..stack import Stack
from ..torch_path import packed
from . import projection
from .options import Options


class State(NamedTuple):
    """Of one layer, between steps."""

    states: Tensor | None  # all of the cell's, (P, D, B, H), h first; None is zeros
    h_0: Tensor | None = None  # of a projected layer before its first step: projection.py


Inputs = tuple[Tensor, ...]  # x of each direction, (K, B, I): the same times over all of time, other times in a chunk
# y, the state after, and the states of every step beside h, (P - 1, K, B, D, H), where they are asked for. The state is
# a State, and for torch's kernels a tuple of tensors (D, B, H).
Step = Callable[[Inputs, Any, Window], tuple[Tensor, Any, Tensor | None]]
# x_gates, W_hh, b_hh, states, source and Window to y, finals and steps.
Recurrence = Callable[..., tuple[Tensor, Tensor, Tensor]]
# Of one use of a layer: W_ih, W_hh, b_ih and b_hh if there are biases, W_hr if projected, of each direction in turn.
Weights = Callable[[], list[Tensor]]


def weights_of(params: Sequence[Tensor], dtype: torch.dtype, chunked: bool) -> Weights:
    """A layer's parameters in the dtype to compute in; gradients of many chunks are summed in fp32, or fp64."""
    rounded = [p if p.dtype == dtype else p.to(dtype) for p in params]
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


def windows_of(stack: Stack, options: Options, T: int, B: int, dtype: torch.dtype) -> list[Window]:
    """What checked options say to each layer."""
    lengths, cu_seqlens, reset, reset_state, cell_states = options
    D, ragged = stack.directions, cu_seqlens is not None
    sequences = Sequences.of(T, B, lengths=lengths, cu_seqlens=cu_seqlens, reset=reset)
    by_step = reset_state is not None and reset_state[0].dim() == 4
    windows = []
    for layer in range(stack.num_layers):
        starts = []
        for state in reset_state or ():
            of_layer = state.narrow(-3, layer * D, D).to(dtype)
            of_layer = of_layer.expand(*of_layer.shape[:-2], 1 if by_step and ragged else B, -1)
            if by_step:  # (T, D, B, H) as (T, B, D, H), or (total, D, 1, H) as (total, D, H)
                of_layer = of_layer.squeeze(-2) if ragged else of_layer.transpose(1, 2)
            starts.append(of_layer)
        projected = None
        if len(starts) == 2 and starts[0].shape[-1] != starts[1].shape[-1]:
            projected, starts[0] = starts[0], torch.zeros_like(starts[1])
        all_steps = cell_states and layer == stack.num_layers - 1
        windows.append(Window(sequences, stacked(starts) if starts else None, by_step, projected, all_steps))
    return windows


def step_of(stack: Stack, backend: str, weights: Weights) -> Step:
    """The Step of a layer by a backend: "torch", "reference" or a tier."""
    if backend == "torch":
        return functools.partial(_torch_step, stack, weights)
    recurrence = _reference if backend == "reference" else functools.partial(_kernel, backend)
    return functools.partial(_step, stack, functools.partial(recurrence, stack), weights)


def by_role(params: Sequence[Tensor], directions: int) -> list[Sequence[Tensor]]:
    """W_ih, W_hh, b_ih, b_hh and W_hr of each direction, as far as a layer has them."""
    per_direction = len(params) // directions
    return [params[role::per_direction] for role in range(per_direction)]


@profiling.inside("recurrence")
def _reference(stack: Stack, x_gates, W_hh, b_hh, states, source, window: Window):
    # Differentiable any number of times: needs no source.
    clip_gradient, clip_state = stack.clips
    return reference.run(
        stack.cell, x_gates, W_hh, b_hh, states,
        sequences=window.sequences, starts=window.starts, by_step=window.by_step, heads=stack.num_heads,
        clip_gradient=clip_gradient, clip_state=clip_state,
    )  # fmt: skip


def _kernel(backend: str, stack: Stack, x_gates, W_hh, b_hh, states, source, window: Window):
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError("ONNX has no form of fastrnn's kernels: export fastrnn.revert(model)")
    rows, reset = window.sequences if window.sequences is not None else (None, None)
    x, W_ih, b_ih = source
    heads = stack.num_heads
    args = Args(
        x_gates, W_hh, b_hh, states, stack.cell, False, backend, x, W_ih, b_ih, rows, reset, window.starts,
        window.by_step, window.all_steps, heads, *stack.clips,
    )  # fmt: skip
    y, finals, _, steps = library.run(args)
    return library.by_direction(y, heads), finals, library.by_direction(steps, heads)


def _step(
    stack: Stack, recurrence: Recurrence, weights: Weights, xs: Inputs, state: State, window: Window = PLAIN
) -> tuple[Tensor, State, Tensor | None]:
    W_ih, W_hh, *b = by_role(weights(), len(xs))
    b = list(b)
    W_hr = b.pop() if len(b) in (1, 3) else None
    if W_hr is not None:
        xs, W_ih = projection.with_starts(xs, W_ih, W_hh, state.h_0, window)
    b_ih, b_hh = b if stack.bias else (None, None)
    if stack.num_heads > 1:  # x_gates then comes head by head from the product, in whose weights it costs least
        W_ih, W_hh = _by_head(stack, W_ih), _by_head(stack, W_hh)
        b_ih, b_hh = b_ih and _by_head(stack, b_ih), b_hh and _by_head(stack, b_hh)
    G, N = stack.of_cell.gates, stack.num_heads
    gates = (G, W_ih[0].shape[0] // G // N)
    source = (None, None, None)
    with profiling.named("input product"):
        if all(x is xs[0] for x in xs):  # one product for both directions
            source = xs[0], joined(W_ih), None if b_ih is None else joined(b_ih)
            x_gates = linear(*source).unflatten(-1, (len(xs) * N, *gates))
        else:
            biases = b_ih or [None] * len(xs)
            x_gates = torch.stack([linear(*of_one) for of_one in zip(xs, W_ih, biases, strict=True)], -2)
            x_gates = x_gates.flatten(-2).unflatten(-1, (len(xs) * N, *gates))
    W_hh, b_hh = _of_recurrences(W_hh, N), None if b_hh is None else _of_recurrences(b_hh, N)
    run = recurrence if W_hr is None else functools.partial(projection.run, recurrence, stacked(W_hr))
    y, finals, steps = run(x_gates, W_hh, b_hh, state.states, source, window)
    return y, State(finals), steps if window.all_steps else None


def _by_head(stack: Stack, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Weights or biases of each direction whose row g*H + n*K + k goes to n*G*K + g*K + k."""
    shape = (stack.of_cell.gates, stack.num_heads, -1)
    return [tensor.unflatten(0, shape).transpose(0, 1).flatten(0, 2) for tensor in tensors]


def _of_recurrences(tensors: Sequence[Tensor], heads: int) -> Tensor:
    """(D*N, ...) of D tensors (N*R, ...)."""
    return stacked(tensors) if heads == 1 else joined([tensor.unflatten(0, (heads, -1)) for tensor in tensors])


@profiling.inside("layer of torch's")
def _torch_step(
    stack: Stack, weights: Weights, xs: Inputs, state: tuple[Tensor, ...], window: Window = PLAIN
) -> tuple[Tensor, tuple[Tensor, ...], None]:
    """By torch's own kernel, each direction on its own: its bidirectional one walks the same times both ways."""
    params, outputs, finals = weights(), [], []
    per_direction = len(params) // len(xs)
    alone = Stack(stack.cell, bias=stack.bias, training=stack.training)
    for d, x in enumerate(xs):
        of_direction = packed.on_its_own(params[d * per_direction : (d + 1) * per_direction], stack.bias)
        before = tuple(s[d : d + 1] for s in state)
        y, *final = alone.torch_kernel(x.flip(0) if d else x, state=before, params=of_direction)
        outputs.append(y.flip(0) if d else y)
        finals.append(final)
    return torch.stack(outputs, 2), tuple(torch.cat(of_all) for of_all in zip(*finals, strict=True)), None


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
        return ys[0].flatten(-2)
    by_direction = zip(*(y.unbind(2) for y in ys), strict=True)
    whole = [torch.cat(of_one[::-1] if d else of_one) for d, of_one in enumerate(by_direction)]
    return torch.cat(whole, -1) if len(whole) > 1 else whole[0]


def in_chunks(
    step: Step, x: Tensor, state: Any, K: int, directions: int, window: Window = PLAIN
) -> tuple[Tensor, Any, list[Tensor]]:
    """Run a layer over x (T, B, I) in chunks of K time steps; y (T, B, D*H), the final state, and others like y.

    A window that is not plain is cut along time for layers of one direction only. Ragged x (total, I) is one chunk.
    """
    ys, cs = [], []
    for chunk, xs in enumerate(split(x, K, directions)):
        of_chunk = window if x.shape[0] <= K else window.of_times(chunk * K, xs[0].shape[0])
        y, state, steps = step(xs, state, of_chunk)
        ys.append(y)
        cs.append(steps)
    others = zip(*cs, strict=True) if window.all_steps else ()
    return join(ys), state, [join(of_state) for of_state in others]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(N, ...) of N tensors; a view where there is one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """(N*R, ...) of N tensors (R, ...); itself where there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))
