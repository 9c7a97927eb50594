"""A call is checked and planned once. The result is kept for the next call like it."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..cells import CELLS
from ..compat import driver
from ..compat.cached import cached
from ..device import DeviceSpec
from ..ops.layer import Call as LayerCall
from ..ops.layer import Layer, plain
from ..ops.library import observed, watching
from ..ops.prepared import Prepared
from ..planning import cpu, tuning
from ..planning.planner import Plan, plan, torch_precision
from ..planning.tiers import KERNELS, TIERS
from ..stack import Stack
from .layers import layer_of
from .options import PLAIN, Options, as_tensors, check_options, checked_values
from .validation import check_call, check_params, check_state, compute_dtype

FALLBACKS = {"torch": "torch's own kernel", "reference": "a loop over time in torch"}


class FallbackWarning(UserWarning):
    """Warns that `backend="auto"` does not run the planned kernel of fastrnn on a GPU. The message says why.

    A call then runs another kernel of fastrnn, torch's own kernel, or the reference. Each reason warns once.
    `fastrnn.convert` warns with this class too, about layers that it leaves as they are.

    Examples:
        >>> import warnings, fastrnn
        >>> warnings.simplefilter("error", fastrnn.FallbackWarning)  # make every fallback an error
    """


class Route(NamedTuple):
    """Everything about a call that follows from sizes, dtypes, devices and options. A call like it reuses this."""

    T: int  # of a ragged input, the total of all steps
    B: int
    H: int
    P: int  # the size of h: H, or proj_size
    chosen: Plan
    path: Any  # the function in paths.py that runs the call
    dtype: torch.dtype  # the dtype to compute in
    wide: torch.dtype  # the dtype of states
    casts: bool  # whether some tensor has another dtype, and is cast
    layer: Layer
    ready: Prepared | None  # for one launch a layer; None where operators are observed (ops/library.py)
    # What a call like this one goes by, if it has no states and no options (known):
    again: bool = False  # whether it needs nothing but its path
    plain: LayerCall | None = None  # of each layer, if nothing else happens between the launches


class Call(NamedTuple):
    """A call whose arguments were checked."""

    stack: Stack
    input: Tensor
    hx: Any  # as the caller gave it
    params: Sequence[Tensor]
    options: Options
    route: Route
    rows: Tensor | None = None  # the table of sequences (sequences.py), if it was made on the CPU
    noise: Sequence[Tensor] | None = None  # one for each layer: zoneout in training (noise.py)

    @property
    def backend(self) -> str:
        return self.route.chosen.backend

    @property
    def ragged(self) -> bool:
        return self.options.cu_seqlens is not None

    @property
    def x(self) -> Tensor:
        """The input with time first."""
        return self.as_given(self.input)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The first states. They are zeros if the caller gave none."""
        if self.hx is not None:
            return as_tuple(self.hx, self.stack)
        rows = self.stack.num_layers * self.stack.directions
        sizes = (self.route.P, *(self.route.H for _ in range(self.stack.states - 1)))
        of_size = {size: self.input.new_zeros(rows, self.route.B, size) for size in sizes}
        return tuple(of_size[size] for size in sizes)

    def as_given(self, y: Tensor) -> Tensor:
        """Swap time and batch if the input has the batch first: of an output, and of the input itself."""
        return y.transpose(0, 1) if self.stack.batch_first and not self.ragged else y


def as_tuple(hx: Any, stack: Stack) -> tuple[Tensor, ...]:
    return tuple(hx) if stack.states > 1 else (hx,)


@functools.cache
def _warn_fallback(what: str, why: str) -> None:
    warnings.warn(f"backend='auto' runs {what}: {why}", FallbackWarning, stacklevel=4)


def backend_of(chosen: Plan) -> str:
    """The plan's backend. On a GPU, warn once for each reason why no kernel of ours, or another one, runs."""
    if chosen.backend in FALLBACKS and chosen.why != "asked for" and chosen.device.startswith("cuda"):
        _warn_fallback(FALLBACKS[chosen.backend], chosen.why)
    elif driver.refused and not torch.compiler.is_compiling():  # a warning would break the graph
        for why in driver.refused.values():
            if why in chosen.why:
                _warn_fallback(f"the {chosen.backend} kernel", why)
    return chosen.backend


