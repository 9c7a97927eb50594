"""Rows of unequal length, resets and cell states with torch's own kernels, without a Python loop over time or rows.

A reset cuts its row into two segments, which become two sequences. All S segments of all rows have M real steps. They
go through torch's kernels as one packed batch, the longest first (packed.py). Then outputs go back to their places. A
row's final state is that of its last segment. (Direction 1 walks time from its end: there it is that of the first.)
Padding is in no segment, so it is never read.

torch's kernels do not return cell states. These follow from the output, since one product gives all gates of all steps:

    i, f, g = W_ih x_t + b_ih + W_hh h_prev + b_hh,  i, f = sigmoid(i), sigmoid(f),  g = tanh(g)
    c_t = f c_{t-1} + i g

c_t is linear in c_{t-1}, so this is a scan of logarithmic depth. It runs over all segments laid end to end, (M, H).
(longest, S, H) would be mostly padding for one long segment among many short ones.

Source: G. Blelloch, "Prefix sums and their applications", CMU-CS-90-190, 1990 (the scan, and segments in it).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ..cells import CELLS
from ..sequences import untraced
from ..stack import Stack
from . import packed
from .packed import State


class Walk(NamedTuple):
    """How one direction walks through the rows' steps. Segments are in the order of the packed batch."""

    packed: Tensor  # (M,): the place of each walked step in the packed batch; row by row, backwards in direction 1
    starts: Tensor  # (S,): the index among the walked steps of each segment's first step
    from_hx: Tensor  # (S,) bool: whether the segment starts from its row's hx, or else after a reset
    resets: Tensor  # (S,): the index along reset's first dimension of the reset that the segment starts from
    finals: Tensor  # (S,) bool: whether the segment's last state is its row's final state


class Segments(NamedTuple):
    """S segments: the row of each (S,), the slot of each packed step (M,), the packed batch's sizes, and the walks."""

    rows: Tensor
    places: Tensor
    batch_sizes: Tensor
    walks: tuple[Walk, ...]


@untraced
def run(
    stack: Stack,
    x: Tensor,
    state: State,
    params: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: State | None = None,
    cell_states: bool = False,
) -> tuple[Tensor, State, Tensor | None]:
    """Run all layers with torch's kernel over rows of unequal length, cut at resets. Nothing is validated here.

    x: (T, B, I), or ragged (total, I) with cu_seqlens (B+1,). state: h_0, or h_0 and c_0, each (L*D, B, H); with
    proj_size P, h_0 is (L*D, B, P). params: as torch.nn.LSTM.parameters(). lengths: (B,), each 0 to T, or None for T.
    reset: bool (T, B) or (total,). The state before that step is reset_state, or zeros. Direction 1, which comes from
    the other side, takes it after that step. reset_state: as state, each broadcastable to (L*D, B, H), or one a
    step: (T, L*D, B, H), ragged (total, L*D, 1, H). Dtypes and derivatives are those of torch's kernel.

    Returns output (T, B, D*H) or (total, D*H), with 0 in padding, and the final states, shaped as state. A row of
    length 0 keeps its state. Third, c_t of the last layer, shaped as output, for an LSTM with cell_states; else None.

    >>> import torch
    >>> from fastrnn.stack import Stack
    >>> from fastrnn.torch_path import segments
    >>> gru, x, h_0 = torch.nn.GRU(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    >>> reset = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]).bool()  # row 0 begins anew at t = 2
    >>> y, _, _ = segments.run(Stack("gru"), x, (h_0,), list(gru.parameters()), reset=reset)
    >>> torch.allclose(y[2:, 0], gru(x[2:, 0])[0], atol=1e-6)
    True
    """
    D, B, num_layers, bias = stack.directions, state[0].shape[1], stack.num_layers, stack.bias
    segments = _cut(x, B, D, lengths, cu_seqlens, reset)
    resets = reset_state or (None,) * len(state)
    initial = [_initial(segments, s, r) for s, r in zip(state, resets, strict=True)]
    per_layer = len(params) // num_layers

    def layers(source: Tensor, first: int, last: int) -> tuple[Tensor, State]:
        of_these = params[first * per_layer : last * per_layer]
        these = stack._replace(num_layers=last - first)
        of_these = packed.on_its_own(of_these, bias) if apart else of_these
        return packed.run(
            these, source, segments.batch_sizes, tuple(s[first * D : last * D] for s in initial), of_these
        )

    source = (x if cu_seqlens is not None else x.flatten(0, 1)).index_select(0, segments.places)
    below: State = ()
    apart = num_layers - 1 if cell_states else 0  # the last layer: its cell states need its input
    if apart:
        source, below = layers(source, 0, apart)
        source = dropout(source, stack.dropout, stack.training)
    y, finals = layers(source, apart, num_layers)
    if below:
        finals = tuple(torch.cat(parts) for parts in zip(below, finals, strict=True))

    def placed(steps: Tensor, places: Tensor) -> Tensor:
        """(T, B, ...) or (total, ...) with the steps (M, ...) in their places."""
        everything = steps.new_zeros(x.shape[:-1].numel(), steps.shape[-1])
        return everything.index_copy(0, places, steps).view(*x.shape[:-1], steps.shape[-1])

    c = None
    if cell_states:
        by_direction = _cell_states(segments, source, y, [s[-D:] for s in initial], params[-per_layer:], bias)
        walks = zip(by_direction, segments.walks, strict=True)
        c = torch.cat([placed(c_d, segments.places[walk.packed]) for c_d, walk in walks], -1)
    final = tuple(_final(segments, s, of_segments) for s, of_segments in zip(state, finals, strict=True))
    return placed(y, segments.places), final, c


