"""Dropout between layers: one mask a layer, the same from one seed in whatever order layers and chunks then run."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
