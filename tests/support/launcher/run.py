"""Run by test_launcher.py: launch kernels through Triton's own launcher on libcuda.c, print what reached the driver.

A JSON object a line:

python -m tests.support.launcher.run launches resident      every launch of a case's both passes, and its faults
python -m tests.support.launcher.run mutations              the faults of launches that are changed on their way
python -m tests.support.launcher.run count                  microseconds of the host's work a call, without a kernel
"""

import contextlib
import functools
import inspect
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver as of_triton
from triton.runtime.jit import JITFunction

from fastrnn import ops
from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import Problem as Sizes
from fastrnn.inspect.compile import call_backward, call_forward
from fastrnn.ops import launch
from fastrnn.planning.planner import plan

from ..cases import Case, make_problem, make_sequences
from .driver import STREAM, Driver, pretend

GPU = torch.device("cuda", 0)
SIZES = {
    "resident": [("lstm", Case(T=3, B=17, H=24, D=2)), ("gru", Case(T=3, B=3, H=64, D=1))],
    "cluster": [
        ("lstm", Case(T=3, B=17, H=128, D=2)),  # of 4
        ("gru", Case(T=3, B=3, H=256, D=1)),  # of 8
        ("lstm", Case(T=3, B=3, H=256, D=1)),
        ("gru", Case(T=3, B=3, H=512, D=1)),  # of 16
        ("lstm", Case(T=3, B=3, H=512, D=1)),
    ],
    "cooperative": [("lstm", Case(T=3, B=17, H=262, D=2)), ("gru", Case(T=3, B=3, H=264, D=1))],
}
KINDS = ("lengths, resets by step", "resets to a state", "ragged, resets by step")  # of the first of a tier's sizes


