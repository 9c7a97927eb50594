"""sLSTM cells of the packages xlstm and tirex-ts: after convert, our kernels run their recurrence.

Such a cell takes the input products of the gates and the state before, one tensor (4, B, H) of h, c, n and m. The
package's code around a cell (projections, convolution, norm) is unchanged, and so are parameters and their layouts. The
packages are never imported here. Their classes are found by name, if the process has imported them.

Source: xlstm/blocks/slstm/cell.py of xlstm 2.0.6, tirex/models/slstm/cell.py of tirex-ts 1.4.2.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS, SLSTM_CAPPED
from ..ops import layer
from ..planning.planner import Plan
from ..sequences import PLAIN, Window
from ..stack import Stack
from . import calls, layers
from .validation import compute_dtype


class Foreign:
    """Base of the classes for other packages' cells. convert derives a class from one of these and from the cell's own.

    The cell computes in its input's dtype, or in autocast's. Its state is float32 beside 16 bits, where the package
    rounds.
    """

    config: Any
    _recurrent_kernel_: Tensor
    _bias_: Tensor
    _permute_output: Any  # the package's: (T, B, H) to the form that its forward returns
    fastrnn_backend: str
    fastrnn_checkpoint_every: int | None
    _cell = "slstm"

    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_hh (N, G*K, K) and b_hh (N, G*K) for N heads, as functions of the cell's parameters."""
        raise NotImplementedError

    @staticmethod
    def _shape_of_kernel(N: int, G: int, K: int) -> tuple[int, ...]:
        """The expected shape of _recurrent_kernel_."""
        return N, G * K, K

    @staticmethod
    def _why_left(config: Any) -> str:
        """Why convert leaves a cell with this config as it is; empty if it converts it."""
        return ""

    def _time_first(self, input: Tensor) -> Tensor:
        """The cell's input as (T, B, G*N*K)."""
        return input.transpose(0, 1)

    def _clip_grad_state(self) -> float | None:
        """As clip_grad_state in fastrnn.SLSTM."""
        return None

    def _stack(self) -> Stack:
        return Stack(
            self._cell, backend=self.fastrnn_backend, checkpoint_every=self.fastrnn_checkpoint_every,
            num_heads=self.config.num_heads, clip_grad_state=self._clip_grad_state(),
        )  # fmt: skip

    def plan(self, input: Tensor) -> Plan:
        """Return the plan that forward(input) follows."""
        x, (N, _, K) = self._time_first(input), _heads(self.config)
        return calls.planned(self._stack(), N * K, x.shape[0], x.shape[1], x)

    def _run(self, input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run input (B, T, G*N*K), gate by gate, from state (4, B, H). Return the package's output and state."""
        N, G, K = _heads(self.config)
        if input.dim() != 3 or input.shape[-1] != N * G * K:
            got = tuple(input.shape)
            raise ValueError(f"input: expected three dimensions, with {N * G * K} for {G} gates in the last; got {got}")
        x = self._time_first(input)
        x_gates = x.unflatten(-1, (G, N, K)).transpose(2, 3).flatten(2)  # head by head, as kernels read it
        expected = (4, x.shape[1], N * K)
        if state is not None and state.shape != expected:
            raise ValueError(f"state: expected {expected}, got {tuple(state.shape)}")
        y, state = _recurrence(self._stack(), x_gates, self._weights(), state)
        return self._permute_output(y), state


def _heads(config: Any) -> tuple[int, int, int]:
    """N, G and K of a config."""
    return config.num_heads, config.num_gates, config.head_dim


class OfXLSTM(Foreign):
    """xlstm's cell in plain torch, backend="vanilla": its recurrent kernel is (N, G*K, K), its bias flat (G, N, K)."""

    def forward(self, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Run over all of time, as xlstm's forward, which does not read lengths."""
        return self._run(input, state)

    def _weights(self) -> tuple[Tensor, Tensor]:
        N, G, K = _heads(self.config)
        return self._recurrent_kernel_, self._bias_.view(G, N, K).transpose(0, 1).flatten(1)

    def _time_first(self, input: Tensor) -> Tensor:
        return input if self.config.input_shape == "SBGNH" else input.transpose(0, 1)

    @staticmethod
    def _why_left(config: Any) -> str:
        function = config.function
        return "" if function == "slstm" else f"its function is {function!r}, and fastrnn runs only 'slstm'"


class OfXLSTMsCuda(OfXLSTM):
    """xlstm's cell in CUDA, backend="cuda": its recurrent kernel is (N, K, G*K), and its bias flat (N, G, K)."""

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self._recurrent_kernel_.mT, self._bias_.view(self.config.num_heads, -1)

    def _clip_grad_state(self) -> float | None:
        """Its CUDA kernels clip this gradient. xlstm's cell in plain torch does not."""
        return 0.0 if self.config.gradient_recurrent_cut else self.config.gradient_recurrent_clipval

    @staticmethod
    def _shape_of_kernel(N: int, G: int, K: int) -> tuple[int, ...]:
        return N, K, G * K

    @staticmethod
    def _why_left(config: Any) -> str:
        clip = config.gradient_recurrent_clipval
        if clip is not None and clip < 1:  # h is between -1 and 1
            return "its kernel clips h too, at a gradient_recurrent_clipval below 1"
        return OfXLSTM._why_left(config)


class OfTiRex(Foreign):
    """TiRex's cell, of either backend: its recurrent kernel is (N, K, G*K), its bias flat (N, G, K), and f at most 15.

    TiRex computes in bfloat16, whatever the input's dtype.
    """

    _cell = SLSTM_CAPPED.name

    def forward(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over all of time, as TiRex's forward."""
        return self._run(input, state)

    def _weights(self) -> tuple[Tensor, Tensor]:
        return self._recurrent_kernel_.mT, self._bias_.view(self.config.num_heads, -1)

    @staticmethod
    def _shape_of_kernel(N: int, G: int, K: int) -> tuple[int, ...]:
        return N, K, G * K

    def _stack(self) -> Stack:
        if self._cell not in CELLS:  # a process that loaded the model by pickle never ran convert
            CELLS[self._cell] = SLSTM_CAPPED
        return super()._stack()


# Our classes by the module and name of the package's class.
_KNOWN: dict[tuple[str, str], type[Foreign]] = {
    ("xlstm.blocks.slstm.cell", "sLSTMCell_vanilla"): OfXLSTM,
    ("xlstm.blocks.slstm.cell", "sLSTMCell_cuda"): OfXLSTMsCuda,
    ("tirex.models.slstm.cell", "sLSTMCell"): OfTiRex,
}


def known() -> dict[type, type]:
    """The other packages' classes that this process has imported, each with our class for it."""
    found = {(module, name): getattr(sys.modules.get(module), name, None) for module, name in _KNOWN}
    return {theirs: _KNOWN[key] for key, theirs in found.items() if isinstance(theirs, type)}


def why_left(ours: type[Foreign], cell: Any, backend: str) -> str:
    """Why a cell of another package stays as it is; empty if it is converted."""
    if backend == "torch":
        return "torch has no kernel for the sLSTM"
    if why := ours._why_left(cell.config):
        return why
    N, G, K = _heads(cell.config)
    expected, found = ours._shape_of_kernel(N, G, K), tuple(cell._recurrent_kernel_.shape)
    return "" if found == expected else f"its recurrent kernel is {found}, and fastrnn expects {expected}"


def _recurrence(
    stack: Stack, x_gates: Tensor, weights: tuple[Tensor, Tensor], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run x_gates (T, B, N*G*K), head by head, from state (P, B, H) or None. Return y (T, B, H) and the state after."""
    dtype = compute_dtype(x_gates)
    (T, B, _), (N, _, K), every = x_gates.shape, weights[0].shape, stack.checkpoint_every
    wide = stack.of_cell.state_dtype(dtype)
    before = x_gates.new_zeros(stack.states, B, N * K, dtype=wide) if state is None else state.to(wide)
    if T == 0:
        return x_gates.new_empty(0, B, N * K, dtype=dtype), before
    first = layers.State(None if state is None and not every else before.unsqueeze(1).unbind())
    of_layer = layers.weights_of(weights, dtype, chunked=every is not None)
    x = x_gates.to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        backend = calls.backend_of(calls.planned(stack, N * K, T, B, x))
        step: layers.Step = functools.partial(_step, stack, backend, of_layer)
        step = layers.recomputed(step) if every else step
        y, after, _ = layers.in_chunks(step, x, first, every or T, 1)
        return y, torch.cat(after.states)

    return calls.until_launched(stack.backend, run)


def _step(
    stack: Stack, backend: str, weights: layers.Weights, xs: layers.Inputs, state: layers.State, window: Window = PLAIN
) -> tuple[Tensor, layers.State, tuple[Tensor, ...] | None]:
    """A Step whose input is x_gates already, because the package computes the input's product."""
    W_hh, b_hh = weights()
    run = layers.by_reference if backend == "reference" else layer.by_op
    y, finals, steps = run(
        layers.layer_of(stack, backend), xs[0], (None, None, None), ([W_hh], [b_hh]), state.states, window
    )
    return y, layers.State(finals), steps
