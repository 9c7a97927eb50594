"""What training drops: input between layers, and connections; of one seed the same in whatever order a call then runs.

Of input one mask a layer, of connections (DropConnect, Wan et al. 2013) one a layer and direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import of_times
from ..stack import Stack
from .layers import Step


def drop_mask(x: Tensor, p: float) -> Tensor:
    """Which elements of a layer's input (T, B, D*H) are kept.

    Drawn for all of time at once and layer by layer, in whatever order chunks then run: from one seed come the same
    masks for the plain run, in chunks and as a wavefront. It is all that backward keeps, a byte an element, which is
    what torch's own dropout keeps too.
    """
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format).bernoulli_(1 - p)


def drop(x: Tensor, mask: Tensor, p: float) -> Tensor:
    return x * mask * (1 / (1 - p) if p < 1 else 0.0)


def dropping(step: Step, masks: Sequence[Tensor], p: float) -> Step:
    """The step of a layer of one direction whose input is dropped, outside of what is recomputed, chunk by chunk."""
    chunks = iter(masks)
    return lambda xs, state, window: step((drop(xs[0], next(chunks), p),), state, window)


def noise_of_chunks(noise: Tensor, T: int, K: int, B: int, directions: int) -> list[Tensor]:
    """A layer's noise for chunks of K time steps, each direction's counted from its own start."""
    if K >= T:
        return [noise]
    chunks = [(first, min(K, T - first)) for first in range(0, T, K)]
    return [of_times(noise, (first * B, (T - first - steps) * B)[:directions]) for first, steps in chunks]


def zoning(step: Step, noises: Sequence[Tensor]) -> Step:
    """The step of a layer with zoneout, outside of what is recomputed, chunk by chunk."""
    chunks = iter(noises)
    return lambda xs, state, window: step(xs, state, window._replace(noise=next(chunks)))


def drop_connections(stack: Stack, params: Sequence[Tensor]) -> tuple[Stack, list[Tensor]]:
    """A call's layers with elements of their W_hh dropped, which is all that it has to do with them: no kernel knows.

        W_hh' = mask W_hh / (1 - p)

    One mask a layer and direction, of tied directions too, for all chunks of time; they are a call's first random
    numbers, so that tiers, which draw others or none, agree.
    """
    params, p = list(stack.of_each_direction(params) if stack.tie_directions else params), stack.drop_connect
    count = len(params) // (stack.num_layers * stack.directions)
    for i in range(1, len(params), count):
        params[i] = drop(params[i], drop_mask(params[i], p), p)
    return stack._replace(drop_connect=0.0, tie_directions=False), params
