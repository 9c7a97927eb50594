"""Every implementation as a function from the input to y, with the tensors whose gradients it gives.

fastrnn's backends, torch.nn, the step loop that people write around torch.nn's cells, and, where they are installed,
FlashRNN, haste and TorchRL's modules. `Missing` says why one does not run a workload here.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.cells import CELLS
from fastrnn.planning.kernel_plan import GridTooLargeError
from fastrnn.planning.tiers import KERNELS

from . import others
from .workload import Data


class Missing(Exception):  # noqa: N818 - not an error
    """Why an implementation does not run a workload here."""


@dataclass(frozen=True)
class Built:
    """One implementation on one workload's parameters."""

    call: Callable[[Tensor], Tensor]  # y (T, B, D * heads * H) of the input (T, B, I)
    leaves: list[Tensor]
    in_order: Callable[[list[Tensor]], list[Tensor]] = list  # gradients of the leaves as those of torch.nn's parameters
    runs: str = ""  # of ours: the backend that the plan says


Builder = Callable[[Data], Built]


def per_head(build: Builder) -> Builder:
    """One network a head, as one has to where heads are unknown; on a GPU each on a stream of its own."""

    def of_all(data: Data) -> Built:
        workload = data.workload
        if workload.heads == 1:
            return build(data)
        if workload.layers > 1:
            raise Missing("a head is no network of its own where there are layers: all heads meet between them")
        heads = [build(data.head(number)) for number in range(workload.heads)]
        streams = [torch.cuda.Stream() for _ in heads] if data.device != "cpu" else []

        def joined(ys: list[Tensor]) -> Tensor:  # (T, B, D * H) of each
            return torch.stack([y.unflatten(-1, (workload.shape.D, -1)) for y in ys], -2).flatten(-3)

        def call(input: Tensor) -> Tensor:
            if not streams:
                return joined([head.call(input) for head in heads])
            here, ys = torch.cuda.current_stream(), []
            for head, stream in zip(heads, streams, strict=True):
                stream.wait_stream(here)
                input.record_stream(stream)
                with torch.cuda.stream(stream):
                    ys.append(head.call(input))
                here.wait_stream(stream)
                ys[-1].record_stream(here)
            return joined(ys)

        def in_order(gradients: list[Tensor]) -> list[Tensor]:
            given = iter(gradients)
            of_heads = [head.in_order([next(given) for _ in head.leaves]) for head in heads]
            gates = (-1, workload.shape.H)  # of the rows of a head's parameter
            of_params = zip(*of_heads, strict=True)
            return [torch.stack([g.unflatten(0, gates) for g in of_one], 1).flatten(0, 2) for of_one in of_params]

        return Built(call, [leaf for head in heads for leaf in head.leaves], in_order, heads[0].runs)

    return of_all


def loaded(module: Any, data: Data) -> Any:
    """A module with the parameters of data."""
    module = module.to(data.device, data.params[0].dtype)
    with torch.no_grad():
        for own, given in zip(module.parameters(), data.params, strict=True):
            own.copy_(given)
    return module


def torch_nn(data: Data) -> Built:
    """torch.nn: cuDNN on a GPU, ATen on a CPU; ragged by packing, resets by cutting episodes into rows and packing."""
    name, options = data.workload.nn()
    if not CELLS[data.workload.cell].of_torch:
        raise Missing(f"torch.nn has no {name}")
    module = loaded(getattr(torch.nn, name)(**options), data)
    call = {"plain": _plain, "ragged": _packed, "reset": _cut}[data.workload.kind](module, data)
    return Built(call, list(module.parameters()))


def _plain(module: Any, data: Data) -> Callable[[Tensor], Tensor]:
    return lambda input: module(input)[0]


def _packed(module: Any, data: Data) -> Callable[[Tensor], Tensor]:
    def call(input: Tensor) -> Tensor:
        packed = pack_padded_sequence(input, data.lengths, enforce_sorted=False)  # type: ignore[arg-type]
        return pad_packed_sequence(module(packed)[0], total_length=len(input))[0]

    return call


def _cut(module: Any, data: Data) -> Callable[[Tensor], Tensor]:
    """What libraries do for cuDNN (TorchRL's pad): each episode is a row, padded to the longest, packed."""
    assert data.reset is not None

    def call(input: Tensor) -> Tensor:
        T, B, _ = input.shape
        starts = data.reset.T.clone()  # type: ignore[union-attr]
        starts[:, 0] = True
        first = starts.flatten().nonzero().squeeze(1)
        lengths = torch.diff(first, append=first.new_tensor([T * B]))
        rows = torch.split(input.transpose(0, 1).flatten(0, 1), lengths.tolist())
        packed = pack_padded_sequence(torch.nn.utils.rnn.pad_sequence(rows), lengths.cpu(), enforce_sorted=False)
        y, _ = pad_packed_sequence(module(packed)[0])
        inside = torch.arange(len(y), device=y.device)[:, None] < lengths
        return y.transpose(0, 1)[inside.T].unflatten(0, (B, T)).transpose(0, 1)

    return call


