"""The ways a call may go: validate, plan once, and take the first path that is for it."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import driver
from ..compat.cached import cached
from ..device import DeviceSpec
from ..planning import tuning
from ..planning.planner import Plan, plan, torch_precision
from ..planning.tiers import TIERS
from ..sequences import stops_at_torchs_kernels, untraced
from ..stack import Stack
from ..torch_path import segments
from . import layers, projection, wavefront
from .dropout import drop, drop_mask, dropping
from .options import PLAIN, Options, check_options
from .validation import check_call, check_params, check_state, compute_dtype

FALLBACKS = {"torch": "torch's own kernel", "reference": "a loop over time in torch"}
# Output, the final states, and the others than h of every step where they are asked for.
Found = tuple[Any, ...]


class FallbackWarning(UserWarning):
    """backend="auto" runs torch's own kernel on a GPU, or not the planned one of ours; the message says why."""


class Call(NamedTuple):
    """A call that was checked."""

    stack: Stack
    input: Tensor
    hx: Any  # as given
    params: Sequence[Tensor]
    options: Options  # checked
    T: int  # total of a ragged input
    B: int
    H: int
    P: int  # the size of h, which is another where it is projected
    chosen: Plan | None = None

    @property
    def ragged(self) -> bool:
        return self.options.cu_seqlens is not None

    @property
    def x(self) -> Tensor:
        """Input with time first."""
        return self.input.transpose(0, 1) if self.stack.batch_first and not self.ragged else self.input

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The first states; zeros where none are given."""
        if self.hx is not None:
            return tuple(self.hx) if self.stack.states > 1 else (self.hx,)
        rows = self.stack.num_layers * self.stack.directions
        sizes = (self.P, *(self.H for _ in range(self.stack.states - 1)))
        of_size = {size: self.input.new_zeros(rows, self.B, size) for size in sizes}
        return tuple(of_size[size] for size in sizes)

    def as_given(self, y: Tensor) -> Tensor:
        """An output with time first, as the input was."""
        return y.transpose(0, 1) if self.stack.batch_first and not self.ragged else y


@functools.cache
def _warn_fallback(what: str, why: str) -> None:
    warnings.warn(f"backend='auto' runs {what}: {why}", FallbackWarning, stacklevel=4)


def backend_of(chosen: Plan) -> str:
    """The plan's backend; warns, once a reason, where a GPU gets no kernel of ours or refused the one it should get."""
    if chosen.backend in FALLBACKS and chosen.why != "asked for" and chosen.device.startswith("cuda"):
        _warn_fallback(FALLBACKS[chosen.backend], chosen.why)
    elif driver.refused and not torch.compiler.is_compiling():  # which would break its graph to warn
        for why in driver.refused.values():
            if why in chosen.why:
                _warn_fallback(f"the {chosen.backend} kernel", why)
    return chosen.backend


def run(stack: Stack, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options = PLAIN) -> Found:
    """Output, the final states as a tuple and, where they are asked for, the cell states of every step.

    Where the driver refuses a kernel that backend="auto" chose, the call plans and runs again: the planner leaves it
    out then. Inside torch.compile a launch is too late for that: the error passes, and the next call plans anew.
    """
    call = checked(stack, input, hx, params, options)
    if stops_at_torchs_kernels() and backend_of(planned(call)) == "torch":
        # torch.compile breaks its graph here; of a NamedTuple torch 2.11 hands on nothing there.
        return _run_untraced(tuple(stack), input, hx, params, tuple(options))
    if torch.compiler.is_compiling():
        return _run(call)
    for _ in TIERS:
        try:
            return _run(call)
        except driver.LaunchRefusedError:
            if stack.backend != "auto":
                raise
    return _run(call)


def checked(stack: Stack, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options) -> Call:
    """The call, or an error: nothing was computed or changed before."""
    D, gates = stack.directions, stack.of_cell.gates
    check_params(stack, params)
    params = stack.of_each_direction(params)
    H = params[0].shape[0] // gates
    P = params[1].shape[-1] if stack.num_heads == 1 else H
    sizes = (P, *[H] * (stack.states - 1))
    T, B, options = check_options(options, input, stack, sizes)
    call = Call(stack, input, hx, params, options, T, B, H, P)
    state = () if hx is None else call.state
    if hx is not None:
        check_state(state, stack.states)
    may_be_empty = call.ragged or options.lengths is not None
    check_call(call.input, state, params, (stack.num_layers * D, B, sizes), T, may_be_empty, stack.of_cell.wide)
    return call