def until_launched(backend: str, run: Callable[..., Any], *args: Any) -> Any:
    """Call run(*args), and again if the driver refuses a kernel of backend="auto": the planner then leaves it out."""
    for _ in TIERS:
        try:
            return run(*args)
        except driver.LaunchRefusedError:
            if backend != "auto":
                raise
    return run(*args)


_routes: dict[tuple, Route] = {}
_MOST_ROUTES = 1024


def checked(
    stack: Stack, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options, choose: Callable[[Call], Any]
) -> Call:
    """Check a call and return it, or raise. Nothing is computed or changed before. choose finds the call's path."""
    state = () if hx is None else as_tuple(hx, stack)
    if hx is not None:
        check_state(state, stack.states)
    tensors = [input, *params, *state]
    if options is not PLAIN:
        options = as_tensors(options, input, stack)
        tensors += [t for t in (*options[:3], *(options.reset_state or ())) if t is not None]
    rows, seen, route, key = None, watching(), None, ()
    if not seen:
        key = _key(stack, tensors, hx is not None, options)
        route = _routes.get(key)
    if route is None:
        route = _route(stack, input, state, params, options, choose)
        seen = seen or observed(tensors)
        if not seen:  # else sizes may be symbols, and tensors may have no values: keep and prepare nothing
            route = _kept(key, route, stack, input, options)
    if options is not PLAIN:
        options, rows = checked_values(options, input, route.T, stack.batch_first, seen)
    if stack.tie_directions:
        params = stack.of_each_direction(params)
    return Call(stack, input, hx, params, options, route, rows)


def _kept(key: tuple, route: Route, stack: Stack, input: Tensor, options: Options) -> Route:
    """Prepare a route, and keep it for later calls."""
    route = _prepared(route, stack, input, options)
    if route.ready is not None:
        again = not (stack.drops_connections or stack.zones_out)
        route = route._replace(again=again, plain=_plain(route, route.ready, stack))
    if len(_routes) >= _MOST_ROUTES:
        _routes.clear()
    _routes[key] = route
    return route


def known(stack: Stack, input: Tensor, params: Sequence[Tensor]) -> Call | None:
    """A checked call without states and options, if a call like it was checked before. Else None."""
    # No route is kept for subclasses of Tensor.
    route = None if watching() else _routes.get(_key(stack, (input, *params), False, PLAIN))
    if route is None or not route.again:
        return None
    if stack.tie_directions:
        params = stack.of_each_direction(params)
    return Call(stack, input, None, params, PLAIN, route)


def _key(stack: Stack, tensors: Sequence[Tensor], with_state: bool, options: Options) -> tuple:
    """Everything that a Route depends on."""
    which = () if options is PLAIN else (*[given is None for given in options[:-1]], options.cell_states)
    dtype = compute_dtype(tensors[0])
    sizes = tuple([(type(tensor), tensor.shape, tensor.dtype, tensor.device) for tensor in tensors])
    return stack, with_state, which, sizes, dtype, torch.is_grad_enabled(), _facts(stack, dtype)


