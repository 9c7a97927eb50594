"""The cells: one record for each, which the reference, the planner, the op and the kernels read.

    RNN     h' = act(x + rec)
    GRU     r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)
    LSTM    i, f, o = sigmoid(x + rec),  g = tanh(x_g + rec_g),  c' = f c + i g,  h' = o tanh(c')
    sLSTM   a = x_i + rec_i,  b = m + logsigmoid(x_f + rec_f),  m' = max(a, b), but a where n is 0,
            i = min(1, exp(a - m')),  f = min(1, exp(b - m')),  z = tanh(x_z + rec_z),  o = sigmoid(x_o + rec_o),
            c' = f c + i z,  n' = f n + i,  h' = o c' / n'

Here x = W_ih x_t + b_ih and rec = W_hh h + b_hh. Gates are in torch's row order; the sLSTM's are i, f, z, o. `register`
adds your own cell: docs/writing-a-cell.md shows how to write and test one, and examples/mgu.py is one in one file.

Source: the documentation of torch.nn.RNN, torch.nn.GRU and torch.nn.LSTM has their equations; Beck et al. 2024
(arXiv:2405.04517) has the sLSTM's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]
CellStep = Callable[[Tensor, Tensor, State], State]  # (x, rec, state before) -> state after; x and rec are (B, G, H)


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
    """One step of the sLSTM. m only rescales c and n against overflow, so no gradient goes through it or its max()."""
    _, c, n, m = state
    i, f, z, o = (x + rec).unbind(-2)
    carried = m.detach() + torch.nn.functional.logsigmoid(f)
    m = torch.where(n == 0, i, torch.maximum(i, carried)).detach()
    i, f = _exp_below_1(i - m), _exp_below_1(carried - m)
    c, n = f * c + i * z.tanh(), f * n + i
    return o.sigmoid() * c / n, c, n, m


def slstm_capped_step(x: Tensor, rec: Tensor, state: State) -> State:
    """TiRex's sLSTM step: f is at most 15, so that 1 - sigmoid(f) never rounds to zero."""
    i, f, z, o = (x + rec).unbind(-2)
    gates = torch.stack((i, f.clamp(max=15.0), z, o), -2)
    return slstm_step(gates, torch.zeros_like(gates), state)


def _exp_below_1(x: Tensor) -> Tensor:
    """min(1, exp(x)), with the gradient of exp(x) even where the result is 1."""
    return (x - x.detach().relu()).exp()


@dataclass(frozen=True)
class Cell:
    """Everything that fastrnn knows about one cell.

    Attributes:
        name (str): The name that ops and plans use.
        gates (int): G. W_ih and W_hh have G blocks of H rows.
        step (CellStep): One time step in torch. This is the specification.
        saved (int): How many tiles per time step the forward kernel saves for the backward kernel.
        states (tuple[str, ...]): The names of the states, h first.
        kept (tuple[str, ...]): The states that the backward kernel reads: h, or the first states after h.
        splits_last_gate (bool): Whether the gradient of rec differs from that of x in the last gate.
        of_torch (bool): Whether torch has kernels for this cell.
        wide (bool): Whether states are float32 beside 16-bit tensors. In memory too, and at every step, except y.
        kernels (tuple | None): The forward and backward steps as Triton functions. None: kernels/cells.py has them.
    """

    name: str
    gates: int
    step: CellStep
    saved: int
    states: tuple[str, ...] = ("h",)
    kept: tuple[str, ...] = ("h",)
    splits_last_gate: bool = False
    of_torch: bool = False
    wide: bool = False
    kernels: tuple[Any, Any] | None = None

    @property
    def has_c(self) -> bool:
        return self.states[1:] == ("c",)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The default dtype of states beside tensors of this dtype."""
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype

    @property
    def kept_places(self) -> tuple[int, ...]:
        """The index of each kept state among all states."""
        return tuple(self.states.index(name) for name in self.kept)

    def kernel(self, which: str) -> Any:
        """The Triton function with one step of a pass, "forward" or "backward"."""
        if self.kernels is not None:
            return self.kernels[which == "backward"]
        from .kernels import cells  # imported late, because it needs Triton

        return getattr(cells, f"{self.name}_{which}")


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", 4, lstm_step, saved=4, states=("h", "c"), kept=("c",), of_torch=True),
        Cell("gru", 3, gru_step, saved=4, splits_last_gate=True, of_torch=True),
        Cell("rnn_tanh", 1, rnn_tanh_step, saved=0, of_torch=True),
        Cell("rnn_relu", 1, rnn_relu_step, saved=0, of_torch=True),
        # Its states are wide: in bfloat16 an m of 200 would be off by 0.5, a factor of 1.6 in c, and the sum n would
        # stop growing at 256.
        Cell("slstm", 4, slstm_step, saved=5, states=("h", "c", "n", "m"), kept=("c", "n"), wide=True),
    )
}
# Only TiRex's models use this cell: nn/foreign.py adds it to CELLS when it meets such a model.
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
    """Register a cell: its name then works in fastrnn.ops.recurrence, fastrnn.reference.recurrence and fastrnn.plan.

        rec = W_hh h + b_hh;   state' = step(x, rec, state)

    Only this process knows the cell. A layer of it is a module that you write around the op.

    Args:
        name (str): A new name.
        gates (int): G, how many blocks of H rows W_hh has.
        step (CellStep): One step in torch, which is the specification. It takes x and rec (B, G, H) and the state, (h,)
            or (h, c) with each (B, H), and returns the next state.
        forward (JITFunction): The same step on fp32 tiles, decorated with @triton.jit. It also returns `saved` tiles
            for backward. kernels/cells.py states the arguments and results of both passes.
        backward (JITFunction): The gradients of the step, in the same form.
        saved (int): How many tiles forward saves.
        has_c (bool): Whether the state is (h, c). backward then reads c as its kept state, else h.
        splits_last_gate (bool): Whether the gradient of rec differs from that of x in the last gate. In the other gates
            the two must be equal.

    Raises:
        ValueError: An argument is wrong. The message says what was expected and what was given, and nothing is
            registered.

    Examples:
        >>> from fastrnn.cells import gru_step, register
        >>> from fastrnn.kernels.cells import gru_backward, gru_forward
        >>> register("gru", gates=3, step=gru_step, forward=gru_forward, backward=gru_backward, saved=4)
        Traceback (most recent call last):
            ...
        ValueError: name: expected a new name, other than 'lstm', 'gru', 'rnn_tanh', 'rnn_relu'...; got 'gru'
    """
    from triton.runtime.jit import KernelInterface

    if not isinstance(name, str) or name in CELLS:
        raise ValueError(f"name: expected a new name, other than {', '.join(map(repr, CELLS))}; got {name!r}")
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