class Seen(NamedTuple):
    """A launch: what launch.py was given and gave back, by name, and what it launched."""

    known: dict[str, Tensor | None]
    backend: str
    compiled: Any
    grid: tuple[int, ...]
    passed: dict[str, Any]


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """The launches of launch.py inside the block, on the stand-in's GPU."""
    found: list[Seen] = []
    started: list[tuple] = []
    launched, spec = JITFunction.run, DeviceSpec.of

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        compiled = launched(self, *args, grid=grid, warmup=warmup, **options)
        if not warmup:
            started.append((compiled, grid, dict(zip(self.arg_names, args, strict=False)) | options))
        return compiled

    def watching(original: Any, results: tuple[str, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            outputs = original(*args, **kwargs)
            known = {k: v for k, v in given.items() if v is None or isinstance(v, Tensor)}
            known |= dict(zip(results, outputs, strict=True))
            found.append(Seen(known, given["backend"], *started.pop()))
            return outputs

        return call

    of_forward = ("y", "h_n", "c_n", "saved", "c")
    of_backward = ("d_x_gates", "dW_hh", "db_hh", "dh_0", "dc_0", "d_reset_h", "d_reset_c")
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(DeviceSpec, "of", lambda _: spec(GPU)),
        mock.patch.object(launch, "forward", watching(launch.forward, of_forward)),
        mock.patch.object(launch, "backward", watching(launch.backward, of_backward)),
    ):
        yield found


def faults_of(seen: Seen, cell: str, case: Case, record: dict[str, Any]) -> list[str]:
    """What of a launch is not as planned, or not where the kernel looks for it."""
    T, B, H, D = case
    kernel = plan(cell, hidden_size=H, batch_size=B, seq_len=T, directions=D, dtype=torch.bfloat16,
                  device=GPU, backend=seen.backend).kernel  # fmt: skip
    assert kernel is not None
    x, *rest = kernel.grid
    expected = {
        "grid": [x * kernel.ctas, *rest, *[1] * (2 - len(rest))],
        "threads": [32 * kernel.warps, 1, 1],
        "shared": seen.compiled.metadata.shared,
        "stream": STREAM,
        "cooperative": int(seen.backend == "cooperative"),
        "cluster": kernel.ctas,
        "non_portable": int(kernel.ctas > 8),
        "error": 0,
    }
    faults = [name for name, value in expected.items() if record[name] != value]
    names = [name for name, kind in seen.compiled.src.signature.items() if kind != "constexpr"]
    values = [*_arguments(seen, cell, names, T, B), 0, 0]  # behind them Triton's scratch memory, of which there is none
    sizes = [4 if name in ("T", "B") else 8 for name in names] + [8, 8]
    if record["sizes"] != sizes:
        return [*faults, "sizes"]
    places = zip([*names, "scratch", "scratch"], values, record["parameters"], strict=True)
    return [*faults, *(name for name, value, got in places if value != got)]


def _arguments(seen: Seen, cell: str, names: list[str], T: int, B: int) -> Iterator[int]:
    """What a kernel's parameters must be: pointers to the tensors of that name, where the caller has them."""
    known = dict(seen.known)
    if "dy" in known:  # the state that the backward pass starts from is c where there is one
        state = "c" if cell == "lstm" else "h"
        known |= {"kept_0": known[f"{state}_0"], "reset_kept": known.get(f"reset_{state}")}
        known["kept"] = known["c" if cell == "lstm" else "y"]
        for name in ("d_reset_h", "d_reset_c"):  # of them the caller gets sums, unless they are by step
            known.pop(name)
    for name in names:
        if name in ("T", "B"):
            yield seen.passed[name] if "rows" in known and name == "T" else {"T": T, "B": B}[name]
            continue
        tensor = known.get(name.removesuffix("_ptr"))
        # What launch.py allocates for itself: it is told from the others by being none of them.
        own = seen.passed[name].data_ptr()
        others = [t.data_ptr() for t in known.values() if t is not None]
        yield tensor.data_ptr() if tensor is not None else own if own not in others else -1


def launches(driver: Driver, *tiers: str, sizes: dict[str, list] = SIZES, kinds: tuple[str, ...] = KINDS) -> Iterator:
    for tier in tiers:
        for number, (cell, case) in enumerate(sizes[tier]):
            for kind in ("plain", *(kinds if number == 0 else ())):
                torch.manual_seed(0)
                if kind == "plain":
                    problem = make_problem(cell, case, torch.bfloat16, "cpu")
                else:
                    problem = make_sequences(cell, case, torch.bfloat16, "cpu", kind)
                driver.launches()
                with watched() as found:
                    problem.run(functools.partial(ops.recurrence, backend=tier))
                for seen, record in zip(found, driver.launches(), strict=True):
                    named = {"cell": cell, **case._asdict(), "tier": tier, "kind": kind, "pass": seen.compiled.name}
                    yield named | record | {"faults": faults_of(seen, cell, case, record)}


# How a launch is changed, on which tier, and what must be noticed.
MUTATIONS = {
    "two pointers": ("resident", "x_gates_ptr"),
    "two numbers": ("resident", "T"),
    "null for a pointer": ("resident", "saved_ptr"),
    "grid turned": ("cooperative", "grid"),
    "no cooperative launch": ("cooperative", "cooperative"),
    "default stream": ("resident", "stream"),
    "less shared memory": ("resident", "shared"),
    "more warps": ("resident", "Triton Error [CUDA]: invalid argument"),
    "smaller clusters": ("cluster", "cluster misconfiguration"),
    "portable clusters only": ("cluster", "cluster misconfiguration"),
    "launch.py swaps": ("resident", "h_n_ptr"),
}


def mutations(driver: Driver) -> Iterator[dict]:
    swapping = _swapping(launch._launch)
    for name, (tier, expected) in MUTATIONS.items():
        if tier == "cluster" and spills.triton_version() < (3, 8):
            continue
        sizes = {tier: SIZES[tier][-1:] if name == "portable clusters only" else SIZES[tier][:1]}
        driver.set("ignores_non_portable", name == "portable clusters only")
        with (
            mock.patch.object(of_triton.active.launcher_cls, "__call__", _changing(name)),
            mock.patch.object(launch, "_launch", swapping if name == "launch.py swaps" else launch._launch),
        ):
            try:
                records = list(launches(driver, tier, sizes=sizes, kinds=()))
                noticed = sorted({fault for record in records for fault in record["faults"]})
            except RuntimeError as error:
                noticed = [str(error)]
        yield {"mutation": name, "expected": expected, "noticed": noticed}


def _changing(name: str) -> Any:
    """Triton's launch with one thing changed on its way to the driver."""
    launched = of_triton.active.launcher_cls.__call__

    def call(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        args = list(args)
        pointers = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        numbers = [i for i, arg in enumerate(args) if type(arg) is int and arg in (3, 17)]  # T and B, before others
        i, j = {"two pointers": pointers[:2], "two numbers": numbers[:2]}.get(name, (0, 0))
        args[i], args[j] = args[j], args[i]
        if name == "null for a pointer":
            args[pointers[-1]] = None
        x, y = (y, x) if name == "grid turned" else (x, y)
        stream = 0 if name == "default stream" else stream
        warps, ctas, shared = packed
        warps = warps * 2 if name == "more warps" else warps
        ctas = ctas // 2 if name == "smaller clusters" else ctas
        shared = shared // 2 if name == "less shared memory" else shared
        cooperative = self.launch_cooperative_grid and name != "no cooperative launch"
        with mock.patch.object(self, "launch_cooperative_grid", cooperative):
            launched(self, x, y, z, stream, function, (warps, ctas, shared), metadata, enter, leave, *args)

    return call


def _swapping(launched: Any) -> Any:
    """launch.py's call of a kernel with y and h_n in each other's place."""

    def call(which: str, cell: str, backend: str, y: Tensor, B: int, rows: Any, by_step: bool, *pointers: Any) -> None:
        order = list(pointers)
        if which == "forward":
            order[5], order[6] = order[6], order[5]
        launched(which, cell, backend, y, B, rows, by_step, *order)

    return call


def count(driver: Driver) -> Iterator[dict]:
    """Microseconds of a call of launch.forward and launch.backward (without sums and products), the best of five."""
    driver.set("records", 0)
    spec = DeviceSpec.of(GPU)
    sizes = (("lstm", 64), ("lstm", 256), ("gru", 256), ("lstm", 512), ("lstm", 1024))
    with mock.patch.object(DeviceSpec, "of", lambda _: spec):
        for cell, H in sizes:
            problem = Sizes(cell, H)
            tensors: Any = problem.tensors()
            backend = problem.plan().backend
            outputs = call_forward(cell, tensors, backend)
            calls = {
                "forward": lambda: call_forward(cell, tensors, backend),  # noqa: B023
                "backward": lambda: call_backward(cell, tensors, outputs, backend, needs_sums=False),  # noqa: B023
            }
            yield {"cell": cell, "H": H, "tier": backend} | {name: _us(call) for name, call in calls.items()}


def _us(call: Any, calls: int = 200) -> float:
    found = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - started) / calls * 1e6)
    return round(min(found), 1)


if __name__ == "__main__":
    driver = Driver()
    pretend(driver)
    for record in {"launches": launches, "mutations": mutations, "count": count}[sys.argv[1]](driver, *sys.argv[2:]):
        print(json.dumps(record), flush=True)