def _run(call: Call) -> Found:
    if call.T == 0:
        return _no_step(call)
    call = call._replace(chosen=planned(call))
    backend = backend_of(call.chosen)  # type: ignore[arg-type]
    for applies, path in PATHS:
        if applies(call, backend):
            return path(call, backend)
    raise AssertionError("the last path is for every call")


def planned(call: Call) -> Plan:
    """The plan of a call; torch.export's sizes are symbols where they may change: it is that of its example."""
    T, B = (size.node.hint if isinstance(size, torch.SymInt) else size for size in (call.T, call.B))
    T, B = max(1, T // max(B, 1) if call.ragged else T), max(B, 1)
    return _planned(call.stack, call.H, T, B, compute_dtype(call.input), call.input.device, _facts())


def _facts() -> tuple:
    """What a plan depends on beside the call: it is made again where any of this is another."""
    if torch.compiler.is_compiling():  # which keeps no plan
        return ()
    return plan, DeviceSpec.of, id(tuning.TUNED), torch_precision(), len(driver.refused)


@cached
def _planned(stack: Stack, H: int, T: int, B: int, dtype: torch.dtype, device: torch.device, facts: tuple) -> Plan:
    return plan(
        stack.cell,
        hidden_size=H,
        batch_size=B,
        seq_len=T,
        directions=stack.directions,
        dtype=dtype,
        device=str(device),
        backend=stack.backend,
        num_layers=stack.num_layers,
        checkpoint_every=stack.checkpoint_every,
        num_heads=stack.num_heads,
        clip_grad_state=stack.clip_grad_state,
        clip_state=stack.clip_state,
    )


def _no_step(call: Call) -> Found:
    """All sequences are empty: run one step, which is padding of all, and leave it out."""
    x = call.input.unsqueeze(1).expand(-1, call.B, -1) if call.ragged else call.x
    none = torch.zeros(call.B, dtype=torch.int64, device=x.device)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    options = Options(none, cell_states=call.options.cell_states)
    output, finals, *c = run(call.stack._replace(batch_first=False), padded, call.hx, call.params, options)

    def nothing(y: Tensor) -> Tensor:
        return y[:0].flatten(0, 1) if call.ragged else call.as_given(y[:0])

    return nothing(output), finals, *map(nothing, c)


@untraced
def _run_untraced(stack: tuple, input: Tensor, hx: Any, params: Sequence[Tensor], options: tuple) -> Found:
    return run(Stack(*stack), input, hx, params, Options(*options))


def _missing(call: Call, backend: str) -> Found:
    what = (
        "packed or ragged sequences"
        if call.ragged
        else "lengths, resets or cell states of both directions or backend='torch'"
    )
    raise NotImplementedError(f"checkpoint_every with {what} is missing")


def _segments(call: Call, backend: str) -> Found:
    """Lengths, resets and cell states by torch's kernels."""
    lengths, cu_seqlens, reset, reset_state, cell_states = call.options
    output, finals, c = segments.run(
        call.stack, call.x, call.state, call.params,
        lengths=lengths, cu_seqlens=cu_seqlens, reset=reset, reset_state=reset_state, cell_states=cell_states,
    )  # fmt: skip
    return call.as_given(output), finals, *([] if c is None else [call.as_given(c)])


def _torchs(call: Call, backend: str) -> Found:
    """All layers by torch's own kernel, in one call."""
    output, *finals = call.stack.torch_kernel(call.input, state=call.state, params=list(call.params))
    return output, tuple(finals)


def _layered(call: Call, backend: str) -> Found:
    """Layer by layer by a kernel of ours or the reference, or in chunks; or as a wavefront of chunks."""
    stack, options, chosen = call.stack, call.options, call.chosen
    assert chosen is not None
    x = call.x
    if backend != "torch":  # which narrows by itself where autocast wants it
        x = x.to(compute_dtype(call.input))
    dtype = x.dtype
    # torch.compile does not trace streams; nor are sequences cut for a wavefront.
    wave = chosen.wavefront if options.plain and not torch.compiler.is_compiling() else None
    K = wave or stack.checkpoint_every
    # From chunk to chunk of a kernel the state is fp32, as it is from step to step.
    wide = stack.of_cell.state_dtype(dtype)
    between = torch.float32 if K and chosen.kernel and dtype.itemsize == 2 else wide
    per_layer = len(call.params) // stack.num_layers
    weights = [
        layers.weights_of(call.params[i : i + per_layer], dtype, chunked=K is not None)
        for i in range(0, len(call.params), per_layer)
    ]
    states = _first_states(call, backend, between, zeros_given=K is not None)
    steps = [layers.step_of(stack, backend, of_layer) for of_layer in weights]
    if stack.checkpoint_every:
        steps = [layers.recomputed(step) for step in steps]
    if wave:
        y, finals, others = _wavefront(call, x, steps, states, [of_layer() for of_layer in weights], wave)
    else:
        windows = layers.windows_of(stack, options, call.T, call.B, between)
        y, finals, others = _one_by_one(call, x, steps, states, windows, K)
    if backend != "torch":
        finals = [_apart(call, layer, of_layer, weights[layer]) for layer, of_layer in enumerate(finals)]
    outputs = [call.as_given(of_steps) for of_steps in (y, *others)]
    whole = (of_all[0] if len(of_all) == 1 else torch.cat(of_all) for of_all in zip(*finals, strict=True))
    return outputs[0], tuple(final.to(wide) for final in whole), *outputs[1:]


def _first_states(call: Call, backend: str, dtype: torch.dtype, zeros_given: bool) -> list[Any]:
    """Each layer's state before the first step; zeros are None where the kernel may know of none."""
    D, count = call.stack.directions, call.stack.num_layers
    if call.hx is None and backend != "torch" and not zeros_given:
        return [layers.State(None)] * count
    of_layers = [[s[layer * D : (layer + 1) * D].to(dtype) for s in call.state] for layer in range(count)]
    if backend == "torch":
        return [tuple(of_layer) for of_layer in of_layers]
    if call.P == call.H:
        return [layers.State(layers.stacked(of_layer)) for of_layer in of_layers]
    # A projected layer's recurrence is of m and c (projection.py).
    return [
        layers.State(layers.stacked([torch.zeros_like(c), c]), None if call.hx is None else h) for h, c in of_layers
    ]


def _apart(call: Call, layer: int, state: layers.State, weights: layers.Weights) -> tuple[Tensor, ...]:
    """The final states of a layer, (D, B, H) each."""
    assert state.states is not None
    finals = tuple(state.states[n] for n in range(call.stack.states))
    D = call.stack.directions
    if call.P == call.H:
        return finals
    lengths = call.options.cu_seqlens.diff() if call.ragged else call.options.lengths
    W_hr = layers.stacked(layers.by_role(weights(), D)[-1])
    h_0 = call.state[0][layer * D : (layer + 1) * D]
    return projection.after(finals[0], W_hr, h_0, None if call.hx is None else lengths), *finals[1:]


def _one_by_one(
    call: Call, x: Tensor, steps: list[layers.Step], states: list, windows: list, K: int | None
) -> tuple[Tensor, list, list[Tensor]]:
    p, others = call.stack.dropped, []
    if call.options.lengths is not None:
        # What stands in the padding, even NaN, must not reach a product: 0 * NaN is NaN in W_ih's gradient.
        live = torch.arange(call.T, device=x.device)[:, None] < call.options.lengths
        x = x.masked_fill(~live[..., None], 0)
    for layer, (step, window) in enumerate(zip(steps, windows, strict=True)):
        if p and layer:
            x = drop(x, drop_mask(x, p), p)
        K_of = K or x.shape[0]
        x, states[layer], others = layers.in_chunks(step, x, states[layer], K_of, call.stack.directions, window)
    return x, states, others


def _wavefront(
    call: Call, x: Tensor, steps: list[layers.Step], states: list, reads: list[list[Tensor]], wave: int
) -> tuple[Tensor, list, list[Tensor]]:
    p, streams = call.stack.dropped, wavefront.streams_of(x.device, len(steps))
    if p:
        for layer in range(1, len(steps)):
            mask = drop_mask(x.new_empty(()).expand(call.T, x.shape[1], call.P), p)
            steps[layer] = dropping(steps[layer], mask.split(wave), p)
            reads[layer] = [*reads[layer], mask]
    ys, states = wavefront.run(steps, x.split(wave), states, reads, streams)
    return torch.cat(ys), states, []


def _no_chunks(call: Call, backend: str) -> bool:
    both = call.ragged or call.stack.bidirectional or backend == "torch"
    return bool(call.stack.checkpoint_every) and not call.options.plain and both


# The first one that applies is taken.
PATHS: tuple[tuple[Callable[[Call, str], bool], Callable[[Call, str], Found]], ...] = (
    (_no_chunks, _missing),
    (lambda call, backend: backend == "torch" and not call.options.plain, _segments),
    (lambda call, backend: backend == "torch" and call.stack.checkpoint_every is None, _torchs),
    (lambda call, backend: True, _layered),
)
