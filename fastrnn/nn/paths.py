"""The ways in which a call may run. A checked call takes the first one that applies."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import driver
from ..noise import draw
from ..ops import layer
from ..planning.tiers import KERNELS
from ..sequences import PLAIN as WHOLE
from ..sequences import stops_at_torchs_kernels, untraced
from ..stack import Stack
from ..torch_path import segments
from . import layers, projection, wavefront
from .calls import Call, as_tuple, backend_of, checked, known, until_launched
from .dropout import drop, drop_connections, drop_mask, dropping, noise_of_chunks, zoning
from .options import PLAIN, Options

# Output, the final states, and the other states of every step if they are asked for.
Found = tuple[Any, ...]


def run(stack: Stack, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options = PLAIN) -> Found:
    """Return output, the final states as a tuple and, if they are asked for, the cell states of every step.

    If the driver refuses a kernel that backend="auto" chose, the call plans and runs again, without that kernel. Inside
    torch.compile a launch comes too late for that: the error passes, and the next call plans anew.
    """
    noise = None
    if stack.drops_connections or stack.zones_out:
        checked(stack, input, hx, params, options, _choose)  # a wrong call must draw no random number
        if stack.drops_connections:
            stack, params = drop_connections(stack, params)
        if stack.zones_out:
            noise = draw(stack.num_layers, stack.directions, input.device)
    if torch.compiler.is_compiling():
        return _once(stack, input, hx, params, options, noise)
    return until_launched(stack.backend, _once, stack, input, hx, params, options, noise)


def again(stack: Stack, input: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Any] | None:
    """Run a call without states and options as an earlier one ran, without what `run` does for others.

    Return output and the final state, or None: no kernel ran such a call, or the driver refuses it now. `run` then
    finds another way.
    """
    call = known(stack, input, params)
    if call is None:
        return None
    try:
        output, finals = call.route.path(call) if call.route.plain is None else _plain(call, call.route.plain)
    except driver.LaunchRefusedError:
        if stack.backend != "auto":
            raise
        return None
    return output, stack.hidden(finals)


def _plain(call: Call, each: layer.Call) -> Found:
    """`_straight` for a call where nothing else happens between the launches."""
    stack, x, params, of_layers = call.stack, call.input, call.params, []
    if stack.batch_first:
        x = x.transpose(0, 1)
    count = len(params) // stack.num_layers
    for first in range(0, len(params), count):
        weights = params[first : first + count]
        if stack.bidirectional:
            weights = [weight for role in layers.by_role(weights, 2) for weight in role]
        x, *finals = layer.outputs_of(each, (x, *weights))
        of_layers.append(finals)
    finals = of_layers[0] if stack.num_layers == 1 else [torch.cat(of_all) for of_all in zip(*of_layers, strict=True)]
    return x.transpose(0, 1) if stack.batch_first else x, tuple(finals)


def _once(
    stack: Stack, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options, noise: Sequence[Tensor] | None
) -> Found:
    call = checked(stack, input, hx, params, options, _choose)
    if noise is not None:
        call = call._replace(noise=noise)
    if backend_of(call.route.chosen) == "torch" and stops_at_torchs_kernels():
        # torch.compile breaks its graph here. torch 2.11 loses a NamedTuple at such a break, so these are plain tuples.
        return _run_untraced(tuple(stack), input, hx, params, tuple(options))
    return call.route.path(call)


def _no_step(call: Call) -> Found:
    """All sequences are empty: run one step of padding, and drop its output."""
    x = call.input.unsqueeze(1).expand(-1, call.route.B, -1) if call.ragged else call.x
    none = torch.zeros(call.route.B, dtype=torch.int64, device=x.device)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    options = Options(none, cell_states=call.options.cell_states)
    output, finals, *c = run(call.stack._replace(batch_first=False), padded, call.hx, call.params, options)

    def nothing(y: Tensor) -> Tensor:
        return y[:0].flatten(0, 1) if call.ragged else call.as_given(y[:0])

    return nothing(output), finals, *map(nothing, c)


@untraced
def _run_untraced(stack: tuple, input: Tensor, hx: Any, params: Sequence[Tensor], options: tuple) -> Found:
    return run(Stack(*stack), input, hx, params, Options(*options))


def _missing(call: Call) -> Found:
    if call.ragged:
        raise NotImplementedError("checkpoint_every with packed or ragged sequences is missing")
    where = "a bidirectional layer" if call.stack.bidirectional else "torch's own kernel, which this call takes"
    raise NotImplementedError(f"checkpoint_every with lengths, resets or cell states is missing in {where}")


def _segments(call: Call) -> Found:
    """Lengths, resets and cell states with torch's kernels."""
    lengths, cu_seqlens, reset, reset_state, cell_states = call.options
    output, finals, c = segments.run(
        call.stack, call.x, call.state, call.params,
        lengths=lengths, cu_seqlens=cu_seqlens, reset=reset, reset_state=reset_state, cell_states=cell_states,
    )  # fmt: skip
    return call.as_given(output), finals, *([] if c is None else [call.as_given(c)])


