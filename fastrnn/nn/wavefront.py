"""Stacked layers as a wavefront: layer l runs chunk k of time while layer l + 1 runs chunk k - 1.

    time     0       1       2       3
    layer 0  chunk 0 chunk 1 chunk 2
    layer 1          chunk 0 chunk 1 chunk 2

Each layer has its own CUDA stream, which keeps its chunks in order. (layer, chunk) waits for one event besides: the end
of (layer - 1, chunk). Kernels are those of any other run. Backward is a wavefront too, from the other end: autograd
runs the gradient of each chunk on the stream of its forward pass.

Source: Appleyard et al. 2016 (arXiv:1604.01946), section 3.3.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sequences import PLAIN
from .layers import State, Step


def order(layers: int, chunks: int) -> Iterator[tuple[int, int]]:
    """Yield (layer, chunk) in the order to issue them: by diagonals, whose members do not depend on each other.

    >>> from fastrnn.nn.wavefront import order
    >>> list(order(2, 3))
    [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2)]
    """
    for diagonal in range(layers + chunks - 1):
        for layer in range(max(0, diagonal - chunks + 1), min(layers, diagonal + 1)):
            yield layer, diagonal - layer


def run(
    steps: Sequence[Step],
    xs: Sequence[Tensor],
    states: Sequence[State],
    reads: Sequence[Sequence[Tensor]] = (),
    streams: Sequence[torch.cuda.Stream] = (),
) -> tuple[list[Tensor], list[State]]:
    """Run layers of one direction over the chunks xs, each (K, B, I). Return the last layer's ys and final states.

    streams has one stream for each layer, or none: then everything runs on the caller's stream, in the same order.
    reads lists the tensors that each layer's step reads beside input and state. The caller's stream may use the
    results.
    """
    waiting, finals = [deque(xs), *(deque[Tensor]() for _ in steps)], list(states)
    finished: dict[tuple[int, int], Any] = {}  # event by (layer, chunk)
    caller = torch.cuda.current_stream(xs[0].device) if streams else None
    for stream, *used in zip(streams, reads, strict=bool(streams)):
        stream.wait_stream(caller)  # type: ignore[arg-type] - weights, states and xs were made there
        _record(stream, *used[0])
    for layer, chunk in order(len(steps), len(xs)):
        stream = streams[layer] if streams else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            x, state = waiting[layer].popleft(), finals[layer]
            if stream:
                if layer:
                    stream.wait_event(finished.pop((layer - 1, chunk)))
                _record(stream, x, *state.tensors)
            y, finals[layer], _ = steps[layer]((x,), state, PLAIN)
            waiting[layer + 1].append(y)
            if stream:
                finished[layer, chunk] = stream.record_event()
    for stream in streams:
        caller.wait_stream(stream)  # type: ignore[union-attr]
    if caller:
        _record(caller, *waiting[-1], *(tensor for state in finals for tensor in state.tensors))
    return list(waiting[-1]), finals


def _record(stream: torch.cuda.Stream, *tensors: Tensor | None) -> None:
    """Tell the allocator that a stream uses these tensors, so it does not reuse their memory too early."""
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)


@functools.cache
def streams_of(device: torch.device, layers: int) -> tuple[torch.cuda.Stream, ...]:
    """The same streams for every call, because the allocator keeps a pool of memory for each stream."""
    return tuple(torch.cuda.Stream(device) for _ in range(layers))
