"""The specification: a recurrence as a loop over time in plain torch, any cell, any dtype, any device.

    rec = W_hh h + b_hh;   state = step(x_gates[t], rec, state);   y[t] = h

The step of each cell is in cells.py. Everything is differentiable, and the gradients are too. The fused kernels are
checked against this slow path.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import noise as random
from .cells import CELLS, State
from .kernels.arguments import NO_CLIP
from .sequences import Sequences, Slots


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
    num_heads: int = 1,
) -> tuple[Any, ...]:
    """Run one layer of D directions over all of time, as fastrnn.ops.recurrence does, but in plain torch.

    x_gates is (T, B, D, G, H), W_hh (D, G*H, H), b_hh (D, G*H) or None, and h_0 (D, B, H). c_0 is (D, B, H) for the
    LSTM, (3, D, B, H) for the sLSTM's c, n and m, and else None. Returns y (T, B, D, H), h_n (D, B, H), c_n shaped as
    c_0 and, with cell_states, c (T, B, D, H) or (3, T, B, D, H). Direction 1 walks time from its end. The state keeps
    the dtype of h_0 and c_0 from step to step. fastrnn.ops.recurrence describes sequences, reset_h, reset_c, by_step
    and num_heads. x_gates, y and c are (total, D, ...) if sequences are ragged.

    >>> import torch, fastrnn.reference
    >>> x_gates, W_hh, h_0 = torch.zeros(5, 2, 1, 3, 4), torch.zeros(1, 12, 4), torch.ones(1, 2, 4)
    >>> y, h_n, _ = fastrnn.reference.recurrence("gru", x_gates, W_hh, None, h_0, None)
    >>> h_n[0, 0, 0].item()  # z is 1/2 and n is 0: the state halves each step
    0.03125
    """
    state_0, starts = stacked(h_0, c_0), None if reset_h is None else stacked(reset_h, reset_c)
    y, finals, steps = run(
        cell, x_gates, W_hh, b_hh, state_0, sequences=sequences, starts=starts, by_step=by_step, heads=num_heads
    )
    found = (y, finals[0], beside_h(finals))
    return (*found, beside_h(steps, 0)) if cell_states and len(steps) else found


def stacked(h: Tensor, others: Tensor | None) -> Tensor:
    """Stack h and the other states to (P, ...). others is None, one state, or several in one tensor."""
    if others is None:
        return h.unsqueeze(0)
    return torch.stack((h, others)) if others.dim() == h.dim() else torch.cat((h.unsqueeze(0), others))


def beside_h(states: Tensor, first: int = 1) -> Tensor | None:
    """The states beside h, in the op's form: None, the only one, or several as (P - 1, ...)."""
    others = states[first:]
    return others if len(others) > 1 else others[0] if len(others) else None


