"""What a call compiles after fastrnn.warmup, on a driver that launches nothing: a JSON object a case.

python -m tests.support.warmed FOLDER [--broken NAME] CASE...      FOLDER: Triton's cache
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn

import fastrnn
from bench import host_cost
from fastrnn.compat import ahead, spills
from fastrnn.nn.warmup import _zero


class Model(nn.Module):
    """Refuses NaN, as torch.distributions does, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.head = nn.BatchNorm1d(3), fastrnn.GRU(3, 20, backend="resident"), nn.Linear(20, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        _, h_n = self.layer(self.drop(x))
        return torch.distributions.Categorical(logits=self.head(h_n[-1])).logits


def layer(name: str, H: int, **options) -> nn.Module:
    return getattr(fastrnn, name)(3, H, **({"backend": "resident"} | options))


X = (4, 2, 3)
# (module, arguments and options of its call), by case; of all another kernel.
CASES = {
    # The second layer's state begins 36 bytes behind the first one's: it is no multiple of 16.
    "two layers": lambda: (layer("GRU", 9, num_layers=2), ((4, 1, 3), (2, 1, 9)), {}),
    "bfloat16": lambda: (layer("LSTM", 24, bidirectional=True, dtype=torch.bfloat16), (X,), {}),
    "lengths": lambda: (layer("GRU", 24), (X,), {"lengths": torch.tensor([4, 1])}),
    "resets": lambda: (
        layer("GRU", 40),
        (X,),
        {"reset": torch.zeros(4, 2, dtype=torch.bool), "reset_state": torch.zeros(1, 2, 40)},
    ),
    "heads": lambda: (
        layer("SLSTM", 60, num_heads=3, zoneout=0.2, clip_grad_state=1.0, dtype=torch.bfloat16),
        (X,),
        {},
    ),
    "tied": lambda: (layer("SLSTM", 60, num_heads=2, bidirectional=True, tie_directions=True), (X,), {}),
    "inference": lambda: (layer("RNN", 24), (X,), {"training": False}),
    "cluster": lambda: (layer("LSTM", 128, dtype=torch.bfloat16, backend="cluster"), (X,), {}),
    "cooperative": lambda: (layer("RNN", 264, backend="cooperative"), (X,), {}),
    "model": lambda: (Model(), (X,), {}),
}


def made_with(dtype=lambda dtype: dtype, address=lambda address: address):
    """Pointers of another dtype, or that lie elsewhere."""

    def init(self, given, lies):
        self.__dict__.update(dtype=dtype(given), address=address(lies))

    return mock.patch.object(spills.Pointer, "__init__", init)


# Ways to ask for another kernel than the call does, or to launch it.
BROKEN = {
    "alignment": lambda: made_with(address=lambda _: 16),
    "dtype": lambda: made_with(dtype=lambda dtype: torch.float16 if dtype == torch.bfloat16 else dtype),
    "options": lambda: mock.patch.object(
        spills.Asked, "options_of", lambda self, choice: self.options | {"num_warps": 2, **self.as_launched(choice)}
    ),
    "gradients": lambda: mock.patch("fastrnn.nn.warmup._differentiate", lambda *args: None),
    "nothing": lambda: mock.patch.object(ahead, "compile_all", lambda kernels, processes: len(kernels)),
}


@contextlib.contextmanager
def counting(calls: bool = False) -> Iterator[dict[str, int]]:
    """Kernels that this process compiles and launches while the block runs; calls of Triton's binder, if asked for."""
    from triton import knobs

    found = {"compiled": 0, "launched": 0, "bound": 0}

    def compiled(cache_hit, **_):
        found["compiled"] += not cache_hit

    def launched(self, *args, **kwargs):
        found["launched"] += 1
        _zero(args)  # what memory held may be NaN, which a model refuses

    def profile(frame, event, arg):
        found["bound"] += event == "call" and frame.f_code.co_filename.endswith(os.path.join("runtime", "jit.py"))

    with mock.patch.object(host_cost.Launcher, "__call__", launched):
        knobs.compilation.listener = compiled
        sys.setprofile(profile if calls else None)
        try:
            yield found
        finally:
            sys.setprofile(None)
            knobs.compilation.listener = None


def state_of(module: nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers(), torch.random.get_rng_state())]


def ran(case: str) -> dict:
    torch.manual_seed(0)
    module, shapes, options = CASES[case]()
    training = options.pop("training", True)
    before = state_of(module)
    with counting() as ahead_of_it:
        returned = fastrnn.warmup(module, *shapes, training=training, **options)
    same = all(map(torch.equal, before, state_of(module))) and all(p.grad is None for p in module.parameters())

    def tensors(shape):
        return (
            torch.randn(shape, dtype=next(module.parameters()).dtype)
            if type(shape[0]) is int
            else (*map(tensors, shape),)
        )

    def call():
        with torch.set_grad_enabled(training):
            result = module(*map(tensors, shapes), **options)
        if training:
            (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()

    found = {"case": case, "returned": returned, "unchanged": same, "ahead": ahead_of_it}
    for name in ("first", "second", "third"):
        with counting(calls=name == "third") as found[name]:
            call()
    return found | {"again": fastrnn.warmup(module, *shapes, training=training, **options)}


def main(folder: str, *names: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    broken = contextlib.nullcontext
    if names[0] == "--broken":
        broken, names = BROKEN[names[1]], names[2:]
    with host_cost.launching_nothing(), broken():
        for name in names:
            print(json.dumps(ran(name)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
