"""One call per cell: validate, plan, and stack the layers: one after the other, or as a wavefront."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import driver
from ..planning.arguments import as_int
from ..planning.planner import Plan, plan
from ..planning.tiers import TIERS
from ..reference import GATES
from ..sequences import stops_at_torchs_kernels, untraced
from ..torch_path import segments
from . import layers, projection, wavefront
from .dropout import drop, drop_mask, dropping
from .older_tools import leaf
from .options import PLAIN, Options, check_options
from .validation import check_call, check_params, check_state, compute_dtype


class FallbackWarning(UserWarning):
    """backend="auto" runs torch's own kernel on a GPU, or not the planned one of ours; the message says why."""


@functools.cache
def _warn_fallback(what: str, why: str) -> None:
    warnings.warn(f"backend='auto' runs {what}: {why}", FallbackWarning, stacklevel=4)


def backend_of(chosen: Plan) -> str:
    """The plan's backend; warns, once a reason, where a GPU gets no kernel of ours or refused the one it should get."""
    if chosen.backend == "torch" and chosen.why != "asked for" and chosen.device.startswith("cuda"):
        _warn_fallback("torch's own kernel", chosen.why)
    elif driver.refused and not torch.compiler.is_compiling():  # which would break its graph to warn
        for why in driver.refused.values():
            if why in chosen.why:
                _warn_fallback(f"the {chosen.backend} kernel", why)
    return chosen.backend


def _again_where_refused(run: Callable) -> Callable:
    """Plan and run again where the driver refuses a kernel that backend="auto" chose; the planner leaves it out then.

    Inside torch.compile a launch is too late for that: the error passes, and the next call plans anew.
    """

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        for _ in TIERS:
            try:
                return run(*args, **kwargs)
            except driver.LaunchRefusedError:
                if "auto" not in (*args[10:11], kwargs.get("backend")):  # the backend's place
                    raise
        return run(*args, **kwargs)

    return wrapped


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
    bfloat16, float16; any for backend "torch" and "reference") and one device, any strides. dropout is applied
    between layers if training. backend and checkpoint_every: see fastrnn.LSTM; lengths, cu_seqlens, reset, reset_state
    and return_cell_states: see fastrnn.LSTM.forward.

    Returns output (T, B, D*H), or (B, T, D*H), and (h_n, c_n), each (num_layers * D, B, H); with return_cell_states
    then c_t of the last layer, as output.
    Raises torch.nn.LSTM's own errors for wrong input and state, ValueError for wrong params, NotImplementedError,
    naming what is missing, where a named backend cannot run.

    Source: torch.nn.LSTM.

    >>> import torch, fastrnn
    >>> params = list(torch.nn.LSTM(3, 5).parameters())
    >>> output, (h_n, c_n) = fastrnn.lstm(torch.randn(7, 2, 3), None, params)
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    output, h_n, c_n, *cell_states = run(
        "lstm", input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend,
        checkpoint_every, Options(lengths, cu_seqlens, reset, reset_state, return_cell_states),
    )  # fmt: skip
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
    output, h_n = run(
        "gru", input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend,
        checkpoint_every, Options(lengths, cu_seqlens, reset, reset_state),
    )  # fmt: skip
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
    cell = f"rnn_{nonlinearity}"
    output, h_n = run(
        cell, input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend,
        checkpoint_every, Options(lengths, cu_seqlens, reset, reset_state),
    )  # fmt: skip
    return output, h_n


