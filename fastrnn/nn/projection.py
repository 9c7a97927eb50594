"""The LSTM with projection (proj_size P) as a recurrence without one, so that kernels need not know of it.

    h = W_hr m,  m = o tanh(c);    rec = W_hh h_prev + b_hh = (W_hh W_hr) m_prev + b_hh

m (size H) takes h's place in the recurrence, with the one combined weight W_hh W_hr (4*H, H). One product projects the
outputs afterwards. Only the state at the start of a segment is an h (size P) without an m. There m_prev is 0, and h is
part of the input:

    x_gates = W_ih x + W_hh h_start + b_ih,  h_start = 0 inside a segment

The states of such a layer are m and c. The first step gets h_0 beside them.

Source: Sak et al. 2014 (arXiv:1402.1128) for the cell, torch.nn.LSTM for its equations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..sequences import Slots, Window, states_before


def after(m: Tensor, W_hr: Tensor, h_0: Tensor, lengths: Tensor | None) -> Tensor:
    """h_n (D, B, P) from the last m (D, B, H) and W_hr (D, P, H). Where lengths (B,) are 0, h_0 stays."""
    h = torch.bmm(m.to(W_hr.dtype), W_hr.mT)
    return h if lengths is None else torch.where((lengths == 0)[:, None], h_0.to(h.dtype), h)


def with_starts(
    xs: tuple[Tensor, ...], W_ih: Sequence[Tensor], W_hh: Sequence[Tensor], h_0: Tensor | None, window: Window
) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """Each direction's input with h_start appended, and its W_ih with W_hh appended.

    h_0 is (D, B, P), or None for zeros. If the directions share x, they share the wider input too, and each has zero
    weights for the other's h_start.
    """
    if h_0 is None and window.projected is None:
        return xs, W_ih
    starts = [h_start(d, x, h_0, W_hh[d].shape[-1], window) for d, x in enumerate(xs)]
    if any(x is not xs[0] for x in xs):
        wider = tuple(torch.cat(both, -1) for both in zip(xs, starts, strict=True))
        return wider, [torch.cat(both, -1) for both in zip(W_ih, W_hh, strict=True)]
    of_others = [[W if e == d else torch.zeros_like(W) for e in range(len(W_hh))] for d, W in enumerate(W_hh)]
    return (torch.cat((xs[0], *starts), -1),) * len(xs), [
        torch.cat((W, *columns), -1) for W, columns in zip(W_ih, of_others, strict=True)
    ]


def h_start(d: int, x: Tensor, h_0: Tensor | None, P: int, window: Window) -> Tensor:
    """The h that segments of direction d start from, at their first steps in x (T, B, I) or (total, I); else zeros."""
    segments = window.sequences
    B = x.shape[1] if x.dim() == 3 else segments.rows.shape[1]  # type: ignore[union-attr]
    h = x.new_zeros(B, P) if h_0 is None else h_0[d].to(x.dtype)
    if segments is None:
        rest = x.shape[0] - 1
        return pad(h.unsqueeze(0), (0, 0, 0, 0, rest * d, rest * (1 - d)))
    zeros, anew = x.new_zeros(*x.shape[:-1], P), None
    if window.projected is not None:
        anew = (window.projected.select(-2, d) if window.by_step else window.projected[d]).to(x.dtype)
    return states_before(d, zeros, h, segments, anew, window.by_step)


def projected(y: Tensor, W_hr: Tensor, window: Window) -> Tensor:
    """h (T, B, D*P) from m (T, B, D*H)."""
    D = len(W_hr)
    h = torch.cat([linear(m, W) for m, W in zip(y.chunk(D, -1), W_hr, strict=True)], -1)
    rows = None if window.sequences is None else window.sequences.rows
    if rows is not None and y.dim() == 3:  # gradients of padding, which may be NaN, must not reach W_hr
        h = h.masked_fill(~Slots.of(rows, y.shape[:2], y.device).live[..., None], 0)
    return h


def combined(W_hh: Tensor, W_hr: Tensor) -> Tensor:
    """W_hh W_hr (D, 4*H, H), computed in fp32 or fp64 and rounded once."""
    exact = torch.promote_types(W_hh.dtype, torch.float32)
    return (W_hh.to(exact) @ W_hr.to(exact)).to(W_hh.dtype)
