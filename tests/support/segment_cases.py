"""Batches of unequal lengths with resets, and the loop over rows, layers, directions and time that they are held to."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.cells import CELLS
from fastrnn.stack import Stack
from fastrnn.torch_path import segments

I, H = 3, 4
RESET_STATES = ("none", "learned", "per row", "per step")


class Batch(NamedTuple):
    """Arguments of segments.run. In the loop x is (T, B, I) and per-step states are (T, L*D, B, H) in both layouts."""

    cell: str
    L: int
    D: int
    bias: bool
    x: Tensor
    state: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    reset_state: tuple[Tensor, ...]  # or ()
    lengths: Tensor
    reset: Tensor
    ragged: bool = False

    def tensors(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for name in ("state", "params", "reset_state"):
            named |= {f"{name}[{i}]": t for i, t in enumerate(getattr(self, name))}
        return named

    def replaced(self, tensors: dict[str, Tensor]) -> "Batch":
        found = iter(tensors.values())
        x = next(found)
        groups = {n: tuple(next(found) for _ in getattr(self, n)) for n in ("state", "params", "reset_state")}
        return self._replace(x=x, **groups)


def make_batch(
    cell: str = "lstm",
    L: int = 1,
    D: int = 1,
    bias: bool = True,
    reset_state: str = "none",
    lengths: tuple[int, ...] = (8, 0, 1, 5, 8, 4),
    ragged: bool = False,
    p: float = 0.1,
) -> Batch:
    T, B = max(*lengths, 1), len(lengths)
    states = 2 if cell == "lstm" else 1
    G = CELLS[cell].gates

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    params = []
    for layer in range(L):
        for _ in range(D):
            params += [random(G * H, I if layer == 0 else D * H) / 2, random(G * H, H) / 2]
            params += [random(G * H), random(G * H)] if bias else []
    shape = {"learned": (L * D, 1, H), "per row": (L * D, B, H), "per step": (T, L * D, B, H)}.get(reset_state)
    reset = torch.rand(T, B) < p
    if p:
        reset[0, 0] = reset[0, -1] = True
        reset[min(2, T - 1) : 4, 0] = True  # one after the other
        reset[-1] = True  # past the end of some rows
    return Batch(
        cell,
        L,
        D,
        bias,
        random(T, B, I),
        tuple(random(L * D, B, H) for _ in range(states)),
        tuple(params),
        tuple(random(*shape) for _ in range(states)) if shape else (),
        torch.tensor(lengths),
        reset,
        ragged,
    )


def loop(batch: Batch) -> dict[str, Tensor]:
    """The specification: each row, layer, direction and time step on its own, by torch's cells."""
    step = getattr(torch._VF, f"{batch.cell}_cell")
    per_direction, D = 4 if batch.bias else 2, batch.D
    T, B, _ = batch.x.shape
    y, c = [[[batch.x.new_zeros(T, H)] * D] * B for _ in range(2)]
    finals = [[[s[k, b] for s in batch.state] for b in range(B)] for k in range(batch.L * D)]
    for b, length in enumerate(batch.lengths.tolist()):
        x = batch.x[:length, b]
        for layer in range(batch.L if length else 0):
            outputs = []
            for d in range(D):
                k = layer * D + d
                weights = batch.params[k * per_direction : (k + 1) * per_direction]
                state = tuple(s[k, b] for s in batch.state)
                trace: list = [None] * length
                for t in reversed(range(length)) if d else range(length):
                    boundary = t + d  # between the step before and this one
                    if boundary < length and batch.reset[boundary, b]:
                        state = tuple(torch.zeros_like(s) for s in state)
                        if batch.reset_state:
                            full = (s.expand(T, batch.L * D, B, H) for s in batch.reset_state)
                            state = tuple(s[boundary, k, b] for s in full)
                    hidden = tuple(s[None] for s in state)
                    new = step(x[t][None], hidden if len(hidden) == 2 else hidden[0], *weights)
                    state = tuple(s[0] for s in (new if len(hidden) == 2 else (new,)))
                    trace[t] = state
                finals[k][b] = list(state)
                outputs.append([torch.stack(of_state) for of_state in zip(*trace, strict=True)])
            x = torch.cat([of_direction[0] for of_direction in outputs], -1)
            for everything, which in ((y, 0), (c, -1)):
                padding = (0, 0, 0, T - length)
                everything[b] = [torch.nn.functional.pad(o[which], padding) for o in outputs]
    named = {"y": y, "c": c} if batch.cell == "lstm" else {"y": y}
    found = {name: torch.stack([torch.cat(row, -1) for row in rows], 1) for name, rows in named.items()}
    for i, name in enumerate(("h_n", "c_n")[: len(batch.state)]):
        found[name] = torch.stack([torch.stack([of_row[i] for of_row in row]) for row in finals])
    return found


def run(batch: Batch, **more) -> dict[str, Tensor]:
    """By fastrnn.torch_path.segments, the ragged layout's results put where the dense one has them."""
    x, reset, reset_state = batch.x, batch.reset, batch.reset_state
    T, B, _ = x.shape
    real = torch.arange(T)[:, None] < batch.lengths
    rows: dict = {"lengths": batch.lengths}
    if batch.ragged:
        rows = {"cu_seqlens": torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0))}
        x, reset = _ragged(x, real), _ragged(reset, real)
        per_step = (s.dim() == 4 for s in reset_state)
        reset_state = tuple(
            _ragged(s.transpose(1, 2), real)[:, :, None] if steps else s
            for s, steps in zip(reset_state, per_step, strict=True)
        )
    y, finals, c = segments.run(
        Stack(batch.cell, batch.L, batch.bias, training=True, bidirectional=batch.D == 2),
        x,
        batch.state,
        batch.params,
        **rows,
        reset=reset,
        reset_state=reset_state or None,
        cell_states=batch.cell == "lstm",
        **more,
    )
    assert (c is None) == (batch.cell != "lstm")
    found = {"y": y} if c is None else {"y": y, "c": c}
    if batch.ragged:
        places = real.T.flatten().nonzero().squeeze(1)
        found = {
            n: o.new_zeros(B * T, o.shape[-1]).index_copy(0, places, o).view(B, T, -1).transpose(0, 1)
            for n, o in found.items()
        }
    return found | dict(zip(("h_n", "c_n"), finals, strict=False))


def _ragged(dense: Tensor, real: Tensor) -> Tensor:
    """(total, ...) of (T, B, ...): row by row."""
    return dense.transpose(0, 1)[real.T]


def gradients(run, batch: Batch) -> dict[str, Tensor]:
    """What run finds, and the gradients of everything."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in batch.tensors().items()}
    found = run(batch.replaced(leaves))
    upstream = torch.Generator().manual_seed(1)
    outputs = sorted(found)  # both in one order
    weights = [torch.randn(found[n].shape, generator=upstream, dtype=torch.float64) for n in outputs]
    grads = torch.autograd.grad(
        [found[n] for n in outputs], list(leaves.values()), weights, allow_unused=True, materialize_grads=True
    )
    return {n: t.detach() for n, t in found.items()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}


def faults(batch: Batch) -> dict[str, float]:
    """What is further than rounding from the loop."""
    found, truth = gradients(run, batch), gradients(loop, batch)
    assert found.keys() == truth.keys()
    errors = {name: ((found[name] - truth[name]).abs().max() / (1 + truth[name].abs().max())).item() for name in truth}
    return {name: error for name, error in errors.items() if not error < 1e-12}
