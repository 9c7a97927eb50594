"""fastrnn.lstm, gru, rnn and slstm: one call of all layers, with the parameters given."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..planning.arguments import as_int
from ..stack import Stack
from . import paths
from .older_tools import leaf
from .options import Options


@leaf
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
    checkpoint_every: int | None = None,
    num_heads: int = 1,
    clip_grad_state: float | None = None,
    clip_state: float | None = None,
    tie_directions: bool = False,
    drop_connect: float = 0.0,
    zoneout: float = 0.0,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    return_cell_states: bool = False,
) -> tuple[Any, ...]:
    """Run an LSTM over a batch of sequences.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(...),  c' = f c + i g,  h' = o tanh(c')

    input (T, B, I), or (B, T, I) if batch_first. hx: h_0 and c_0, each (num_layers * D, B, H), or None for zeros;
    D is 2 if bidirectional, else 1. params: for each layer, for each direction, weight_ih (4*H, I), weight_hh
    (4*H, H) and, if bias, bias_ih and bias_hh (4*H,), as torch.nn.LSTM.parameters() yields them; with proj_size P
    weight_hr (P, H) comes behind them, weight_hh is (4*H, P), and h_0, h_n and output have P for H. One dtype (float32,
    bfloat16, float16; any for backend "torch" and "reference") and one device, any strides. training says that dropout,
    drop_connect and zoneout are at random. backend, checkpoint_every, num_heads, with which weight_hh is (4*H, H /
    num_heads), clip_grad_state, clip_state, drop_connect, zoneout and tie_directions, with which params are those of
    one direction: see fastrnn.LSTM; lengths, cu_seqlens, reset, reset_state and return_cell_states: see its forward.

    Returns output (T, B, D*H), or (B, T, D*H), and (h_n, c_n), each (num_layers * D, B, H); with return_cell_states
    then c_t of the last layer, as output.
    Raises torch.nn.LSTM's own errors for wrong input and state, ValueError for wrong params, NotImplementedError,
    naming what is missing, where a named backend cannot run, and fastrnn.LaunchRefusedError where fastrnn.LSTM does.

    Source: torch.nn.LSTM.

    >>> import torch, fastrnn
    >>> params = list(torch.nn.LSTM(3, 5).parameters())
    >>> output, (h_n, c_n) = fastrnn.lstm(torch.randn(7, 2, 3), None, params)
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    stack = Stack(
        "lstm", as_int(num_layers), bias, batch_first, dropout, training, bidirectional, backend,
        as_int(checkpoint_every), as_int(num_heads), clip_grad_state, clip_state, tie_directions, drop_connect, zoneout,
    )  # fmt: skip
    options = Options.of(lengths, cu_seqlens, reset, reset_state, return_cell_states)
    output, (h_n, c_n), *cell_states = paths.run(stack, input, hx, params, options)
    return output, (h_n, c_n), *cell_states


@leaf
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
    checkpoint_every: int | None = None,
    num_heads: int = 1,
    clip_grad_state: float | None = None,
    clip_state: float | None = None,
    tie_directions: bool = False,
    drop_connect: float = 0.0,
    zoneout: float = 0.0,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence | None = None,
    reset_state: Tensor | None = None,
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
    stack = Stack(
        "gru", as_int(num_layers), bias, batch_first, dropout, training, bidirectional, backend,
        as_int(checkpoint_every), as_int(num_heads), clip_grad_state, clip_state, tie_directions, drop_connect, zoneout,
    )  # fmt: skip
    output, (h_n,) = paths.run(stack, input, hx, params, Options.of(lengths, cu_seqlens, reset, reset_state))
    return output, h_n


@leaf
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
    checkpoint_every: int | None = None,
    num_heads: int = 1,
    clip_grad_state: float | None = None,
    clip_state: float | None = None,
    tie_directions: bool = False,
    drop_connect: float = 0.0,
    zoneout: float = 0.0,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence | None = None,
    reset_state: Tensor | None = None,
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
    stack = Stack(
        f"rnn_{nonlinearity}", as_int(num_layers), bias, batch_first, dropout, training, bidirectional, backend,
        as_int(checkpoint_every), as_int(num_heads), clip_grad_state, clip_state, tie_directions, drop_connect, zoneout,
    )  # fmt: skip
    output, (h_n,) = paths.run(stack, input, hx, params, Options.of(lengths, cu_seqlens, reset, reset_state))
    return output, h_n


@leaf
def slstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    backend: str = "auto",
    checkpoint_every: int | None = None,
    num_heads: int = 1,
    clip_grad_state: float | None = None,
    clip_state: float | None = None,
    tie_directions: bool = False,
    drop_connect: float = 0.0,
    zoneout: float = 0.0,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence | None = None,
    reset_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    return_states: bool = False,
) -> tuple[Any, ...]:
    """Run an sLSTM over a batch of sequences: see fastrnn.SLSTM for its equations.

    Arguments, shapes and errors as fastrnn.lstm, without a projection: weight_hh is (4*H, H / num_heads), gates are i,
    f, z, o, and hx, reset_state and the final state are tuples (h, c, n, m) of (num_layers * D, B, H). Returns output
    and the final state; with return_states then (h, c, n, m) of the last layer for all t, each as output.

    Source: Beck et al. 2024 (arXiv:2405.04517).

    >>> import torch, fastrnn
    >>> params = list(fastrnn.SLSTM(3, 6, num_heads=2).parameters())
    >>> output, (h_n, c_n, n_n, m_n) = fastrnn.slstm(torch.randn(7, 2, 3), None, params, num_heads=2)
    >>> output.shape, n_n.shape
    (torch.Size([7, 2, 6]), torch.Size([1, 2, 6]))
    """
    stack = Stack(
        "slstm", as_int(num_layers), bias, batch_first, dropout, training, bidirectional, backend,
        as_int(checkpoint_every), as_int(num_heads), clip_grad_state, clip_state, tie_directions, drop_connect, zoneout,
    )  # fmt: skip
    options = Options.of(lengths, cu_seqlens, reset, reset_state, return_states)
    output, final, *others = paths.run(stack, input, hx, params, options)
    return (output, final, (output, *others)) if return_states else (output, final)
