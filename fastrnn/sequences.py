"""Sequences of their own lengths, and resets inside them: the form in which recurrences take them.

A slot is the place of one time step of one sequence: in tensors (T, B, ...) slot t * B + b, in ragged ones (total, ...)
the start of sequence b, plus t. Segments, which begin where a sequence does and at resets, do not see each other: in
either direction the state starts anew at the *edge* before the later one's first step. Nothing here waits for a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Left alone by torch.compile, which breaks the graph there: what depends on values that are on the CPU."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def stops_at_torchs_kernels() -> bool:
    """Whether torch.compile is tracing and should break the graph before a kernel of torch's, as at torch.nn's layers.

    Where torch traces these it walks time in Python, for minutes, and in float32 on CPU tensors cannot train the LSTM.
    torch's own setting for torch.nn's layers holds for ours; torch.export sets it.
    """
    return torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn


class Sequences(NamedTuple):
    """rows (3, B) int64: sequences, their first slots and lengths, longest first; None where all have T steps.

    reset: bool by slot, or None.
    """

    rows: Tensor | None
    reset: Tensor | None

    @staticmethod
    def of(
        T: int, B: int, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None, reset: Tensor | None = None
    ) -> "Sequences | None":
        """From lengths (B,) of a dense batch (T, B), or cu_seqlens (B + 1,) of a ragged one; None if all is plain.

        >>> import torch
        >>> from fastrnn.sequences import Sequences
        >>> Sequences.of(5, 2, lengths=torch.tensor([3, 5])).rows.tolist()
        [[1, 0], [1, 0], [5, 3]]
        >>> Sequences.of(0, 2, cu_seqlens=torch.tensor([0, 3, 8])).rows.tolist()
        [[1, 0], [3, 0], [5, 3]]
        """
        if lengths is None and cu_seqlens is None:
            return None if reset is None else Sequences(None, reset)
        if lengths is not None:
            length, start = lengths.long().clamp(0, T).sort(descending=True, stable=True)
            sequence = start
        else:
            length, sequence = cu_seqlens.diff().long().sort(descending=True, stable=True)  # type: ignore[union-attr]
            start = cu_seqlens[:-1].long()[sequence]  # type: ignore[index]
        return Sequences(torch.stack((sequence, start, length)), reset)

    @staticmethod
    def rows_on_host(lengths: Tensor | None, cu_seqlens: Tensor | None, T: int) -> Tensor | None:
        """The same table, of a tensor on the CPU; None if its values are wrong.

        NumPy sorts sooner than torch's operators begin, and a GPU gets one copy.
        """
        if cu_seqlens is not None:
            first = cu_seqlens.numpy()
            if first[0] != 0 or first[-1] != T:
                return None
            length = first[1:] - first[:-1]
        else:
            first, length = None, lengths.numpy()  # type: ignore[union-attr]
        order = (~length).argsort(kind="stable")  # ~n is -n - 1, which cannot overflow
        sorted_ = length[order]
        if len(order) and not 0 <= sorted_[-1] <= sorted_[0] <= T:
            return None
        return torch.from_numpy(np.array((order, order if first is None else first[order], sorted_), np.int64))

    def window(self, first: int, T: int) -> "Sequences":
        """Of times first to first + T of dense sequences in direction 0."""
        rows, reset = self
        if rows is not None:
            rows = torch.stack((*rows[:2], (rows[2] - first).clamp(0, T)))
        return Sequences(rows, None if reset is None else reset[first : first + T])


class Window(NamedTuple):
    """Where sequences end and start anew in the time of a Step, and the state that they start from, of one layer."""

    sequences: Sequences | None = None
    starts: tuple[Tensor, ...] | None = None  # what states start from, (D, B, H) each, or by step (T, B, D, H)
    by_step: bool = False
    projected: Tensor | None = None  # of a projected layer, h (size P) in the place of states of size H
    all_steps: bool = False  # the states of all steps are wanted
    noise: Tensor | None = None  # of zoneout in training (noise.py)

    def of_times(self, first: int, T: int) -> "Window":
        """Its part from a time on, in direction 0."""
        if self.sequences is None:
            return self
        window = self._replace(sequences=self.sequences.window(first, T))
        if not self.by_step or self.starts is None:
            return window
        projected = None if self.projected is None else self.projected[first : first + T]
        starts = tuple(start[first : first + T] for start in self.starts)
        return window._replace(starts=starts, projected=projected)


PLAIN = Window()


class Slots(NamedTuple):
    """By slot: the t and the length of its sequence, and how to spread states (B, ...) over slots."""

    t: Tensor
    length: Tensor
    sequence: Tensor | None  # None for (T, B): states broadcast over time
    count: int  # B

    @staticmethod
    def of(rows: Tensor | None, shape: torch.Size, device: torch.device) -> "Slots":
        """shape: (T, B), or (total,)."""
        if rows is None:
            T, B = shape
            return Slots(torch.arange(T, device=device)[:, None], torch.full((B,), T, device=device), None, B)
        B = rows.shape[1]
        _, start, length = rows[:, rows[0].argsort()]
        if len(shape) == 2:
            return Slots(torch.arange(shape[0], device=rows.device)[:, None], length, None, B)
        sequence = torch.repeat_interleave(
            torch.arange(rows.shape[1], device=rows.device), length, output_size=shape[0]
        )
        return Slots(
            torch.arange(shape[0], device=rows.device) - start[sequence], length[sequence], sequence, rows.shape[1]
        )

    @property
    def live(self) -> Tensor:
        return self.t < self.length

    def spread(self, state: Tensor) -> Tensor:
        """A state (B, ...) for every slot of its sequence."""
        return state if self.sequence is None else state[self.sequence]

    def carried(self, direction: int) -> Tensor:
        """Whether the sequence has a step before a slot's, in this direction."""
        return self.t > 0 if direction == 0 else self.t + 1 < self.length

    def restart(self, reset: Tensor, direction: int) -> Tensor:
        """Whether a reset comes between the step before a slot's and its own."""
        inside = self.live if direction == 0 else self.t + 1 < self.length
        return at_edges(reset, direction) & inside

    def summed(self, by_step: Tensor) -> Tensor:
        """(slots, ...) summed over each sequence in a fixed order, 16 bits in fp32: (B, ...)."""
        wide = by_step if by_step.dtype.itemsize > 2 else by_step.float()
        if self.sequence is None:
            return wide.sum(0)
        lengths = self.length.new_zeros(self.count).index_put((self.sequence,), self.length)
        return torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True)


