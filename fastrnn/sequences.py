"""Sequences with their own lengths, and resets inside them, in the form that recurrences take.

A slot is the place of one time step of one sequence. In tensors (T, B, ...) it is t * B + b, and in ragged tensors
(total, ...) the start of sequence b, plus t. A segment begins at the start of a sequence or at a reset. Segments do not
see each other: in both directions the state starts anew at the *edge* before the later segment's first step. No code
here waits for a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """A decorator for functions that read values on the CPU: torch.compile breaks the graph at them."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def stops_at_torchs_kernels() -> bool:
    """Whether torch.compile is tracing and should break the graph before torch's own kernels.

    Where torch traces these kernels, it unrolls time in Python, for minutes, and it cannot train the LSTM in float32 on
    CPU tensors. The setting is torch's own for torch.nn's layers, torch._dynamo.config.allow_rnn. torch.export sets it.
    """
    return torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn


class Sequences(NamedTuple):
    """Where sequences begin and end, and where they are reset.

    rows (3, B) int64 has for each sequence its index, first slot and length, the longest first. None: all have T steps.
    reset is bool by slot, or None.
    """

    rows: Tensor | None
    reset: Tensor | None

    @staticmethod
    def of(
        T: int, B: int, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None, reset: Tensor | None = None
    ) -> "Sequences | None":
        """Make the table from lengths (B,) of a dense batch (T, B), or from cu_seqlens (B + 1,) of a ragged one.

        None if there are no lengths and no resets.

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
        """Make the same table from a tensor on the CPU, or return None if its values are wrong.

        NumPy is done before torch's operators would have begun, and a GPU gets one copy.
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
        """The part from time `first` to `first + T` of dense sequences, in direction 0."""
        rows, reset = self
        if rows is not None:
            rows = torch.stack((*rows[:2], (rows[2] - first).clamp(0, T)))
        return Sequences(rows, None if reset is None else reset[first : first + T])


class Window(NamedTuple):
    """Where the sequences of one layer end and start anew in a Step's time, and the states that they start from."""

    sequences: Sequences | None = None
    starts: tuple[Tensor, ...] | None = None  # the states after resets, each (D, B, H), or by step (T, B, D, H)
    by_step: bool = False
    projected: Tensor | None = None  # in a projected layer, h (size P) after resets; starts then has zeros for m
    all_steps: bool = False  # whether the states of all steps are wanted
    noise: Tensor | None = None  # zoneout in training (noise.py)

    def of_times(self, first: int, T: int) -> "Window":
        """The part from time `first` to `first + T`, in direction 0."""
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
    """For every slot the time t and the length of its sequence. `spread` gives every slot its sequence's state."""

    t: Tensor
    length: Tensor
    sequence: Tensor | None  # None for (T, B): states broadcast over time
    count: int  # B

    @staticmethod
    def of(rows: Tensor | None, shape: torch.Size, device: torch.device) -> "Slots":
        """Make the slots of a table. shape is (T, B) or (total,)."""
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
        """The state (B, ...) of its sequence, for every slot."""
        return state if self.sequence is None else state[self.sequence]

    def carried(self, direction: int) -> Tensor:
        """Whether the sequence has a step before the slot's, in this direction."""
        return self.t > 0 if direction == 0 else self.t + 1 < self.length

    def restart(self, reset: Tensor, direction: int) -> Tensor:
        """Whether there is a reset between the slot's step and the one before."""
        inside = self.live if direction == 0 else self.t + 1 < self.length
        return at_edges(reset, direction) & inside

    def summed(self, by_step: Tensor) -> Tensor:
        """Sum (slots, ...) over each sequence to (B, ...), in a fixed order. 16-bit values are summed in fp32."""
        wide = by_step if by_step.dtype.itemsize > 2 else by_step.float()
        if self.sequence is None:
            return wide.sum(0)
        lengths = self.length.new_zeros(self.count).index_put((self.sequence,), self.length)
        return torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True)


def at_edges(by_step: Tensor, direction: int) -> Tensor:
    """Move values from the first steps of segments to the slots where a direction begins these segments."""
    return by_step if direction == 0 else by_step.roll(-1, 0)


def states_before(
    direction: int, states: Tensor, state_0: Tensor, sequences: Sequences, start: Tensor | None, by_step: bool
) -> Tensor:
    """The state before every step of one direction, (T, B, H) or (total, H), from the states after the steps.

    state_0 is (B, H). start has the states after resets: (B, H), or by_step shaped like states, or None for zeros. The
    result is zero in frozen slots: it is multiplied there by gradients that are zero, and 0 * NaN would be NaN.
    """
    slots = Slots.of(sequences.rows, states.shape[:-1], states.device)
    before = states.roll(1 if direction == 0 else -1, 0)
    before = torch.where(slots.carried(direction)[..., None], before, slots.spread(state_0))
    if sequences.rows is not None and slots.sequence is None:  # a ragged batch has no frozen slots
        before = before.masked_fill(~slots.live[..., None], 0)
    if sequences.reset is None:
        return before
    restart = slots.restart(sequences.reset, direction)[..., None]
    if start is None:
        return before.masked_fill(restart, 0)
    return torch.where(restart, at_edges(start, direction) if by_step else slots.spread(start), before)


class Packing(NamedTuple):
    """How to reorder a PackedSequence into the ragged form of the same sequences, in its sorted order, and back."""

    cu_seqlens: Tensor  # (B + 1,)
    slot: Tensor  # (total,): the place of each ragged slot in the packed data
    packed: Tensor  # (total,): the inverse

    @staticmethod
    @untraced
    def of(sequence: PackedSequence) -> "Packing":
        """Make the orders from batch_sizes, which are on the CPU. Nothing waits for a device.

        >>> import torch
        >>> from fastrnn.sequences import Packing
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
        >>> packing = Packing.of(packed)
        >>> packed.data[packing.slot].tolist(), packing.cu_seqlens.tolist()
        ([1, 2, 3, 4, 5], [0, 3, 5])
        """
        sizes, total = sequence.batch_sizes, len(sequence.data)
        B = int(sizes[0])
        # Batch t has the sequences longer than t, longest first. Sequence b is in all batches with more than b rows.
        lengths = len(sizes) - torch.searchsorted(sizes.flip(0).contiguous(), torch.arange(B), right=True)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(B), lengths)
        step = torch.arange(total) - cu_seqlens[row]
        slot = (sizes.cumsum(0) - sizes)[step] + row
        packed = torch.empty_like(slot)
        packed[slot] = torch.arange(total)
        return Packing(*(t.to(sequence.data.device, non_blocking=True) for t in (cu_seqlens, slot, packed)))
