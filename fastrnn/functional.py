"""One call per cell: validate, project the input, run the recurrence, stack the layers.

x_gates = W_ih x + b_ih          one product over all of time and both directions, torch's own
y, h_n, c_n = recurrence(x_gates, W_hh, b_hh, h_0, c_0)
"""

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout
from torch.nn.functional import linear

from . import ops, reference
from .planner import Plan, plan
from .reference import GATES
from .validation import check_call, check_params, compute_dtype


class FallbackWarning(UserWarning):
    """backend="auto" runs torch's own kernel on a GPU; the message says why."""


@functools.cache
def _warn_fallback(why: str) -> None:
    warnings.warn(f"backend='auto' runs torch's own kernel: {why}", FallbackWarning, stacklevel=4)


def backend_of(chosen: Plan) -> str:
    """The plan's backend; warns, once a reason, where a GPU gets no kernel of ours."""
    if chosen.backend == "torch" and chosen.why != "asked for" and chosen.device.startswith("cuda"):
        _warn_fallback(chosen.why)
    return chosen.backend


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run an LSTM over a batch of sequences.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(...),  c' = f c + i g,  h' = o tanh(c')

    input (T, B, I), or (B, T, I) if batch_first. hx: h_0 and c_0, each (num_layers * D, B, H), or None for zeros;
    D is 2 if bidirectional, else 1. params: for each layer, for each direction, weight_ih (4*H, I), weight_hh
    (4*H, H) and, if bias, bias_ih and bias_hh (4*H,), as torch.nn.LSTM.parameters() yields them. One dtype (float32,
    bfloat16, float16; any for backend "torch" and "reference") and one device, any strides. dropout is applied
    between layers if training. backend: see fastrnn.LSTM.

    Returns output (T, B, D*H), or (B, T, D*H), and (h_n, c_n), each (num_layers * D, B, H).
    Raises torch.nn.LSTM's own errors for wrong input and state, ValueError for wrong params, NotImplementedError,
    naming what is missing, where a named backend cannot run.

    Source: torch.nn.LSTM.

    >>> import torch, fastrnn
    >>> params = list(torch.nn.LSTM(3, 5).parameters())
    >>> output, (h_n, c_n) = fastrnn.lstm(torch.randn(7, 2, 3), None, params)
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    output, h_n, c_n = run(
        "lstm", input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend
    )
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a GRU over a batch of sequences.

        r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)

    with x = W_ih x_t + b_ih and rec = W_hh h + b_hh: the reset gate acts after the product, as in cuDNN.
    Arguments, shapes and errors as fastrnn.lstm, with 3*H rows in params and hx one tensor (num_layers * D, B, H).
    Returns output (T, B, D*H), or (B, T, D*H), and h_n (num_layers * D, B, H).

    Source: torch.nn.GRU.

    >>> import torch, fastrnn
    >>> output, h_n = fastrnn.gru(torch.randn(7, 2, 3), None, list(torch.nn.GRU(3, 5).parameters()))
    >>> output.shape
    torch.Size([7, 2, 5])
    """
    output, h_n = run(
        "gru", input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend
    )
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a simple recurrent network over a batch of sequences.

        h' = act(W_ih x_t + b_ih + W_hh h + b_hh),  act = tanh or relu

    Arguments, shapes and errors as fastrnn.gru, with H rows in params; nonlinearity is "tanh" or "relu", anything
    else a ValueError.

    Source: torch.nn.RNN.

    >>> import torch, fastrnn
    >>> params = list(torch.nn.RNN(3, 5).parameters())
    >>> output, h_n = fastrnn.rnn(torch.randn(7, 2, 3), None, params)
    >>> torch.equal(output[-1], h_n[0])
    True
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell = f"rnn_{nonlinearity}"
    output, h_n = run(cell, input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend)
    return output, h_n


def run(
    cell: str,
    input: Tensor,
    hx: "Tensor | tuple[Tensor, Tensor] | None",
    params: Sequence[Tensor],
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """output and the final states, (h_n,) or (h_n, c_n)."""
    D = 2 if bidirectional else 1
    check_params(GATES[cell], params, num_layers, D, bias)
    H = params[1].shape[-1]
    states = 2 if cell == "lstm" else 1
    if hx is None:
        B = input.shape[0 if batch_first else 1]
        state: tuple[Tensor, ...] = (input.new_zeros(num_layers * D, B, H),) * states
    else:
        state = tuple(hx) if states == 2 else (hx,)  # type: ignore[arg-type]
    check_call(input, state, params, num_layers, D, batch_first)

    dtype = compute_dtype(input)
    T, B = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    chosen = plan(
        cell,
        hidden_size=H,
        batch_size=max(B, 1),
        seq_len=T,
        directions=D,
        dtype=dtype,
        device=str(input.device),
        backend=backend,
    )
    if backend_of(chosen) == "torch":
        torch_kernel = getattr(torch._VF, cell)
        hidden = state if states == 2 else state[0]
        return torch_kernel(
            input, hidden, list(params), bias, num_layers, dropout, training, bidirectional, batch_first
        )

    input, state, params = input.to(dtype), tuple(s.to(dtype) for s in state), [p.to(dtype) for p in params]
    per_direction = 4 if bias else 2
    x = input.transpose(0, 1) if batch_first else input
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        of_layer = params[layer * D * per_direction : (layer + 1) * D * per_direction]
        W_ih, W_hh = of_layer[0::per_direction], of_layer[1::per_direction]
        b_ih = _stack(of_layer[2::per_direction]).flatten() if bias else None
        b_hh = _stack(of_layer[3::per_direction]) if bias else None
        h_0, *c_0 = (s[layer * D : (layer + 1) * D] for s in state)
        source = x, _stack(W_ih).flatten(0, 1), b_ih
        x_gates = linear(*source).unflatten(-1, (D, GATES[cell], H))
        of_recurrence = (cell, x_gates, _stack(W_hh), b_hh, h_0, c_0[0] if c_0 else None)
        if chosen.backend == "reference":
            y, h_n, c_n = reference.recurrence(*of_recurrence)
        else:
            y, h_n, c_n = ops.recurrence(*of_recurrence, chosen.backend, source)
        finals.append((h_n,) if c_n is None else (h_n, c_n))
        x = y.flatten(2)
        if dropout and training and layer < num_layers - 1:
            x = _dropout(x, dropout)
    output = x.transpose(0, 1) if batch_first else x
    return output, *(torch.cat(layers) for layers in zip(*finals, strict=True))


def _stack(directions: Sequence[Tensor]) -> Tensor:
    """(D, ...) of D tensors; a view where there is one."""
    return directions[0].unsqueeze(0) if len(directions) == 1 else torch.stack(tuple(directions))