def _cut(
    x: Tensor, B: int, D: int, lengths: Tensor | None, cu_seqlens: Tensor | None, reset: Tensor | None
) -> Segments:
    """Cut B rows into segments, in the order that torch's kernel requires: the longest first."""
    device = x.device
    if cu_seqlens is not None:
        lengths = cu_seqlens.to(device).diff()
        places = torch.arange(x.shape[0], device=device)
        row = torch.arange(B, device=device).repeat_interleave(lengths)
        t = places - cu_seqlens.to(device)[row]
        when = places  # the index into reset: a time, or in a ragged batch a place
    else:
        T = x.shape[0]
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device)
        row, t = (torch.arange(T, device=device) < lengths[:, None]).nonzero(as_tuple=True)
        places = t * B + row
        when = t
    # Now all real steps (M,) are listed row by row. A segment begins at a row's start and at resets.
    M = row.shape[0]
    begins = t == 0
    resets = torch.zeros_like(begins) if reset is None else reset.to(device).flatten()[places]
    cut = begins | resets
    first = cut.nonzero().squeeze(1)
    of_step = cut.cumsum(0) - 1
    sizes = torch.cat([first, first.new_tensor([M])]).diff()
    sizes, by_size = sizes.sort(descending=True, stable=True)
    first = first[by_size]
    last = first + sizes - 1

    # A packed batch lists step 0 of all segments, then step 1 of those that have it, and so on.
    S = first.shape[0]
    batch_sizes = S - sizes.bincount(minlength=2).cumsum(0)[:-1]
    rank = torch.empty_like(by_size).index_copy(0, by_size, torch.arange(S, device=device))
    step = torch.arange(M, device=device) - first[rank[of_step]]
    packed = (batch_sizes.cumsum(0) - batch_sizes)[step] + rank[of_step]

    rows = row[first]
    at_start, at_end = begins[first], t[last] + 1 == lengths[rows]
    walks = (Walk(packed, first, at_start & ~resets[first], when[first], at_end),)
    if D == 2:
        walks += (Walk(packed.flip(0), M - 1 - last, at_end, when[last] + 1, at_start),)
    return Segments(rows, torch.empty_like(places).index_copy(0, packed, places), batch_sizes.cpu(), walks)


def _initial(segments: Segments, hx: Tensor, reset_state: Tensor | None) -> Tensor:
    """First states (L*D, S, H) of the segments."""
    D = len(segments.walks)
    states = []
    for d, walk in enumerate(segments.walks):
        of_rows = hx[d::D].index_select(1, segments.rows)
        if reset_state is None:
            other: Tensor | float = 0.0
        else:
            per_step = reset_state if reset_state.dim() == 4 else reset_state.unsqueeze(0)
            per_step = per_step.expand(-1, hx.shape[0], -1, hx.shape[2])[:, d::D]
            # Do not expand broadcast states: their gradient would be as large as the expanded tensor.
            when = walk.resets.clamp(max=per_step.shape[0] - 1)
            other = per_step[when, :, segments.rows.clamp(max=per_step.shape[2] - 1)].transpose(0, 1)
        states.append(torch.where(walk.from_hx[:, None], of_rows, other))
    return torch.stack(states, 1).flatten(0, 1)


