"""Dropout, DropConnect and zoneout. The same seed gives the same draws, in whatever order layers and chunks run.

Dropout between layers has one mask a layer. DropConnect (Wan et al. 2013) has one a layer and direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import of_times
from ..stack import Stack
from .layers import Step


def drop_mask(x: Tensor, p: float) -> Tensor:
    """Draw which elements of a layer's input (T, B, D*H) are kept.

    The mask is drawn for all of time at once and layer by layer. The plain run, chunks and a wavefront therefore get
    the same masks from the same seed. Backward keeps the mask only, a byte an element, as torch's own dropout does.
    """
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format).bernoulli_(1 - p)


def drop(x: Tensor, mask: Tensor, p: float) -> Tensor:
    return x * mask * (1 / (1 - p) if p < 1 else 0.0)


def dropping(step: Step, masks: Sequence[Tensor], p: float) -> Step:
    """Wrap the step of a layer of one direction: it drops input, chunk by chunk. Recomputing stays inside."""
    chunks = iter(masks)
    return lambda xs, state, window: step((drop(xs[0], next(chunks), p),), state, window)


def noise_of_chunks(noise: Tensor, T: int, K: int, B: int, directions: int) -> list[Tensor]:
    """A layer's noise for chunks of K time steps, counted from each direction's own start."""
    if K >= T:
        return [noise]
    chunks = [(first, min(K, T - first)) for first in range(0, T, K)]
    return [of_times(noise, (first * B, (T - first - steps) * B)[:directions]) for first, steps in chunks]


def zoning(step: Step, noises: Sequence[Tensor]) -> Step:
    """Wrap the step of a layer with zoneout: it gets its noise, chunk by chunk. Recomputing stays inside."""
    chunks = iter(noises)
    return lambda xs, state, window: step(xs, state, window._replace(noise=next(chunks)))


def drop_connections(stack: Stack, params: Sequence[Tensor]) -> tuple[Stack, list[Tensor]]:
    """Drop elements of each W_hh of a call. The rest of the call needs to know nothing of it.

        W_hh' = mask W_hh / (1 - p)

    Each layer and direction has one mask for all chunks of time, even if directions are tied. These are the first
    random numbers of a call, so all tiers draw the same ones, whether they draw others after these or not.
    """
    params, p = list(stack.of_each_direction(params) if stack.tie_directions else params), stack.drop_connect
    count = len(params) // (stack.num_layers * stack.directions)
    for i in range(1, len(params), count):
        params[i] = drop(params[i], drop_mask(params[i], p), p)
    return stack._replace(drop_connect=0.0, tie_directions=False), params
