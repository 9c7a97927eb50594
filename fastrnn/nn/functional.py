"""The functions lstm, gru, rnn and slstm: all layers in one call, with the caller's parameters."""

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
    """Run stacked LSTM layers over a batch of sequences, with the parameters given.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(...),  c' = f c + i g,  h' = o tanh(c')

    All tensors have one dtype and one device, and any strides. Kernels take float32, bfloat16 and float16; the backends
    "torch" and "reference" take any dtype. D is 2 if bidirectional, else 1.

    Args:
        input (Tensor): (T, B, I), (B, T, I) with batch_first, or ragged (total, I) with cu_seqlens.
        hx (tuple[Tensor, Tensor] | None): h_0 and c_0, each (num_layers * D, B, H). None is zeros.
        params (Sequence[Tensor]): For each layer and each of its directions: weight_ih `(4*H, I)`, weight_hh `(4*H, H)`
            and, with bias, bias_ih and bias_hh `(4*H,)`. This is the order of torch.nn.LSTM.parameters(). A projected
            layer has weight_hr (P, H) too, last. Its weight_hh is `(4*H, P)`, and P takes H's place in h_0, h_n and
            output.
        num_layers (int): As in `fastrnn.LSTM`.
        bias (bool): Whether params has biases.
        batch_first (bool): As in `fastrnn.LSTM`.
        dropout (float): As in `fastrnn.LSTM`.
        training (bool): Whether dropout, drop_connect and zoneout are random, as in a module's training mode.
        bidirectional (bool): As in `fastrnn.LSTM`.
        backend (str): As in `fastrnn.LSTM`.
        checkpoint_every (int | None): As in `fastrnn.LSTM`.
        num_heads (int): As in `fastrnn.LSTM`. weight_hh is then `(4*H, H / num_heads)`.
        clip_grad_state (float | None): As in `fastrnn.LSTM`.
        clip_state (float | None): As in `fastrnn.LSTM`.
        tie_directions (bool): As in `fastrnn.LSTM`. params then has the parameters of one direction.
        drop_connect (float): As in `fastrnn.LSTM`.
        zoneout (float): As in `fastrnn.LSTM`.
        lengths (Tensor | Sequence[int] | None): As in `fastrnn.LSTM.forward`.
        cu_seqlens (Tensor | Sequence[int] | None): As in `fastrnn.LSTM.forward`.
        reset (Tensor | Sequence | None): As in `fastrnn.LSTM.forward`.
        reset_state (tuple[Tensor, Tensor] | None): As in `fastrnn.LSTM.forward`.
        return_cell_states (bool): As in `fastrnn.LSTM.forward`.

    Returns:
        output (Tensor): h of the last layer at every step, `(T, B, D*H)`, or in the form of input.
        state (tuple[Tensor, Tensor]): h_n and c_n, each (num_layers * D, B, H).
        cell_states (Tensor): With return_cell_states only: c of the last layer at every step, shaped as output.

    Raises:
        ValueError: params do not fit the other arguments. Wrong input and hx raise the errors of torch.nn.LSTM.
        NotImplementedError: A named backend cannot run. The message names what is missing.
        LaunchRefusedError: As in `fastrnn.LSTM`.

    Source: torch.nn.LSTM.

    Examples:
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
    """Run stacked GRU layers over a batch of sequences, with the parameters given.

        r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)

    Here x = W_ih x_t + b_ih and rec = W_hh h + b_hh: the reset gate r acts after the product, as in cuDNN.

    Args:
        input (Tensor): (T, B, I), (B, T, I) with batch_first, or ragged (total, I) with cu_seqlens.
        hx (Tensor | None): h_0, (num_layers * D, B, H). None is zeros.
        params (Sequence[Tensor]): As in `fastrnn.lstm`, with `3*H` rows for `4*H` and without weight_hr.
        reset_state (Tensor | None): The state after a reset, as in `fastrnn.GRU.forward`.

    The other arguments are those of `fastrnn.lstm`: num_layers, bias, batch_first, dropout, training, bidirectional,
    backend, checkpoint_every, num_heads, clip_grad_state, clip_state, tie_directions, drop_connect, zoneout, lengths,
    cu_seqlens and reset. Dtypes and errors are those of `fastrnn.lstm` too.

    Returns:
        output (Tensor): h of the last layer at every step, `(T, B, D*H)`, or in the form of input.
        h_n (Tensor): The final state, (num_layers * D, B, H).

    Source: torch.nn.GRU.

    Examples:
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
    """Run stacked simple recurrent layers over a batch of sequences, with the parameters given.

        h' = act(W_ih x_t + b_ih + W_hh h + b_hh),  act = tanh or relu

    Args:
        nonlinearity (str): "tanh" or "relu".
        params (Sequence[Tensor]): As in `fastrnn.lstm`, with H rows for `4*H` and without weight_hr.

    The other arguments, shapes and results are those of `fastrnn.gru`: input, hx, num_layers, bias, batch_first,
    dropout, training, bidirectional, backend, checkpoint_every, num_heads, clip_grad_state, clip_state, tie_directions,
    drop_connect, zoneout, lengths, cu_seqlens, reset and reset_state.

    Returns:
        output (Tensor): h of the last layer at every step, `(T, B, D*H)`, or in the form of input.
        h_n (Tensor): The final state, (num_layers * D, B, H).

    Raises:
        ValueError: nonlinearity is neither "tanh" nor "relu". Other errors are those of `fastrnn.lstm`.

    Source: torch.nn.RNN.

    Examples:
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
    """Run stacked sLSTM layers over a batch of sequences, with the parameters given. `fastrnn.SLSTM` has the equations.

    Args:
        hx (tuple[Tensor, ...] | None): The first states (h, c, n, m), each (num_layers * D, B, H). None is zeros.
        params (Sequence[Tensor]): As in `fastrnn.lstm`, without weight_hr: weight_hh is `(4*H, H / num_heads)`, and the
            gates are in the order i, f, z, o.
        reset_state (tuple[Tensor, ...] | None): The states (h, c, n, m) after a reset, as in `fastrnn.SLSTM.forward`.
        return_states (bool): Whether to return the states of all time steps too.

    The other arguments are those of `fastrnn.lstm`: input, num_layers, bias, batch_first, dropout, training,
    bidirectional, backend, checkpoint_every, num_heads, clip_grad_state, clip_state, tie_directions, drop_connect,
    zoneout, lengths, cu_seqlens and reset. Errors are those of `fastrnn.lstm` too.

    Returns:
        output (Tensor): h of the last layer at every step, `(T, B, D*H)`, or in the form of input.
        state (tuple[Tensor, ...]): The final states (h, c, n, m), each (num_layers * D, B, H).
        states (tuple[Tensor, ...]): With return_states only: (h, c, n, m) of the last layer at every step, each shaped
            as output.

    Source: Beck et al. 2024 (arXiv:2405.04517).

    Examples:
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
