"""The settings of a module, in one record that all paths receive."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, Cell
from .kernels.arguments import NO_CLIP, PLAIN_STEPS


class Stack(NamedTuple):
    """Stacked layers of a cell: torch.nn's arguments, and how our backends should run them."""

    cell: str
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    backend: str = "auto"
    checkpoint_every: int | None = None  # steps of a chunk
    num_heads: int = 1  # N, the number of blocks of W_hh
    clip_grad_state: float | None = None
    clip_state: float | None = None
    tie_directions: bool = False  # both directions share one set of parameters
    drop_connect: float = 0.0
    zoneout: float = 0.0

    @property
    def of_cell(self) -> Cell:
        return CELLS[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def states(self) -> int:
        """How many states a call takes and returns. h is the first."""
        return len(CELLS[self.cell].states)

    @property
    def of_torch(self) -> bool:
        """Whether torch has a kernel for such layers."""
        return self.of_cell.of_torch and self.num_heads == 1 and self.each_step == PLAIN_STEPS

    def of_each_direction(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Repeat tied parameters, which are those of one direction, for each direction."""
        count = len(params) // self.num_layers
        layers = [params[i : i + count] for i in range(0, len(params), count)]
        return [param for of_layer in layers for param in (*of_layer, *of_layer)]

    @property
    def each_step(self) -> tuple[float, float, float]:
        """The clips of gradient and state, and zoneout, as the ops take them (kernels/arguments.py)."""
        gradient, state = self.clip_grad_state, self.clip_state
        return NO_CLIP if gradient is None else gradient, NO_CLIP if state is None else state, self.zoneout

    @property
    def dropped(self) -> float:
        """The share of a layer's output that dropout removes in this call."""
        return self.dropout if self.training else 0.0

    @property
    def drops_connections(self) -> bool:
        """Whether this call drops elements of W_hh."""
        return self.training and bool(self.drop_connect)

    @property
    def zones_out(self) -> bool:
        """Whether units keep their h at random in this call."""
        return self.training and bool(self.zoneout)

    def hidden(self, state: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """A state in torch's form: one tensor, or the LSTM's pair."""
        return state[0] if len(state) == 1 else state

    def torch_kernel(self, *sequences: Tensor, state: tuple[Tensor, ...], params: list[Tensor]) -> tuple[Tensor, ...]:
        """Run torch's own kernel, on dense input or on packed data and batch sizes. Return output and final states."""
        kernel = getattr(torch._VF, self.cell)
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if len(sequences) == 2:
            return kernel(*sequences, self.hidden(state), params, *options)
        return kernel(*sequences, self.hidden(state), params, *options, self.batch_first)
