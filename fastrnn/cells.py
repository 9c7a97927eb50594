"""The cells: one record each of what the reference, the planner, the op and the kernels know of a cell.

    RNN     h' = act(x + rec)
    GRU     r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)
    LSTM    i, f, o = sigmoid(x + rec),  g = tanh(x_g + rec_g),  c' = f c + i g,  h' = o tanh(c')
    sLSTM   a = x_i + rec_i,  b = m + logsigmoid(x_f + rec_f),  m' = max(a, b), but a where n is 0,
            i = min(1, exp(a - m')),  f = min(1, exp(b - m')),  z = tanh(x_z + rec_z),  o = sigmoid(x_o + rec_o),
            c' = f c + i z,  n' = f n + i,  h' = o c' / n'

with x = W_ih x_t + b_ih and rec = W_hh h + b_hh, gates in torch's row order, the sLSTM's i, f, z, o. `register` adds a
cell of your own: docs/writing-a-cell.md shows how one is written and tested; examples/mgu.py is one, in one file.

Source: the equations in the documentation of torch.nn.RNN, torch.nn.GRU and torch.nn.LSTM; Beck et al. 2024
(arXiv:2405.04517) for the sLSTM.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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


def slstm_step(x: Tensor, rec: Tensor, state: State) -> State:
    """m only rescales c and n, so that exp cannot overflow: no gradient goes through it, nor is one lost at min()."""
    _, c, n, m = state
    i, f, z, o = (x + rec).unbind(-2)
    carried = m.detach() + torch.nn.functional.logsigmoid(f)
    m = torch.where(n == 0, i, torch.maximum(i, carried)).detach()
    i, f = _exp_below_1(i - m), _exp_below_1(carried - m)
    c, n = f * c + i * z.tanh(), f * n + i
    return o.sigmoid() * c / n, c, n, m


def slstm_capped_step(x: Tensor, rec: Tensor, state: State) -> State:
    """With f at most 15, as TiRex has it: what it forgets never rounds to nothing."""
    i, f, z, o = (x + rec).unbind(-2)
    gates = torch.stack((i, f.clamp(max=15.0), z, o), -2)
    return slstm_step(gates, torch.zeros_like(gates), state)


def _exp_below_1(x: Tensor) -> Tensor:
    """min(1, exp(x)), with the gradient of exp(x) also where it is 1."""
    return (x - x.detach().relu()).exp()


@dataclass(frozen=True)
class Cell:
    """What is known of a cell, everywhere."""

    name: str
    gates: int  # G, blocks of H rows in W_ih and W_hh
    step: CellStep  # the specification
    saved: int  # tiles a step that the forward kernel saves for the backward one
    states: tuple[str, ...] = ("h",)  # h first
    kept: tuple[str, ...] = ("h",)  # those that the backward kernel reads: h, or the first ones beside it
    splits_last_gate: bool = False  # the gradient of rec differs from that of x in the last gate
    of_torch: bool = False  # torch has kernels of it
    wide: bool = False  # states are float32 beside tensors of 16 bits: in memory too, of all steps but y
    kernels: tuple[Any, Any] | None = None  # its steps forward and backward; None for those of kernels/cells.py

    @property
    def has_c(self) -> bool:
        return self.states[1:] == ("c",)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of states beside tensors of a dtype, where nothing else is given."""
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype

    @property
    def kept_places(self) -> tuple[int, ...]:
        """The places of the kept states among all."""
        return tuple(self.states.index(name) for name in self.kept)

    def kernel(self, which: str) -> Any:
        """The step of a pass, "forward" or "backward", as a @triton.jit function."""
        if self.kernels is not None:
            return self.kernels[which == "backward"]
        from .kernels import cells  # which needs Triton

        return getattr(cells, f"{self.name}_{which}")


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", 4, lstm_step, saved=4, states=("h", "c"), kept=("c",), of_torch=True),
        Cell("gru", 3, gru_step, saved=4, splits_last_gate=True, of_torch=True),
        Cell("rnn_tanh", 1, rnn_tanh_step, saved=0, of_torch=True),
        Cell("rnn_relu", 1, rnn_relu_step, saved=0, of_torch=True),
        # In bfloat16 m would be off by a half at 200, 1.6 times what is remembered; n, a sum, would stop at 256.
        Cell("slstm", 4, slstm_step, saved=5, states=("h", "c", "n", "m"), kept=("c", "n"), wide=True),
    )
}
# TiRex's, which nobody else wants: nn/foreign.py puts it among the cells when it meets one.
SLSTM_CAPPED = replace(CELLS["slstm"], name="slstm_capped", step=slstm_capped_step)


def register(
    name: str,
    *,
    gates: int,
    step: CellStep,
    forward: Any,
    backward: Any,
    saved: int,
    has_c: bool = False,
    splits_last_gate: bool = False,
) -> None:
    """Make a cell usable by its name in fastrnn.ops.recurrence, fastrnn.reference.recurrence and fastrnn.plan.

        rec = W_hh h + b_hh;   state' = step(x, rec, state)

    name: a new one. gates: G, blocks of H rows in W_hh. step: in torch, x and rec (B, G, H) and the state, (h,) or
    (h, c) of (B, H), to the next state; it is the specification. forward and backward: the same step and its gradients
    as @triton.jit functions on fp32 tiles, with the arguments and results that kernels/cells.py states; forward returns
    `saved` tiles for backward. has_c: the state is (h, c), and backward gets c as its kept state instead of h.
    splits_last_gate: the gradient of rec differs from that of x in the last gate (in others it must not).

    The cell is known to this process from here on; a layer of it is a module of yours, around the op.

    Raises ValueError, with expected and got, and registers nothing, where an argument is none of these.

    >>> from fastrnn.cells import gru_step, register
    >>> from fastrnn.kernels.cells import gru_backward, gru_forward
    >>> register("gru", gates=3, step=gru_step, forward=gru_forward, backward=gru_backward, saved=4)
    Traceback (most recent call last):
        ...
    ValueError: name: expected a new one, beside 'lstm', 'gru', 'rnn_tanh', 'rnn_relu'...; got 'gru'
    """
    from triton.runtime.jit import KernelInterface

    if not isinstance(name, str) or name in CELLS:
        raise ValueError(f"name: expected a new one, beside {', '.join(map(repr, CELLS))}; got {name!r}")
    for what, count, least in (("gates", gates, 1), ("saved", saved, 0)):
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{what}: expected an int of at least {least}; got {count!r}")
    if not callable(step):
        raise ValueError(f"step: expected a function of torch tensors; got {step!r}")
    for what, function in (("forward", forward), ("backward", backward)):
        if not isinstance(function, KernelInterface):
            raise ValueError(f"{what}: expected a function with @triton.jit; got {function!r}")
    states, kept = (("h", "c"), ("c",)) if has_c else (("h",), ("h",))
    CELLS[name] = Cell(name, gates, step, saved, states, kept, splits_last_gate, kernels=(forward, backward))
