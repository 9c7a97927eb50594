"""The LSTM with projection (proj_size P) as a recurrence without one: kernels need not know of it.

    h = W_hr m,  m = o tanh(c);    rec = W_hh h_prev + b_hh = (W_hh W_hr) m_prev + b_hh

So m (size H) takes h's place in the recurrence, with one combined weight (4*H, H), and outputs are projected behind it
by one product. Only the state that a segment starts from is an h (size P) that no m is known of: there m_prev is 0, and
h is more input:

    x_gates = W_ih x + W_hh h_start + b_ih,  h_start = 0 inside a segment

A State is (m, c, h_0) before the first step and (m, c) from then on, each (D, B, H or P).

Source: Sak et al. 2014 (arXiv:1402.1128) for the cell, torch.nn.LSTM for its equations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..sequences import PLAIN, Slots, Window, states_before

State = tuple[Tensor, ...]


def before(h_0: Tensor | None, c_0: Tensor) -> State:
    """The State before the first step; h_0 None is zeros, for which nothing is added."""
    m = torch.zeros_like(c_0)
    return (m, c_0) if h_0 is None else (m, c_0, h_0)


def after(state: State, W_hr: Tensor, h_0: Tensor, lengths: Tensor | None) -> State:
    """h_n and c_n of the State after the last step; W_hr (D, P, H). Where lengths (B,) are 0, h_0 stays."""
    m, c = state
    h = project(m.to(W_hr.dtype), W_hr)
    return (h if lengths is None else torch.where((lengths == 0)[:, None], h_0.to(h.dtype), h)), c


def with_starts(
    xs: tuple[Tensor, ...], W_ih: Sequence[Tensor], W_hh: Sequence[Tensor], state: State, window: Window
) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """Each direction's input and its weight, h_start behind x, and W_hh behind W_ih.

    Where the directions share x they share the wider one, and each has zeros for the other's h_start.
    """
    m, _, *h_0 = state
    if not h_0 and not window.starts:
        return xs, W_ih
    h = h_0[0] if h_0 else m.new_zeros(*m.shape[:2], W_hh[0].shape[-1])
    starts = [h_start(d, x, h[d].to(x.dtype), window) for d, x in enumerate(xs)]
    if any(x is not xs[0] for x in xs):
        wider = tuple(torch.cat(both, -1) for both in zip(xs, starts, strict=True))
        return wider, [torch.cat(both, -1) for both in zip(W_ih, W_hh, strict=True)]
    of_others = [[W if e == d else torch.zeros_like(W) for e in range(len(W_hh))] for d, W in enumerate(W_hh)]
    return (torch.cat((xs[0], *starts), -1),) * len(xs), [
        torch.cat((W, *columns), -1) for W, columns in zip(W_ih, of_others, strict=True)
    ]


def h_start(d: int, x: Tensor, h_0: Tensor, window: Window) -> Tensor:
    """What segments start from in direction d, at their first steps of x (T, B, I) or (total, I); zeros elsewhere."""
    if window.sequences is None:
        rest = x.shape[0] - 1
        return pad(h_0.unsqueeze(0), (0, 0, 0, 0, rest * d, rest * (1 - d)))
    zeros, anew = x.new_zeros(*x.shape[:-1], h_0.shape[-1]), None
    if window.starts:
        anew = (window.starts[0].select(-2, d) if window.by_step else window.starts[0][d]).to(x.dtype)
    return states_before(d, zeros, h_0, window.sequences, anew, window.by_step)


def run(
    recurrence: Callable,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    W_hr: Tensor,
    state: State,
    window: Window = PLAIN,
    source: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, State, Tensor | None]:
    """y (T, B, D, P), the State after x_gates (T, B, D, 4, H), with W_hh (D, 4*H, P), and c if the window wants it."""
    m, c, *_ = state
    options = window.options()
    if window.starts:  # its h is in x_gates
        options["reset_h"] = torch.zeros_like(options["reset_c"])
    y, m, c, *cs = recurrence("lstm", x_gates, combined(W_hh, W_hr), b_hh, m, c, source=source, **options)
    y = torch.stack([linear(y.select(-2, d), W_hr[d]) for d in range(len(W_hr))], -2)
    if window.sequences is not None and y.dim() == 4:  # no gradient of the padding, even NaN, reaches W_hr
        y = y.masked_fill(~Slots.of(window.sequences.rows, y.shape[:2]).live[..., None, None], 0)
    return y, (m, c), cs[0] if cs else None


def combined(W_hh: Tensor, W_hr: Tensor) -> Tensor:
    """W_hh W_hr (D, 4*H, H), summed in fp32 or fp64 and rounded once."""
    exact = torch.promote_types(W_hh.dtype, torch.float32)
    return (W_hh.to(exact) @ W_hr.to(exact)).to(W_hh.dtype)


def project(of_directions: Tensor, W: Tensor) -> Tensor:
    """W v of each row v of each direction: (D, N, H) by (D, P, H) to (D, N, P)."""
    return torch.bmm(of_directions, W.mT)