def _route(
    stack: Stack, input: Tensor, state: tuple, params: Sequence[Tensor], options: Options, choose: Callable[[Call], Any]
) -> Route:
    """Check a call, plan it, and choose its path."""
    D, gates = stack.directions, stack.of_cell.gates
    check_params(stack, params)
    H = params[0].shape[0] // gates
    P = params[1].shape[-1] if stack.num_heads == 1 else H
    sizes = (P, *[H] * (stack.states - 1))
    T, B = check_options(options, input, stack, sizes)
    ragged = options.cu_seqlens is not None
    may_be_empty = ragged or options.lengths is not None
    check_call(input, state, params, (stack.num_layers * D, B, sizes), T, may_be_empty, stack.of_cell.wide)
    dtype = compute_dtype(input)
    wide = stack.of_cell.state_dtype(dtype)
    casts = any(tensor.dtype != dtype for tensor in (input, *params, *state))
    chosen = planned(stack, H, T // max(B, 1) if ragged else T, B, input, options.kind if P == H else "")
    route = Route(T, B, H, P, chosen, None, dtype, wide, casts, layer_of(stack, chosen.backend), None)
    return route._replace(path=choose(Call(stack, input, None, params, options, route)))


def _prepared(route: Route, stack: Stack, input: Tensor, options: Options) -> Route:
    """The same route, with its launches prepared if a kernel of ours runs."""
    if route.chosen.backend not in KERNELS:
        return route
    slots = (route.T,) if options.cu_seqlens is not None else (route.T, route.B)
    like = input.new_empty(0, dtype=route.dtype)
    return route._replace(ready=route.layer.prepare(slots, route.B, route.H // stack.num_heads, like))


def _plain(route: Route, ready: Prepared, stack: Stack) -> LayerCall | None:
    """Return the Call of each layer. None if more than launches is needed: casts, chunks, dropout, a projection."""
    chunks, changed = stack.checkpoint_every or route.chosen.wavefront, route.casts or stack.num_heads > 1
    if chunks or changed or stack.dropped or route.P != route.H or route.T == 0:
        return None
    return plain(route.layer, ready, 4 if stack.bias else 2)


def planned(stack: Stack, H: int, T: int, B: int, input: Tensor, kind: str = "") -> Plan:
    """The plan of a call. Under torch.export a size may be a symbol: the plan is then that of the example's size.

    kind: one of planning.cpu.KINDS, for which torch's kernels on a CPU are called several times.
    """
    T, B = (size.node.hint if isinstance(size, torch.SymInt) else size for size in (T, B))
    dtype = compute_dtype(input)
    facts = torch.is_grad_enabled(), _facts(stack, dtype)
    found = _planned(stack, H, max(T, 1), max(B, 1), dtype, input.device, facts)
    if found.device != "cpu" or stack.backend != "auto":
        return found
    if kind and stack.of_torch:
        sizes = found.seq_len, found.batch_size, H
        backend, why = cpu.choose(found.cell, sizes, dtype, kind=kind, training=found.training)
        found = replace(found, backend=backend, why=why)
    if found.backend == cpu.NAME and observed((input,)):
        # A compiler, an exporter or a transform knows torch's operators on CPU tensors, and may not know ours.
        why = "the call is observed: by torch.compile, an exporter, a transform or a mode"
        return replace(found, backend="torch" if stack.of_torch else "reference", why=why)
    return found


def plan_of(stack: Stack, H: int, P: int, input: Any, options: Options) -> Plan:
    """The plan of a call that is not run. Values of options are not looked at."""
    if isinstance(input, PackedSequence):
        if not options.plain:
            raise ValueError("lengths, cu_seqlens, reset: expected None beside a PackedSequence")
        B = int(input.batch_sizes[0])
        return planned(stack, H, input.data.shape[0] // B, B, input.data, "lengths" if P == H else "")
    if options.plain:
        T = input.shape[1 if stack.batch_first and input.dim() == 3 else 0]
        B = input.shape[0 if stack.batch_first else 1] if input.dim() == 3 else 1
        return planned(stack, H, T, B, input)
    options = as_tensors(options, input, stack)
    T, B = check_options(options, input, stack, (P, *[H] * (stack.states - 1)))
    T = T if options.cu_seqlens is None else T // max(B, 1)
    return planned(stack, H, T, B, input, options.kind if P == H else "")


def _facts(stack: Stack, dtype: torch.dtype) -> tuple:
    """Everything beside the call that a plan depends on. Cells, and functions that tests replace, count by identity."""
    if torch.compiler.is_compiling():  # plans are not kept there
        return ()
    precision = torch_precision() if dtype == torch.float32 else None
    return plan, DeviceSpec.of, id(tuning.TUNED), id(CELLS[stack.cell]), len(driver.refused), precision


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
        zoneout=stack.zoneout,
        training=facts[0],
    )
