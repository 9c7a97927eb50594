"""The specification: RNN, GRU and LSTM as loops over time in plain torch, any dtype, any device.

    RNN     h' = act(x + rec)
    GRU     r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)
    LSTM    i, f, o = sigmoid(x + rec),  g = tanh(x_g + rec_g),  c' = f c + i g,  h' = o tanh(c')

with x = W_ih x_t + b_ih (computed before the loop) and rec = W_hh h + b_hh, gates in torch's row order. Everything is
differentiable, twice too: this is the slow path that the fused kernels are checked against.

Source: the equations in the documentation of torch.nn.RNN, torch.nn.GRU and torch.nn.LSTM.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sequences import Sequences, Slots

State = tuple[Tensor, ...]
CellStep = Callable[[Tensor, Tensor, State], State]  # x and rec (B, G, H) and the state before, to the state after


def lstm_step(x: Tensor, rec: Tensor, state: State) -> State:
    i, f, g, o = (x + rec).unbind(-2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * state[1] + i * g
    return o * c.tanh(), c


def gru_step(x: Tensor, rec: Tensor, state: State) -> State:
    h = state[0]
    x_r, x_z, x_n = x.unbind(-2)
    rec_r, rec_z, rec_n = rec.unbind(-2)
    r, z = (x_r + rec_r).sigmoid(), (x_z + rec_z).sigmoid()
    n = (x_n + r * rec_n).tanh()
    return (n + z * (h - n),)


def rnn_tanh_step(x: Tensor, rec: Tensor, state: State) -> State:
    return ((x + rec).squeeze(-2).tanh(),)


def rnn_relu_step(x: Tensor, rec: Tensor, state: State) -> State:
    return ((x + rec).squeeze(-2).relu(),)


STEPS: dict[str, CellStep] = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": rnn_tanh_step, "rnn_relu": rnn_relu_step}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # G, blocks of H rows in W_ih and W_hh
HAS_C = {"lstm"}  # whose state is (h, c)
OF_TORCH = frozenset(STEPS)  # of which torch has kernels too: others come by fastrnn.cells.register


def recurrence(
    cell: str,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    *,
    sequences: Sequences | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    by_step: bool = False,
    cell_states: bool = False,
) -> tuple[Any, ...]:
    """Run one layer, D directions, over all of time: the same contract as fastrnn.ops.recurrence.

    x_gates (T, B, D, G, H), W_hh (D, G*H, H), b_hh (D, G*H) or None, h_0 and c_0 (D, B, H), c_0 only for the LSTM;
    returns y (T, B, D, H), h_n (D, B, H), c_n (D, B, H) or None, and with cell_states c (T, B, D, H). Direction 1 walks
    time from its end. The state keeps the dtype of h_0 and c_0 from step to step. sequences, reset_h, reset_c and
    by_step: see fastrnn.ops.recurrence; x_gates, y and c are (total, D, ...) where sequences are ragged.

    >>> import torch, fastrnn.reference
    >>> x_gates, W_hh, h_0 = torch.zeros(5, 2, 1, 3, 4), torch.zeros(1, 12, 4), torch.ones(1, 2, 4)
    >>> y, h_n, _ = fastrnn.reference.recurrence("gru", x_gates, W_hh, None, h_0, None)
    >>> h_n[0, 0, 0].item()  # z is 1/2 and n is 0: the state halves each step
    0.03125
    """
    starts = [start for start in (reset_h, reset_c) if start is not None]
    reset, length, slots, frozen = None, None, None, None
    if sequences is not None:
        reset, (_, first, length) = sequences.reset, sequences.rows[:, sequences.rows[0].argsort()]
        if x_gates.dim() == 4:  # ragged: made a padded batch, whose padding is some other slot and is not used
            slots = Slots.of(sequences.rows, x_gates.shape[:1])
            try:
                longest = int(length.max())
            except RuntimeError:  # vmap and export know no values: none is longer than all together
                longest = x_gates.shape[0]
            time = torch.arange(longest, device=x_gates.device)
            index = (first + time[:, None]).clamp(max=x_gates.shape[0] - 1)
            x_gates, reset = x_gates[index], None if reset is None else reset[index]
            starts = [start[index] for start in starts] if by_step else starts
        # Frozen rows compute with zeros: a NaN of theirs times their gradients, which are zero, would be NaN.
        frozen = (torch.arange(x_gates.shape[0], device=x_gates.device)[:, None] >= length)[..., None]
        x_gates = x_gates.masked_fill(frozen[..., None, None], 0)
    step = STEPS[cell]
    T, B, D, G, H = x_gates.shape
    outputs, finals = [], []
    for d in range(D):
        state: State = (h_0[d],) if c_0 is None else (h_0[d], c_0[d])
        kept: list[State] = [state] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            edge = t + d  # the first step of the later segment, if one ended before this step
            if reset is not None and length is not None and edge < T:
                restart = (reset[edge] & (edge < length))[:, None]
                anew = [start[edge, :, d] if by_step else start[d] for start in starts] or map(torch.zeros_like, state)
                state = tuple(torch.where(restart, s, old) for s, old in zip(anew, state, strict=True))
            before = state if frozen is None else tuple(s.masked_fill(frozen[t], 0) for s in state)
            rec = torch.nn.functional.linear(before[0].to(W_hh.dtype), W_hh[d], None if b_hh is None else b_hh[d])
            after = step(x_gates[t, :, d], rec.view(B, G, H), before)
            kept[t] = tuple(s.to(x_gates.dtype) for s in after)
            if frozen is not None:
                kept[t] = tuple(s.masked_fill(frozen[t], 0) for s in kept[t])
                after = tuple(torch.where(frozen[t], old, new) for new, old in zip(after, state, strict=True))
            state = after
        outputs.append([torch.stack(of_time) for of_time in zip(*kept, strict=True)])
        finals.append(state)
    y, *c = (torch.stack(of_directions, 2) for of_directions in zip(*outputs, strict=True))
    if slots is not None:
        y, *c = (states[slots.t, slots.sequence] for states in (y, *c))
    h_n = torch.stack([state[0] for state in finals]).to(h_0.dtype)
    c_n = None if c_0 is None else torch.stack([state[1] for state in finals])
    return (y, h_n, c_n, *c) if cell_states else (y, h_n, c_n)
