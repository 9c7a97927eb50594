"""One line of the table of what is timed: a network, its sizes, and the tensors that it runs on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fastrnn
from fastrnn.cells import CELLS
from tests.support.cases import Case

PASSES = ("forward", "forward+backward")  # without and with gradients of the input and all parameters
KINDS = ("plain", "ragged", "reset")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is compared with the reference before anything is timed: no more steps than these, since a step is like another.
CHECKED_STEPS = 256


@dataclass(frozen=True)
class Workload:
    """A recurrent network on a batch: sizes as in the tests' cases, and what the tests vary elsewhere.

    kind "ragged": row b has 1 + (T - 1) b / (B - 1) steps; "reset": each step begins a new segment with probability p.
    heads: blocks of W_hh, H units each; all of them see the whole input.
    """

    group: str
    cell: str
    shape: Case  # T, B, H of a head, D
    dtype: str = "float32"
    input_size: int | None = None  # None is as many as units
    layers: int = 1
    heads: int = 1
    kind: str = "plain"
    p: float = 0.01

    def __str__(self) -> str:
        T, B, H, D = self.shape
        wider = self.units != self.I
        parts = [self.group.replace(" ", "_"), self.cell, f"T{T}-B{B}-H{H}"]
        parts += [f"I{self.I}"] * wider + [f"{self.layers}layers"] * (self.layers > 1)
        parts += ["bidirectional"] * (D == 2) + [f"{self.heads}heads"] * (self.heads > 1)
        return "-".join([*parts, *[self.kind] * (self.kind != "plain"), self.dtype])

    @property
    def I(self) -> int:  # noqa: E743, N802
        return self.input_size or self.units

    @property
    def units(self) -> int:
        """Return the units of all heads."""
        return self.heads * self.shape.H

    @property
    def flops(self) -> int:
        """Return the flops of a forward pass's products; backward has twice as many."""
        T, B, H, D = self.shape
        inputs = self.I + (self.layers - 1) * D * self.units  # of all layers
        return 2 * T * B * D * CELLS[self.cell].gates * self.units * (inputs + self.layers * H)

    def shortened(self) -> "Workload":
        """The same for no more steps than are compared with the reference."""
        return replace(self, shape=self.shape._replace(T=min(self.shape.T, CHECKED_STEPS)))

    def one_head(self) -> "Workload":
        return replace(self, heads=1, input_size=self.I)

    def module(self, **more: Any) -> torch.nn.RNNBase:
        """Ours, of all heads; more: keywords of its own."""
        name, options = self.nn()
        return getattr(fastrnn, name)(**options, num_heads=self.heads, **more)

    def nn(self) -> tuple[str, dict[str, Any]]:
        """The name of torch.nn's class, or of ours where it has none, and their arguments."""
        D = self.shape.D
        options = {"input_size": self.I, "hidden_size": self.units, "num_layers": self.layers, "bidirectional": D == 2}
        if self.cell.startswith("rnn"):
            return "RNN", options | {"nonlinearity": self.cell.removeprefix("rnn_")}
        return self.cell.upper(), options


class Data:
    """A workload's tensors, the same at every call: seeded, on a device, in its dtype or in another."""

    def __init__(self, workload: Workload, device: str, dtype: torch.dtype | None = None) -> None:
        T, B, _, D = workload.shape
        self.workload, self.device, own = workload, device, DTYPES[workload.dtype]
        generator = torch.Generator().manual_seed(0)

        def place(t: Tensor) -> Tensor:  # values that the workload's dtype has: only the computation can err
            return t.to(own).to(device, dtype or own)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.params = [place(p.detach()) for p in workload.module().parameters()]
        if workload.cell == "rnn_relu":  # as the tests: away from the kink, where any rounding flips the derivative
            for p in (p for p in self.params if p.dim() == 2):
                p *= 0.2
        self.input = place(torch.randn(T, B, workload.I, generator=generator))
        self.dy = place(torch.randn(T, B, D * workload.units, generator=generator))
        self.lengths = torch.linspace(1, T, B).round().long() if workload.kind == "ragged" else None
        self.reset = None
        if workload.kind == "reset":
            self.reset = (torch.rand(T, B, generator=generator) < workload.p).to(device)

    @cached_property
    def valid(self) -> Tensor | None:
        """(T, B, 1): the steps that a row has; None for all."""
        if self.lengths is None:
            return None
        return (torch.arange(self.input.shape[0])[:, None] < self.lengths)[..., None].to(self.device)

    def head(self, number: int) -> "Data":
        """Of one head, sharing memory where that can be."""
        one = object.__new__(Data)
        one.__dict__ = dict(self.__dict__)
        shape = (-1, self.workload.heads, self.workload.shape.H)  # rows g*N*H + n*H + h
        one.workload = self.workload.one_head()
        one.params = [p.unflatten(0, shape)[:, number].flatten(0, 1) for p in self.params]
        return one
