"""Run by test_launcher.py: launch kernels through Triton's own launcher on libcuda.c, print what reached the driver.

A JSON object a line:

python -m tests.support.launcher.run launches resident      every launch of a case's both passes, and its faults
python -m tests.support.launcher.run mutations              the faults of launches that are changed on their way
python -m tests.support.launcher.run again resident         what differs where a launch goes past Triton's binder
python -m tests.support.launcher.run count                  microseconds of the host's work a call, without a kernel
"""

import contextlib
import functools
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

from fastrnn import ops, reference
from fastrnn.cells import CELLS
from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import Problem as Sizes
from fastrnn.inspect.compile import call_backward, call_forward, members
from fastrnn.ops import launch, library
from fastrnn.ops.prepared import Kernels
from fastrnn.ops.schema import Args
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

    known: dict[str, Tensor]
    backend: str
    compiled: Any
    grid: tuple[int, ...]
    passed: dict[str, Any]  # by dotted names


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """The launches of launch.py inside the block, on the stand-in's GPU."""
    found: list[Seen] = []
    started: list[tuple] = []
    launched, spec = JITFunction.run, DeviceSpec.of

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        compiled = launched(self, *args, grid=grid, warmup=warmup, **options)
        if not warmup:
            given = dict(zip(self.arg_names, args, strict=False)) | options
            passed = dict(pair for name, value in given.items() for pair in members(name, value))
            started.append((compiled, grid, passed))
        return compiled

    def watching(original: Any) -> Any:
        def call(args: Any) -> Any:
            results = original(args)
            known = {**args._asdict(), **results._asdict()}
            found.append(Seen({k: v for k, v in known.items() if isinstance(v, Tensor)}, args.backend, *started.pop()))
            return results

        return call

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(DeviceSpec, "of", lambda _: spec(GPU)),
        mock.patch.object(launch, "forward", watching(launch.forward)),
        mock.patch.object(launch, "backward", watching(launch.backward)),
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
    constants = {name for name, kind in seen.compiled.src.signature.items() if kind == "constexpr"}
    passed = {name: value for name, value in seen.passed.items() if isinstance(value, Tensor) or name in ("T", "B")}
    names = [name for name in passed if name.split(".")[0] not in constants]
    values = [*_arguments(seen, cell, names, T, B), 0, 0]  # behind them Triton's scratch memory, of which there is none
    sizes = [4 if name in ("T", "B") else 8 for name in names] + [8, 8]
    if record["sizes"] != sizes:
        return [*faults, "sizes"]
    places = zip([*names, "scratch", "scratch"], values, record["parameters"], strict=True)
    return [*faults, *(name for name, value, got in places if value != got)]


def _arguments(seen: Seen, cell: str, names: list[str], T: int, B: int) -> Iterator[int]:
    """What a kernel's parameters must be: pointers to the tensors that they are for, where the caller has them."""
    known, backward = seen.known, "dy" in seen.known
    places = CELLS[cell].kept_places
    renamed = {"states": "state_0", "d_states": "d_state_0", "tiles": "saved"}

    def member(group: str, n: int) -> Tensor | None:
        """Of a group's tuple: which state of all it is for."""
        if group == "before":
            return known["state_0"][places[n]] if "state_0" in known else None
        if group == "kept":
            return known["y"] if places[n] == 0 else known["steps"][places[n] - 1]
        if group == "d_starts":  # of which the caller gets sums, unless they are by step
            by_step = known[group].numel() == len(known[group]) * known["y"].numel()
            return known[group][n] if by_step else None
        return known[renamed.get(group, group)][places[n] if backward and group == "starts" else n]

    for name in names:
        if name in ("T", "B"):
            yield seen.passed[name] if "rows" in known and name == "T" else {"T": T, "B": B}[name]
            continue
        room, *parts = name.split(".")
        if room == "exchange":
            tensor = None
        elif len(parts) == 2:
            tensor = member(parts[0], int(parts[1]))
        else:
            tensor = known.get(renamed.get(parts[0], parts[0]))
        # What launch.py allocates for itself: it is told from the others by being none of them.
        own = seen.passed[name].data_ptr()
        others = [t.data_ptr() for t in known.values()]
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
    "two pointers": ("resident", "inputs.x_gates"),
    "two numbers": ("resident", "T"),
    "null for a pointer": ("resident", "outputs.saved"),
    "grid turned": ("cooperative", "grid"),
    "no cooperative launch": ("cooperative", "cooperative"),
    "default stream": ("resident", "stream"),
    "less shared memory": ("resident", "shared"),
    "more warps": ("resident", "Triton Error [CUDA]: invalid argument"),
    "smaller clusters": ("cluster", "cluster misconfiguration"),
    "portable clusters only": ("cluster", "cluster misconfiguration"),
    "launch.py swaps": ("resident", "outputs.finals.0"),
}