def _torchs(call: Call) -> Found:
    """All layers in one call of torch's own kernel."""
    output, *finals = call.stack.torch_kernel(call.input, state=call.state, params=list(call.params))
    return output, tuple(finals)


def _straight(call: Call) -> Found:
    """One layer after the other, each in one launch over all of time."""
    stack, route, x = call.stack, call.route, call.x
    D, L, p, options, hx = stack.directions, stack.num_layers, stack.dropped, call.options, call.hx
    params = [param.to(route.dtype) for param in call.params] if route.casts else call.params
    states: Any = [None] * L
    if hx is not None:
        given = [state.to(route.wide) for state in as_tuple(hx, stack)]
        states = [[state[n * D : (n + 1) * D] for state in given] for n in range(L)] if L > 1 else [given]
    windows = [WHOLE] * L if options is PLAIN else layers.windows_of(call, route.wide)
    if call.noise is not None:
        windows = [window._replace(noise=of_layer) for window, of_layer in zip(windows, call.noise, strict=True)]
    x = _readable(call, x.to(route.dtype) if route.casts else x)
    count, of_layers, steps = len(params) // L, [], None
    for n in range(L):
        weights = params[n * count : (n + 1) * count]
        if D > 1:  # role by role
            weights = [weight for role in layers.by_role(weights, D) for weight in role]
        if stack.num_heads > 1:
            weights = layers.by_head(stack, weights)
        if p and n:
            x = drop(x, drop_mask(x, p), p)
        x, finals, steps = layer.run(route.layer, x, weights, states[n], windows[n], route.ready)
        of_layers.append(finals)
    finals = of_layers[0] if L == 1 else tuple([torch.cat(of_all) for of_all in zip(*of_layers, strict=True)])
    return call.as_given(x), finals, *[call.as_given(of_state) for of_state in steps or ()]


def _readable(call: Call, x: Tensor) -> Tensor:
    """The input with zeros for its padding, which may hold NaN. In dW_ih, 0 * NaN would be NaN."""
    lengths = call.options.lengths
    if lengths is None or not torch.is_grad_enabled():
        return x
    padding = torch.arange(call.route.T, device=x.device)[:, None] >= lengths
    return x.masked_fill(padding[..., None], 0)


def _layered(call: Call) -> Found:
    """One layer after the other in chunks, or as a wavefront of chunks. Projected layers and the reference too."""
    stack, backend = call.stack, call.backend
    x = call.x
    if backend != "torch":  # torch's kernels follow autocast by themselves
        x = x.to(call.route.dtype)
    dtype, wave = x.dtype, _chunk_of_wave(call)
    K = wave or stack.checkpoint_every
    # Kernels carry the state in fp32 from chunk to chunk, as they do from step to step.
    wide = stack.of_cell.state_dtype(dtype)  # with backend "torch" dtype is still the input's, before autocast
    between = torch.float32 if K and call.route.chosen.kernel and dtype.itemsize == 2 else wide
    per_layer = len(call.params) // stack.num_layers
    weights = [
        layers.weights_of(call.params[i : i + per_layer], dtype, chunked=K is not None)
        for i in range(0, len(call.params), per_layer)
    ]
    states = _first_states(call, backend, between, zeros_given=K is not None)
    steps = [layers.step_of(stack, backend, of_layer) for of_layer in weights]
    if stack.checkpoint_every:
        steps = [layers.recomputed(step) for step in steps]
    reads = [of_layer() for of_layer in weights] if wave else []
    for n, of_layer in enumerate(call.noise or ()):
        noises = noise_of_chunks(of_layer, x.shape[0], K or x.shape[0], call.route.B, stack.directions)
        steps[n] = zoning(steps[n], noises)
        if wave:
            reads[n] = [*reads[n], *noises]
    if wave:
        y, finals, others = _wavefront(call, x, steps, states, reads, wave)
    else:
        windows = layers.windows_of(call, between)
        y, finals, others = _one_by_one(call, x, steps, states, windows, K)
    if backend != "torch":
        finals = [_as_asked(call, n, of_layer.states, weights[n]) for n, of_layer in enumerate(finals)]
    outputs = [call.as_given(of_steps) for of_steps in (y, *others)]
    whole = (of_all[0] if len(of_all) == 1 else torch.cat(of_all) for of_all in zip(*finals, strict=True))
    return outputs[0], tuple(final.to(wide) for final in whole), *outputs[1:]