class SLSTMCell(torch.nn.LSTMCell):
    """A step of the sLSTM by its specification; torch.nn has none. c, n and m are float32 at least."""

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        h, *wide = state
        W_x, W_h = linear(x, self.weight_ih, self.bias_ih), linear(h, self.weight_hh, self.bias_hh)
        gates = [share.unflatten(-1, (4, -1)).to(wide[0].dtype) for share in (W_x, W_h)]
        h_new, *wide = CELLS["slstm"].step(*gates, state)
        return h_new.to(h.dtype), *wide


def step_loop(data: Data) -> Built:
    """The loop that people write where torch.nn has no feature: its cell a step, the state masked between steps."""
    workload, params = data.workload, data.params
    _, _, H, D = workload.shape
    one: Any = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "slstm": SLSTMCell}.get(workload.cell)
    if one is None:
        one = functools.partial(torch.nn.RNNCell, nonlinearity=workload.cell.removeprefix("rnn_"))
    of_cell = CELLS[workload.cell]
    cells = []
    for place in range(workload.layers * D):
        cell: Any = one(workload.I if place < D else D * H, H)
        cell.to(data.device, params[0].dtype)
        with torch.no_grad():
            for own, given in zip(cell.parameters(), params[4 * place : 4 * place + 4], strict=True):
                own.copy_(given)
        cells.append(cell)

    def walk(cell: Any, x: Tensor, direction: int) -> Tensor:
        T, B, _ = x.shape
        wide = (x.new_zeros(B, H, dtype=of_cell.state_dtype(x.dtype)),) * (len(of_cell.states) - 1)
        state = x.new_zeros(B, H), *wide
        y: list[Any] = [None] * T
        for t in reversed(range(T)) if direction else range(T):
            boundary = t + direction  # a segment begins at it, or, backwards, ends before it
            if data.reset is not None and boundary < T:
                keep = ~data.reset[boundary, :, None]
                state = tuple(s * keep for s in state)
            new = cell(x[t], state) if len(state) > 1 else (cell(x[t], state[0]),)
            if data.valid is None:
                state, y[t] = new, new[0]
            else:
                inside = data.valid[t]
                state = tuple(torch.where(inside, n, s) for n, s in zip(new, state, strict=True))
                y[t] = new[0] * inside
        return torch.stack(y)

    def call(x: Tensor) -> Tensor:
        for layer in range(workload.layers):
            ys = [walk(cells[layer * D + d], x, d) for d in range(D)]
            x = torch.cat(ys, -1) if D == 2 else ys[0]
        return x

    return Built(call, [p for cell in cells for p in cell.parameters()])


def ours(backend: str) -> Builder:
    def build(data: Data) -> Built:
        module = loaded(data.workload.module(backend=backend), data)
        segments: dict[str, Any] = {"lengths": data.lengths, "reset": data.reset}
        segments = {key: value.to(data.device) for key, value in segments.items() if value is not None}
        try:
            plan = module.plan(data.input, **segments)
        except (NotImplementedError, GridTooLargeError) as reason:
            raise Missing(str(reason)) from None
        return Built(lambda input: module(input, **segments)[0], list(module.parameters()), runs=plan.backend)

    return build


def peer(build: Callable[[Data], tuple]) -> Builder:
    """An adapter of others.py: why it does not run as Missing."""
    return lambda data: Built(*or_missing(build, data))


def or_missing(run: Callable, *args: Any) -> Any:
    """Return the result of a peer's code. If it raises, raise Missing with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            return run(*args)
    except (Missing, torch.cuda.OutOfMemoryError):
        raise
    except ImportError as reason:
        raise Missing(f"not installed: {reason}") from None
    except NotImplementedError as reason:
        raise Missing(str(reason)) from None
    except (Exception, SystemExit) as reason:
        raise Missing(f"{type(reason).__name__}: {str(reason).strip() or 'it says no more'}") from None


PEERS: dict[str, Builder] = {
    "FlashRNN": peer(others.flashrnn),
    "haste": per_head(peer(others.haste)),
    "TorchRL scan": per_head(peer(others.torchrl("scan"))),
    "TorchRL triton": per_head(peer(others.torchrl("triton"))),
}
IMPLEMENTATIONS: dict[str, Builder] = {
    "torch.nn": per_head(torch_nn),
    "step loop": per_head(step_loop),
    **{f"fastrnn {backend}": ours(backend) for backend in ("auto", *KERNELS, "reference")},
    **PEERS,
}
