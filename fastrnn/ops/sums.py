"""Gradients of W_hh and b_hh: sums over all slots of the backward kernel's output.

    dW_hh = sum of d_rec (x) h_prev;    db_hh = sum of d_rec

d_rec is d_x_gates, (slots, R*G*K). In a cell that splits its last gate, that gate's part is d_rec_last, (slots, R*K).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import profiling
from ..sequences import Sequences as Segments
from ..sequences import states_before
from .prepared import Prepared


class Steps(NamedTuple):
    """h of all steps, and h before the first ones."""

    prepared: Prepared
    y: Tensor  # (slots, R, K) in memory
    h_0: Tensor | None  # (D, B, N*K), None for zeros
    sequences: Any  # kernels/arguments.py
    by_step: bool


def bias_gradient(d_x_gates: Tensor, d_rec_last: Tensor | None, K: int, of_x: Tensor | None = None) -> Tensor:
    """db_hh (R*G*K,). of_x is the sum of d_x_gates, if the caller has it."""
    of_x = d_x_gates.sum(0) if of_x is None else of_x
    if d_rec_last is None:
        return of_x.clone()  # the gradients of b_ih and b_hh must not share memory
    of_last, R = d_rec_last.sum(0), d_rec_last.shape[1] // K
    if R == 1:
        return torch.cat((of_x[:-K], of_last))
    return torch.cat((of_x.view(R, -1)[:, :-K], of_last.view(R, K)), 1).flatten()


@profiling.inside("weight gradients", traced=False)
def weight_gradient(steps: Steps, d_x_gates: Tensor, d_rec_last: Tensor | None) -> Tensor:
    """dW_hh (R*G*K, K). Each recurrence, and each part of its gates, is written to its place.

    h_prev is y one step before, and h_0 at the start. For plain sequences it is not copied: the start is its own
    product, and y is only shifted.
    """
    R, K, limit = steps.prepared.recurrences, steps.prepared.K, steps.prepared.clip_h
    if limit >= 0:
        steps = _clipped(steps, limit)
    rows, shifted = d_x_gates.shape[1] // R, _is_shifted(steps)
    whole = d_x_gates.new_empty(R * rows, K)
    # The rows of each product in `whole`. All views in one operation.
    sizes = (rows,) if d_rec_last is None else (rows - K, K)
    parts = whole.split_with_sizes(sizes * R) if len(sizes) * R > 1 else (whole,)
    for r in range(R):
        h_prev, own = _h_prev(steps, r, shifted), parts[r * len(sizes) : (r + 1) * len(sizes)]
        _sum(steps, r, d_x_gates, r * rows, h_prev, shifted, out=own[0])
        if d_rec_last is not None:
            _sum(steps, r, d_rec_last, r * K, h_prev, shifted, out=own[1])
    return whole


def _clipped(steps: Steps, limit: float) -> Steps:
    """The same steps, with h clipped as the next steps read it."""
    starts = steps.sequences.starts
    starts = None if starts is None else (starts[0].clamp(-limit, limit),)
    h_0 = None if steps.h_0 is None else steps.h_0.clamp(-limit, limit)
    sequences = steps.sequences._replace(starts=starts)
    return steps._replace(y=steps.y.clamp(-limit, limit), h_0=h_0, sequences=sequences)


def _sum(steps: Steps, r: int, d_rec: Tensor, first: int, h_prev: Tensor, shifted: bool, out: Tensor) -> None:
    """Sum over the columns of d_rec from `first` on. Each view is one operation, to save time on the CPU."""
    prepared, rows = steps.prepared, out.shape[0]
    columns, count = d_rec.shape[1], d_rec.shape[0]
    at = first + d_rec.storage_offset()
    if not shifted:
        torch.mm(d_rec.as_strided((rows, count), (1, columns), at), h_prev, out=out)
        return
    B, direction = prepared.B, r // prepared.N
    later = 0 if direction else B  # slots with a step before them
    d_later = d_rec.as_strided((rows, count - B), (1, columns), later * columns + at)
    if steps.h_0 is None:
        torch.mm(d_later, h_prev, out=out)
        return
    h_0, reset = _own(steps.h_0, r, prepared), steps.sequences.reset
    if reset is not None and direction == 0:
        h_0 = h_0.masked_fill(reset[0, :, None], 0)
    d_first = d_rec.as_strided((rows, B), (1, columns), (count - B) * columns * direction + at)
    torch.addmm(d_first @ h_0, d_later, h_prev, out=out)


def _is_shifted(steps: Steps) -> bool:
    """Whether h_prev is y one step before, or zeros where a segment begins. Frozen slots have zeros in y and in d_rec.

    It is not if segments begin with a state, or if slots are ragged. It is not either if sequences end at different
    times and there is an h_0, because direction 1 then reads h_0 at different times.
    """
    rows, _, starts = steps.sequences[:3]
    return starts is None and (rows is None or (not steps.prepared.ragged and steps.h_0 is None))


def _own(state: Tensor, r: int, prepared: Prepared) -> Tensor:
    """A recurrence's part of (..., D, B, N*K)."""
    N, K = prepared.N, prepared.K
    return state.select(-3, r // N).narrow(-1, r % N * K, K)


def _h_prev(steps: Steps, r: int, shifted: bool) -> Tensor:
    """The h before every slot (slots, K), as a view or a copy. If y is shifted, without the slots at the start."""
    prepared, (rows, reset, starts) = steps.prepared, steps.sequences[:3]
    R, N, K, direction = prepared.recurrences, prepared.N, prepared.K, r // prepared.N
    if shifted:
        B, count = prepared.B, prepared.slots[0] * prepared.B
        first = steps.y.storage_offset() + (B * R * direction + r) * K
        before = steps.y.as_strided((count - B, K), (R * K, 1), first)
        return before if reset is None else before.masked_fill(reset[1:].reshape(-1, 1), 0)
    y = steps.y.view(*prepared.slots, R, K).select(-2, r)
    h_0 = y.new_zeros(prepared.B, K) if steps.h_0 is None else _own(steps.h_0, r, prepared)
    start = None
    if starts is not None:
        h_start, own = starts[0].to(y.dtype), slice(r % N * K, (r % N + 1) * K)
        start = h_start[..., direction, own] if steps.by_step else h_start[direction, :, own]
    return states_before(direction, y, h_0, Segments(rows, reset), start, steps.by_step).flatten(0, -2)