def _final(segments: Segments, hx: Tensor, of_segments: Tensor) -> Tensor:
    """Final states (L*D, B, H) of the rows, from those of their segments (L*D, S, H)."""
    D = len(segments.walks)
    states = []
    for d, walk in enumerate(segments.walks):
        which = walk.finals.nonzero().squeeze(1)
        own = hx[d::D].to(of_segments.dtype)  # a row of length 0 keeps this
        states.append(own.index_copy(1, segments.rows[which], of_segments[d::D].index_select(1, which)))
    return torch.stack(states, 1).flatten(0, 1)


def _cell_states(
    segments: Segments, x: Tensor, y: Tensor, initial: Sequence[Tensor], params: Sequence[Tensor], bias: bool
) -> list[Tensor]:
    """c_t (M, H) of one layer for each direction, in the order of its walk. x (M, I) and y (M, D*H) are packed."""
    D = len(segments.walks)
    states = []
    for d, (walk, h) in enumerate(zip(segments.walks, y.chunk(D, -1), strict=True)):
        W_ih, W_hh, *b = params[d * len(params) // D : (d + 1) * len(params) // D]
        b_ih, b_hh = b[:2] if bias else (None, None)
        ifg = 3 * W_hh.shape[0] // CELLS["lstm"].gates  # c needs the rows of i, f and g; o comes last
        h_0, c_0 = (s[d].to(y.dtype) for s in initial)
        h_prev = h.index_select(0, walk.packed).roll(1, 0).index_copy(0, walk.starts, h_0)
        gates = linear(x.index_select(0, walk.packed), W_ih[:ifg], None if b_ih is None else b_ih[:ifg])
        gates = gates + linear(h_prev, W_hh[:ifg], None if b_hh is None else b_hh[:ifg])
        # Multiply many f in fp32 at least: the kernels carry c in fp32 too.
        i, f, g = (gates.float() if gates.dtype.itemsize == 2 else gates).chunk(3, -1)
        i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
        added = (i * g).index_add(0, walk.starts, f.index_select(0, walk.starts) * c_0.to(f.dtype))
        restarts = torch.zeros_like(walk.packed, dtype=torch.bool).index_fill(0, walk.starts, 1)
        states.append(_Scan.apply(f, added, restarts[:, None]).to(y.dtype))
    return states


class _Scan(torch.autograd.Function):
    """c_t = f_t c_{t-1} + b_t over all segments, end to end. Where a segment starts, c_t = b_t. f and b are (M, H).

    Backward is the same scan from the end, so it is differentiable too:

        db_t = dc_t + f_{t+1} db_{t+1},  df_t = db_t c_{t-1}

    starts (M, 1) is a mask. It is never multiplied, so that a NaN stays in its segment.
    """

    @staticmethod
    def forward(f: Tensor, b: Tensor, starts: Tensor) -> Tensor:
        return _scan(f, b, starts)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        f, _, starts = inputs
        ctx.save_for_backward(f, starts, output)

    @staticmethod
    def backward(ctx, dc: Tensor) -> tuple[Tensor, Tensor, None]:
        f, starts, c = ctx.saved_tensors
        # roll makes the first step follow the last. It starts a segment too, so nothing passes over.
        db = _Scan.apply(f.roll(-1, 0).flip(0), dc.flip(0), starts.roll(-1, 0).flip(0)).flip(0)
        return (db * c.roll(1, 0)).masked_fill(starts, 0), db, None


def _scan(f: Tensor, b: Tensor, starts: Tensor) -> Tensor:
    """Scan pairs of steps, which is half as long and gives c after each pair. One more step gives c inside pairs."""
    if b.shape[0] < 2:
        return b.clone()

    def after(c_prev: Tensor, which: slice) -> Tensor:
        return torch.where(starts[which], b[which], torch.addcmul(b[which], f[which], c_prev))

    firsts, seconds, others = slice(0, b.shape[0] // 2 * 2, 2), slice(1, None, 2), slice(2, None, 2)
    c = torch.empty_like(b)
    c[seconds] = _scan(f[firsts] * f[seconds], after(b[firsts], seconds), starts[firsts] | starts[seconds])
    c[0] = b[0]
    c[others] = after(c[1:-1:2], others)
    return c