def _first_states(call: Call, backend: str, dtype: torch.dtype, zeros_given: bool) -> list[Any]:
    """Each layer's state before the first step. Zeros are None where the kernel can do without them."""
    D, count = call.stack.directions, call.stack.num_layers
    if call.hx is None and backend != "torch" and not zeros_given:
        return [layers.State(None)] * count
    of_layers = [tuple(s[n * D : (n + 1) * D].to(dtype) for s in call.state) for n in range(count)]
    if backend == "torch":
        return of_layers
    if call.route.P == call.route.H:
        return [layers.State(of_layer) for of_layer in of_layers]
    # The recurrence of a projected layer has the states m and c (projection.py).
    return [layers.State((torch.zeros_like(c), c), None if call.hx is None else h) for h, c in of_layers]


def _as_asked(call: Call, n: int, finals: tuple, weights: layers.Weights) -> tuple[Tensor, ...]:
    """The final states of a layer, each (D, B, H). In a projected layer h follows from m."""
    D = call.stack.directions
    if call.route.P == call.route.H:
        return finals
    lengths = call.options.cu_seqlens.diff() if call.ragged else call.options.lengths
    W_hr = layers.stacked(layers.by_role(weights(), D)[-1])
    h_0 = call.state[0][n * D : (n + 1) * D]
    return projection.after(finals[0], W_hr, h_0, None if call.hx is None else lengths), *finals[1:]


def _one_by_one(
    call: Call, x: Tensor, steps: list[layers.Step], states: list, windows: list, K: int | None
) -> tuple[Tensor, list, list[Tensor]]:
    p, others, x = call.stack.dropped, [], _readable(call, x)
    for n, (step, window) in enumerate(zip(steps, windows, strict=True)):
        if p and n:
            x = drop(x, drop_mask(x, p), p)
        x, states[n], others = layers.in_chunks(step, x, states[n], K or x.shape[0], call.stack.directions, window)
    return x, states, others


def _wavefront(
    call: Call, x: Tensor, steps: list[layers.Step], states: list, reads: list[list[Tensor]], wave: int
) -> tuple[Tensor, list, list[Tensor]]:
    p, streams = call.stack.dropped, wavefront.streams_of(x.device, len(steps))
    if p:
        for n in range(1, len(steps)):
            mask = drop_mask(x.new_empty(()).expand(call.route.T, x.shape[1], call.route.P), p)
            steps[n] = dropping(steps[n], mask.split(wave), p)
            reads[n] = [*reads[n], mask]
    ys, states = wavefront.run(steps, x.split(wave), states, reads, streams)
    return torch.cat(ys), states, []


def _chunk_of_wave(call: Call) -> int | None:
    """The chunk of a wavefront in steps, or None. torch.compile does not trace streams, and sequences are never cut."""
    return call.route.chosen.wavefront if call.options.plain and not torch.compiler.is_compiling() else None


def _lacks_chunks(call: Call) -> bool:
    both = call.ragged or call.stack.bidirectional or call.backend == "torch"
    return bool(call.stack.checkpoint_every) and not call.options.plain and both


def _is_straight(call: Call) -> bool:
    chunks = call.stack.checkpoint_every or _chunk_of_wave(call)
    return call.backend in KERNELS and not chunks and call.route.P == call.route.H


# A call takes the first path whose condition it meets.
PATHS: tuple[tuple[Callable[[Call], bool], Callable[[Call], Found]], ...] = (
    (lambda call: call.route.T == 0, _no_step),
    (_lacks_chunks, _missing),
    (lambda call: call.backend == "torch" and not call.options.plain, _segments),
    (lambda call: call.backend == "torch" and call.stack.checkpoint_every is None, _torchs),
    (_is_straight, _straight),
    (lambda call: True, _layered),
)


def _choose(call: Call) -> Callable[[Call], Found]:
    for applies, path in PATHS:
        if applies(call):
            return path
    raise AssertionError("the last path is for every call")
