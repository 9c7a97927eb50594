"""The LSTM with projection (proj_size P) as a recurrence without one: kernels need not know of it.

    h = W_hr m,  m = o tanh(c);    rec = W_hh h_prev + b_hh = (W_hh W_hr) m_prev + b_hh

So m (size H) takes h's place in the recurrence, with one combined weight (4*H, H), and outputs are projected behind it
by one product. Only the state before the first step is an h (size P) that no m is known of: there m_prev is 0, and
W_hh h_0 is added to x_gates. A State is (m, c, h_0) before the first step and (m, c) from then on, each (D, B, H or P).

Source: Sak et al. 2014 (arXiv:1402.1128) for the cell, torch.nn.LSTM for its equations.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .sequences import PLAIN, Window, states_before

State = tuple[Tensor, ...]


def before(h_0: Tensor | None, c_0: Tensor) -> State:
    """The State before the first step; h_0 None is zeros, for which nothing is added."""
    m = torch.zeros_like(c_0)
    return (m, c_0) if h_0 is None else (m, c_0, h_0)


def after(state: State, W_hr: Tensor) -> State:
    """h_n and c_n of the State after the last step; W_hr (D, P, H)."""
    m, c = state
    return project(m.to(W_hr.dtype), W_hr), c


def run(
    recurrence: Callable,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    W_hr: Tensor,
    state: State,
    window: Window = PLAIN,
) -> tuple[Tensor, State, Tensor | None]:
    """y (T, B, D, P), the State after x_gates (T, B, D, 4, H), with W_hh (D, 4*H, P), and c if the window wants it."""
    m, c, *h_0 = state
    options = window.options()
    if window.sequences is not None:
        h_0 = h_0[0] if h_0 else m.new_zeros(*m.shape[:2], W_hh.shape[-1])
        x_gates = start_sequences(x_gates, W_hh, h_0, window)
        if window.starts:
            options["reset_h"] = torch.zeros_like(options["reset_c"])
    elif h_0:
        x_gates = start(x_gates, W_hh, h_0[0], first_steps(x_gates))
    # Not known to be W_ih x + b_ih: without its source the recurrence is differentiable once.
    y, m, c, *cs = recurrence("lstm", x_gates, combined(W_hh, W_hr), b_hh, m, c, source=None, **options)
    y = torch.stack([linear(y.select(-2, d), W_hr[d]) for d in range(len(W_hr))], -2)
    return y, (m, c), cs[0] if cs else None


def first_steps(x_gates: Tensor) -> Tensor:
    """Where a sequence begins, (T, 1, D): at time 0, for direction 1 at T - 1."""
    T, _, D = x_gates.shape[:3]
    time = torch.arange(T, device=x_gates.device)
    return torch.stack((time == 0, time == T - 1)[:D], 1).unsqueeze(1)


def start(x_gates: Tensor, W_hh: Tensor, h: Tensor, where: Tensor) -> Tensor:
    """x_gates with W_hh h, of h (D, B, P), added where (T, B or 1, D) says that a sequence begins from h."""
    added = project(h.to(W_hh.dtype), W_hh).transpose(0, 1).unflatten(-1, x_gates.shape[3:])
    return torch.where(where[..., None, None], x_gates + added, x_gates)


def start_sequences(x_gates: Tensor, W_hh: Tensor, h_0: Tensor, window: Window) -> Tensor:
    """The same for sequences of their own: h_0 (D, B, P) where they begin, the window's h where they start anew."""
    assert window.sequences is not None
    h_starts, added = window.starts[0] if window.starts else None, []
    zeros = x_gates.new_zeros(*x_gates.shape[:-3], W_hh.shape[-1])  # elsewhere
    for d in range(len(W_hh)):
        anew = None if h_starts is None else (h_starts.select(-2, d) if window.by_step else h_starts[d]).to(zeros.dtype)
        h = states_before(d, zeros, h_0[d].to(zeros.dtype), window.sequences, anew, window.by_step)
        added.append(linear(h, W_hh[d]).unflatten(-1, x_gates.shape[-2:]))
    return x_gates + torch.stack(added, -3)


def combined(W_hh: Tensor, W_hr: Tensor) -> Tensor:
    """W_hh W_hr (D, 4*H, H), summed in fp32 or fp64 and rounded once."""
    exact = torch.promote_types(W_hh.dtype, torch.float32)
    return (W_hh.to(exact) @ W_hr.to(exact)).to(W_hh.dtype)


def project(of_directions: Tensor, W: Tensor) -> Tensor:
    """W v of each row v of each direction: (D, N, H) by (D, P, H) to (D, N, P)."""
    return torch.bmm(of_directions, W.mT)