@_again_where_refused
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
    checkpoint_every: int | None,
    options: Options = PLAIN,
) -> tuple[Tensor, ...]:
    """output and the final states, (h_n,) or (h_n, c_n), and c of every step where it is asked for."""
    D = 2 if bidirectional else 1
    num_layers, checkpoint_every = as_int(num_layers), as_int(checkpoint_every)
    check_params(GATES[cell], params, num_layers, D, bias)
    H, of_h = params[0].shape[0] // GATES[cell], params[1].shape[-1]  # h has another size where it is projected
    given = options
    T, B, options = check_options(options, input, batch_first, cell, num_layers * D, (of_h, H))
    ragged = options.cu_seqlens is not None
    states = 2 if cell == "lstm" else 1
    if hx is None:
        zeros = [input.new_zeros(num_layers * D, B, size) for size in ((of_h,) if of_h == H else (of_h, H))]
        state: tuple[Tensor, ...] = (zeros[0], zeros[-1])[:states]
    else:
        state = tuple(hx) if states == 2 else (hx,)  # type: ignore[arg-type]
        check_state(state, states)
    check_call(input, state, params, num_layers, D, T, B, ragged or options.lengths is not None)
    plain = options.plain
    if T == 0:  # all sequences are empty: run one step, which is padding of all, and leave it out
        x = input.unsqueeze(1).expand(-1, B, -1) if ragged else input.transpose(0, 1) if batch_first else input
        none = torch.zeros(B, dtype=torch.int64, device=input.device)
        found = run(
            cell, torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)), hx, params, num_layers, bias, False, dropout,
            training, bidirectional, backend, checkpoint_every, Options(none, cell_states=options.cell_states),
        )  # fmt: skip

        def nothing(y: Tensor) -> Tensor:
            return y[:0].flatten(0, 1) if ragged else y[:0].transpose(0, int(batch_first))

        return nothing(found[0]), *found[1 : 1 + states], *map(nothing, found[1 + states :])

    dtype = compute_dtype(input)
    # torch.export's sizes are symbols where they may change: the plan is that of its example.
    planned_T, planned_B = (size.node.hint if isinstance(size, torch.SymInt) else size for size in (T, B))
    planned_T = max(1, planned_T // max(planned_B, 1)) if ragged else planned_T
    chosen = plan(
        cell,
        hidden_size=H,
        batch_size=max(planned_B, 1),
        seq_len=planned_T,
        directions=D,
        dtype=dtype,
        device=str(input.device),
        backend=backend,
        num_layers=num_layers,
        checkpoint_every=checkpoint_every,
    )
    backend = backend_of(chosen)
    if backend == "torch" and stops_at_torchs_kernels():
        return _untraced(
            cell, input, hx, params, num_layers, bias, batch_first, dropout, training, bidirectional, backend,
            checkpoint_every, tuple(given),
        )  # fmt: skip
    if checkpoint_every and not plain and (ragged or D == 2 or backend == "torch"):
        what = (
            "packed or ragged sequences"
            if ragged
            else ("lengths, resets or cell states of both directions or backend='torch'")
        )
        raise NotImplementedError(f"checkpoint_every with {what} is missing")
    if backend == "torch" and not plain:
        x = input.transpose(0, 1) if batch_first and not ragged else input
        lengths, cu_seqlens, reset, reset_state, cell_states = options
        output, finals, c = segments.run(
            cell, x, state, params, num_layers, bias, dropout, training, bidirectional,
            lengths=lengths, cu_seqlens=cu_seqlens, reset=reset, reset_state=reset_state, cell_states=cell_states,
        )  # fmt: skip
        found = (output, c) if c is not None else (output,)
        output, *c = (y.transpose(0, 1) if batch_first and not ragged else y for y in found)
        return output, *finals, *c
    if backend == "torch" and checkpoint_every is None:
        torch_kernel = getattr(torch._VF, cell)
        hidden = state if states == 2 else state[0]
        return torch_kernel(
            input, hidden, list(params), bias, num_layers, dropout, training, bidirectional, batch_first
        )

    if backend != "torch":  # which narrows by itself where autocast wants it
        input = input.to(dtype)
    dtype = input.dtype
    wave = None if torch.compiler.is_compiling() else chosen.wavefront  # torch.compile does not trace streams
    wave = wave if plain else None  # nor are sequences cut for it
    K = wave or checkpoint_every
    # From chunk to chunk of a kernel the state is fp32, as it is from step to step.
    between = torch.float32 if K and chosen.kernel and dtype.itemsize == 2 else dtype
    states = [tuple(s[layer * D : (layer + 1) * D].to(between) for s in state) for layer in range(num_layers)]
    per_layer = len(params) // num_layers
    weights = [
        layers.weights_of(params[i : i + per_layer], dtype, chunked=K is not None)
        for i in range(0, len(params), per_layer)
    ]
    projected = per_layer // D in (3, 5) and backend != "torch"
    if projected:
        states = [projection.before(None if hx is None else h, c) for h, c in states]
    steps = [layers.step_of(cell, backend, of_layer, bias, training) for of_layer in weights]
    if checkpoint_every:
        steps = [layers.recomputed(step) for step in steps]
    drops = dropout if training else 0.0
    x = input.transpose(0, 1) if batch_first and not ragged else input
    c = None
    if wave:
        reads, streams = [of_layer() for of_layer in weights], wavefront.streams_of(x.device, num_layers)
        if drops:
            for layer in range(1, num_layers):
                mask = drop_mask(x.new_empty(()).expand(T, x.shape[1], of_h), drops)
                steps[layer] = dropping(steps[layer], mask.split(wave), drops)
                reads[layer] = [*reads[layer], mask]
        ys, states = wavefront.run(steps, x.split(wave), states, reads, streams)
        x = torch.cat(ys)
    else:
        windows = layers.windows_of(options, T, B, num_layers, D, between)
        if options.lengths is not None:
            # What stands in the padding, even NaN, must not reach a product: 0 * NaN is NaN in W_ih's gradient.
            live = torch.arange(T, device=x.device)[:, None] < options.lengths
            x = x.masked_fill(~live[..., None], 0)
        for layer, (step, window) in enumerate(zip(steps, windows, strict=True)):
            if drops and layer:
                x = drop(x, drop_mask(x, drops), drops)
            x, states[layer], c = layers.in_chunks(step, x, states[layer], K or x.shape[0], window)
    if projected:
        W_hr = [torch.stack(tuple(layers.by_role(of_layer(), D)[-1])) for of_layer in weights]
        lengths = options.cu_seqlens.diff() if ragged else options.lengths
        of_layers = zip(states, W_hr, state[0].split(D), strict=True)
        states = [projection.after(*of_layer, None if hx is None else lengths) for of_layer in of_layers]
    outputs = (x,) if c is None else (x, c)
    output, *c = (y.transpose(0, 1) if batch_first and not ragged else y for y in outputs)
    finals = (torch.cat(of_layers) for of_layers in zip(*states, strict=True))
    return output, *(final if between == dtype else final.to(dtype) for final in finals), *c


def _run_untraced(*args: Any) -> tuple[Tensor, ...]:
    """run, with options that are a plain tuple: of a named one torch 2.11 hands on nothing where the graph breaks."""
    *others, options = args
    return run(*others, Options(*options))


_untraced = untraced(_run_untraced)