def run(
    cell: str,
    x_gates: Tensor,
    W_hh: Tensor,
    b_hh: Tensor | None,
    state_0: Tensor | None,
    *,
    sequences: Sequences | None = None,
    starts: Tensor | None = None,
    by_step: bool = False,
    heads: int = 1,
    clip_gradient: float = NO_CLIP,
    clip_state: float = NO_CLIP,
    zoneout: float = 0.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer over all of time: R = D * N recurrences of K units side by side, for D directions of N heads.

    x_gates is (T, B, R, G, K), W_hh (R, G*K, K) and b_hh (R, G*K). state_0 (P, D, B, N*K) has all states of the cell, h
    first; None is zeros. starts has the states after resets, shaped as state_0, or by_step (P, T, B, D, N*K). Returns y
    (T, B, D, N*K), the final states shaped as state_0, and the states beside h of all steps, (P - 1, T, B, D, N*K).

    clip_gradient: the gradient that comes back through W_hh is clipped to [-x, x] at each step. clip_state: each step
    reads c (in a cell without c: h) clipped like that. Final states are clipped too, but not y and c of all steps.
    zoneout: h = h_prev + share (h_new - h_prev). With noise, share is 0 with probability p, else 1; without, 1 - p.
    """
    clips = Clips(cell, clip_gradient, clip_state, zoneout)
    *slots, R, _, K = x_gates.shape
    D, P = R // heads, len(CELLS[cell].states)
    if state_0 is None:
        B = slots[1] if len(slots) == 2 else sequences.rows.shape[1]  # type: ignore[union-attr]
        state_0 = x_gates.new_zeros(P, D, B, heads * K, dtype=CELLS[cell].state_dtype(x_gates.dtype))
    walk = _padded(x_gates, sequences, starts if by_step else None)
    if zoneout and noise is not None:
        walk = walk._replace(stays=_stays(walk, noise, zoneout, heads))
    given = walk.starts if by_step else starts
    first = state_0.unflatten(-1, (heads, K))
    given = None if given is None else given.unflatten(-1, (heads, K))
    outputs, finals = [], []
    for d in range(D):
        own = slice(d * heads, (d + 1) * heads)
        anew = None if given is None else given[..., d, :, :] if by_step else given[:, d]
        weights = W_hh[own], None if b_hh is None else b_hh[own]
        of_direction = walk._replace(x_gates=walk.x_gates[:, :, own])
        if walk.stays is not None:
            of_direction = of_direction._replace(stays=walk.stays[:, :, own])
        states, final = _walk(clips, of_direction, d, weights, tuple(first[:, d]), anew, by_step)
        outputs.append(states)
        finals.append(torch.stack(clips.of(final)))
    # From P tensors for each direction, make P tensors (T, B, D, N*K).
    all_steps = [torch.stack(of_one, -3).flatten(-2) for of_one in zip(*outputs, strict=True)]
    last = torch.stack(finals, 1).flatten(-2).to(state_0.dtype)
    if walk.slots is not None:
        all_steps = [of_state[walk.slots.t, walk.slots.sequence] for of_state in all_steps]
    y, *others = all_steps
    return y, last, torch.stack(others) if others else y.new_empty(0, *y.shape)


class Clips(NamedTuple):
    """Limits x of the clips [-x, x] at each step of a cell (negative: no clip), and zoneout's probability."""

    cell: str
    gradient: float
    state: float
    zoneout: float

    def of(self, states: State) -> State:
        if self.state < 0:
            return states
        place = min(1, len(states) - 1)
        return tuple(s.clamp(-self.state, self.state) if n == place else s for n, s in enumerate(states))

    def zoned(self, after: State, before: State, stays: Tensor | None) -> State:
        if not self.zoneout:
            return after
        if stays is None:
            return before[0] + (1 - self.zoneout) * (after[0] - before[0]), *after[1:]
        return torch.where(stays, before[0], after[0]), *after[1:]

    def of_gradient(self, h: Tensor) -> Tensor:
        return h if self.gradient < 0 else _ClippedGradient.apply(h, self.gradient)  # type: ignore[return-value]


class _ClippedGradient(torch.autograd.Function):
    """Return the tensor unchanged, and clip its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, limit: float) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.limit, ctx.limit), None


class _Walk(NamedTuple):
    """A padded batch, and where its sequences end and are reset."""

    x_gates: Tensor  # (T, B, R, G, K)
    reset: Tensor | None  # (T, B)
    length: Tensor | None  # (B,)
    frozen: Tensor | None  # (T, B, 1, 1)
    starts: Tensor | None  # states after resets, if they are given by step
    slots: Slots | None  # for ragged sequences, their places in the padded batch
    places: Tensor | None = None  # for ragged sequences, the slot of each step (T, B)
    stays: Tensor | None = None  # (T, B, R, K): where zoneout keeps h


def _padded(x_gates: Tensor, sequences: Sequences | None, starts: Tensor | None) -> _Walk:
    if sequences is None or sequences.rows is None:
        return _Walk(x_gates, None if sequences is None else sequences.reset, None, None, starts, None)
    slots, places, reset = None, None, sequences.reset
    _, first, length = sequences.rows[:, sequences.rows[0].argsort()]
    if x_gates.dim() == 4:  # ragged: make it a padded batch; its padding repeats other slots and is not used
        slots = Slots.of(sequences.rows, x_gates.shape[:1], x_gates.device)
        try:
            longest = int(length.max())
        except RuntimeError:  # under vmap and export there are no values: take the total, which bounds them
            longest = x_gates.shape[0]
        time = torch.arange(longest, device=x_gates.device)
        places = index = (first + time[:, None]).clamp(max=x_gates.shape[0] - 1)
        x_gates, reset = x_gates[index], None if reset is None else reset[index]
        starts = None if starts is None else starts[:, index]
    # Frozen rows compute with zeros. Their gradients are zero, and 0 * NaN would be NaN.
    frozen = (torch.arange(x_gates.shape[0], device=x_gates.device)[:, None] >= length)[..., None, None]
    return _Walk(x_gates.masked_fill(frozen[..., None], 0), reset, length, frozen, starts, slots, places)


def _stays(walk: _Walk, noise: Tensor, p: float, heads: int) -> Tensor:
    T, B, R, _, K = walk.x_gates.shape
    places = torch.arange(T * B, device=noise.device).view(T, B) if walk.places is None else walk.places
    before = noise[1:].repeat_interleave(heads)
    units = torch.arange(R * K, device=noise.device).view(R, K)
    return random.stays(noise, p, places[..., None] + before, units)


def _walk(
    clips: Clips,
    walk: _Walk,
    d: int,
    weights: tuple[Tensor, Tensor | None],
    state: State,
    anew: Tensor | None,
    by_step: bool,
) -> tuple[list[Tensor], State]:
    """Walk the heads of direction d over time. Return the states of all steps (T, B, N, K), and the last (B, N, K)."""
    x_gates, reset, length, frozen = walk[:4]
    T, x = x_gates.shape[0], x_gates.flatten(1, 2)  # a cell's step takes rows, and does not know of heads
    cell = CELLS[clips.cell]
    wide = cell.state_dtype(x_gates.dtype)
    kept: list[State] = [state] * T
    for t in range(T) if d == 0 else reversed(range(T)):
        edge = t + d  # the first step of the later segment, if one ended before this step
        if reset is not None and edge < T:
            restart = (reset[edge] if length is None else reset[edge] & (edge < length))[:, None, None]
            start = map(torch.zeros_like, state) if anew is None else anew[:, edge] if by_step else anew
            state = tuple(torch.where(restart, s, old) for s, old in zip(start, state, strict=True))
        state = clips.of(state)
        before = state if frozen is None else tuple(s.masked_fill(frozen[t], 0) for s in state)
        rec = _product(clips.of_gradient(before[0].to(weights[0].dtype)), *weights)
        rows = cell.step(x[t], rec.reshape(x.shape[1:]), tuple(s.flatten(0, 1) for s in before))
        after = tuple(s.view_as(old) for s, old in zip(rows, state, strict=True))
        after = clips.zoned(after, before, None if walk.stays is None else walk.stays[t])
        kept[t] = tuple(s.to(wide if n else x_gates.dtype) for n, s in enumerate(after))
        if frozen is not None:
            kept[t] = tuple(s.masked_fill(frozen[t], 0) for s in kept[t])
            after = tuple(torch.where(frozen[t], old, new) for new, old in zip(after, state, strict=True))
        state = after
    return [torch.stack(of_time) for of_time in zip(*kept, strict=True)], state


def _product(h: Tensor, W_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """W_hh h + b_hh for heads side by side: h (B, N, K), W_hh (N, G*K, K) and b_hh (N, G*K) give (B, N, G*K)."""
    if W_hh.shape[0] == 1:
        return torch.nn.functional.linear(h[:, 0], W_hh[0], None if b_hh is None else b_hh[0]).unsqueeze(1)
    rec = torch.matmul(h.transpose(0, 1), W_hh.mT).transpose(0, 1)
    return rec if b_hh is None else rec + b_hh