def at_edges(by_step: Tensor, direction: int) -> Tensor:
    """What is given at the first steps of segments, by slot, moved to where a direction begins a segment."""
    return by_step if direction == 0 else by_step.roll(-1, 0)


def states_before(
    direction: int, states: Tensor, state_0: Tensor, sequences: Sequences, start: Tensor | None, by_step: bool
) -> Tensor:
    """The state before every step of one direction, (T, B, H) or (total, H), from those after it.

    state_0 (B, H); start, what states start anew from at resets: (B, H), or by_step like states, or None for zeros. In
    frozen slots the result is zero, since gradients that are zero there are multiplied by it, and 0 * NaN is NaN.
    """
    slots = Slots.of(sequences.rows, states.shape[:-1], states.device)
    before = states.roll(1 if direction == 0 else -1, 0)
    before = torch.where(slots.carried(direction)[..., None], before, slots.spread(state_0))
    if sequences.rows is not None and slots.sequence is None:  # ragged slots are none of them frozen
        before = before.masked_fill(~slots.live[..., None], 0)
    if sequences.reset is None:
        return before
    restart = slots.restart(sequences.reset, direction)[..., None]
    if start is None:
        return before.masked_fill(restart, 0)
    return torch.where(restart, at_edges(start, direction) if by_step else slots.spread(start), before)


class Packing(NamedTuple):
    """How a PackedSequence stands to the ragged form of the same sequences, in its sorted order."""

    cu_seqlens: Tensor  # (B + 1,)
    slot: Tensor  # (total,): where in the packed data each ragged slot is
    packed: Tensor  # (total,): and the other way round

    @staticmethod
    @untraced
    def of(sequence: PackedSequence) -> "Packing":
        """From batch_sizes, which are on the CPU; nothing waits for a device.

        >>> import torch
        >>> from fastrnn.sequences import Packing
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
        >>> packing = Packing.of(packed)
        >>> packed.data[packing.slot].tolist(), packing.cu_seqlens.tolist()
        ([1, 2, 3, 4, 5], [0, 3, 5])
        """
        sizes, total = sequence.batch_sizes, len(sequence.data)
        B = int(sizes[0])
        # A sequence is in the batches of the first steps: as many as there are with more rows than its place.
        lengths = len(sizes) - torch.searchsorted(sizes.flip(0).contiguous(), torch.arange(B), right=True)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(B), lengths)
        step = torch.arange(total) - cu_seqlens[row]
        slot = (sizes.cumsum(0) - sizes)[step] + row
        packed = torch.empty_like(slot)
        packed[slot] = torch.arange(total)
        return Packing(*(t.to(sequence.data.device, non_blocking=True) for t in (cu_seqlens, slot, packed)))