def mutations(driver: Driver) -> Iterator[dict]:
    swapping = _swapping(Kernels.launch)
    for name, (tier, expected) in MUTATIONS.items():
        if tier == "cluster" and spills.triton_version() < (3, 8):
            continue
        sizes = {tier: SIZES[tier][-1:] if name == "portable clusters only" else SIZES[tier][:1]}
        driver.set("ignores_non_portable", name == "portable clusters only")
        with (
            mock.patch.object(of_triton.active.launcher_cls, "__call__", _changing(name)),
            mock.patch.object(Kernels, "launch", swapping if name == "launch.py swaps" else Kernels.launch),
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
        first, second, *args = args
        i, j = (i for i, arg in enumerate(args) if type(arg) is int)  # T and B
        if name == "two numbers":
            args[i], args[j] = args[j], args[i]
        if name == "two pointers" and hasattr(first, "x_gates"):
            first = first._replace(x_gates=first.W_hh, W_hh=first.x_gates)
        if name == "null for a pointer" and hasattr(second, "saved"):
            second = second._replace(saved=None)
        x, y = (y, x) if name == "grid turned" else (x, y)
        stream = 0 if name == "default stream" else stream
        warps, ctas, shared = packed
        warps = warps * 2 if name == "more warps" else warps
        ctas = ctas // 2 if name == "smaller clusters" else ctas
        shared = shared // 2 if name == "less shared memory" else shared
        cooperative = self.launch_cooperative_grid and name != "no cooperative launch"
        with mock.patch.object(self, "launch_cooperative_grid", cooperative):
            launched(
                self, x, y, z, stream, function, (warps, ctas, shared), metadata, enter, leave, first, second, *args
            )

    return call


def _swapping(launched: Any) -> Any:
    """launch.py's call of a kernel with y and the final states in each other's place."""

    def call(self: Kernels, which: str, *others: Any) -> None:
        *others, groups = others
        if which == "forward":
            inputs, outputs, sequences = groups
            groups = inputs, outputs._replace(y=outputs.finals[0], finals=(outputs.y, *outputs.finals[1:])), sequences
        launched(self, which, *others, groups)

    return call


def again(driver: Driver, *tiers: str) -> Iterator[dict]:
    """A call and the same call again, which goes by what the first one compiled: what of the launches differs."""
    spec, bound, run = DeviceSpec.of(GPU), [0], JITFunction.run

    def binder(self: Any, *args: Any, **options: Any) -> Any:
        bound[0] += not options.get("warmup")
        return run(self, *args, **options)

    binder.__module__ = run.__module__  # as Triton's own
    with mock.patch.object(JITFunction, "run", binder), mock.patch.object(DeviceSpec, "of", lambda _: spec):
        for tier in tiers:
            for cell, case in SIZES[tier]:
                x_gates, W_hh, b_hh, *states = make_problem(cell, case, torch.bfloat16, "cpu").inputs
                state_0 = reference.stacked(*states)
                args = Args(x_gates, W_hh, b_hh, state_0, cell, False, tier)
                found = []
                for _ in range(2):
                    driver.launches()
                    bound[0] = 0
                    library.run(args)
                    (record,) = driver.launches()
                    given = [t.data_ptr() for t in (x_gates, W_hh, b_hh, state_0)]
                    # Outputs are others each time: of addresses only what was given is compared.
                    record["parameters"] = [p if p in given or p < 1 << 20 else None for p in record["parameters"]]
                    found.append(record | {"bound": bound[0]})
                first, second = found
                differ = sorted(name for name in first if first[name] != second[name])
                yield {"tier": tier, "cell": cell, **case._asdict(), "differ": differ, "given": first["parameters"]}


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
    for record in {"launches": launches, "mutations": mutations, "again": again, "count": count}[sys.argv[1]](
        driver, *sys.argv[2:]
    ):
        print(json.dumps(record), flush=True)
