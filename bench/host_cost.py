"""Measure what a call costs the host, on any machine: everything runs as on a GPU, but the driver launches nothing.

    python -m bench.host_cost            tables (a minute); --write puts them into docs/performance.md
    python -m bench.host_cost --calls    how many functions, Python's and C's, a call runs: the same on every machine
    python -m bench.host_cost --memory   how many allocations a call makes, and their bytes at the peak: likewise

Plan, allocation, binding of arguments and Triton's launcher run as on an H100; tensors are on the CPU, and what kernels
would have written is whatever memory held. Beside it torch.nn's whole call on the CPU at T = B = 1, the smallest there
is: calls in turn, in one process with one thread, medians. A ratio of 1 says that Python and torch together cost no
more than torch.nn's layer with its products. `step` runs torch's own cell, beside torch.nn.LSTMCell and GRUCell of the
same size, which compute as much.

The stand-in for Triton's driver has what JITFunction.run and CompiledKernel use of it, read in 3.6 to 3.9.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

import fastrnn
from fastrnn.device import DeviceSpec
from fastrnn.inspect.memory import Memory, memory_of

from . import write

T, B, I, H = 2, 1, 16, 64
SMALLEST = 16  # I and H of torch.nn's layer
SPEC = DeviceSpec.named("sm_90")


class Launcher:
    """Takes the place of Triton's launcher in C, and launches nothing."""

    launch_cooperative_grid = False

    def __init__(self, src: Any, metadata: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Calls on CPU tensors compile and launch for an H100, up to the driver."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    limits = {"max_shared_mem": SPEC.shared_bytes, "multiprocessor_count": SPEC.multiprocessors, "warpSize": 32}
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (1, 1, 128, 0, 1024),  # 128 registers, none spilled
        unload_module=lambda module: None,
        get_device_properties=lambda device: limits,
    )
    stand_in: Any = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
        launcher_cls=Launcher,
        utils=utils,
    )
    with mock.patch.object(driver, "_active", stand_in), mock.patch.object(DeviceSpec, "of", lambda _: SPEC):
        yield


def inference(module: Any, *given: Any, run: Callable | None = None, **options: Any) -> Callable[[], object]:
    call = run or module

    def of_one() -> None:
        with torch.no_grad():
            call(*given, **options)

    return of_one


def training(module: Any, *given: Any, run: Callable | None = None, **options: Any) -> Callable[[], object]:
    call = run or module

    def of_one() -> None:
        found = call(*given, **options)
        y = found if isinstance(found, torch.Tensor) else found[0]
        y.backward(torch.ones_like(y))
        for parameter in module.parameters():
            parameter.grad = None

    return of_one


def medians_us(calls: list[Callable[[], object]], count: int) -> list[float]:
    """Microseconds of calls made in turn, after a tenth of them that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(count + count // 10 + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [statistics.median(own[-count:]) * 1e6 for own in times]


def functions_of(call: Callable[[], object]) -> int:
    """How many functions, Python's and C's, run in a call like two before it."""
    call(), call()
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


class Case(NamedTuple):
    """A kind of call: ours, and torch.nn's beside it."""

    name: str
    key: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def plain() -> Iterator[Case]:
    """Yield layers: one, and two stacked."""
    for name in ("LSTM", "GRU"):
        for layers in (1, 2):
            ours = getattr(fastrnn, name)(I, H, num_layers=layers, backend="resident")
            theirs = getattr(torch.nn, name)(SMALLEST, SMALLEST, num_layers=layers)
            x, tiny = torch.randn(T, B, I), torch.randn(1, 1, SMALLEST)
            for make in (inference, training):
                words = (f"{name}, {layers} layer(s), {make.__name__}", f"{name}, {layers}, {make.__name__}")
                yield Case(*words, make(ours, x), make(theirs, tiny))


def special() -> Iterator[Case]:
    """Lengths and resets, beside torch.nn's layer without; both directions; one step, beside torch.nn's cell."""
    options = {"lengths": torch.full((B,), T), "reset": torch.zeros(T, B, dtype=torch.bool)}
    for name in ("LSTM", "GRU"):
        x, tiny = torch.randn(T, B, I), torch.randn(1, 1, SMALLEST)
        layer = getattr(fastrnn, name)(I, H, backend="resident")
        both = getattr(fastrnn, name)(I, H, backend="resident", bidirectional=True)
        theirs = getattr(torch.nn, name)(SMALLEST, SMALLEST)
        their_both = getattr(torch.nn, name)(SMALLEST, SMALLEST, bidirectional=True)
        stepped = getattr(fastrnn, name)(SMALLEST, SMALLEST)
        cell = getattr(torch.nn, f"{name}Cell")(SMALLEST, SMALLEST)
        h = torch.randn(1, 1, SMALLEST)
        state, of_cell = ((h, h), (h[0], h[0])) if name == "LSTM" else (h, h[0])
        for make in (inference, training):
            for option, given in options.items():
                key = f"{name}, {option}, {make.__name__}"
                yield Case(key, key, make(layer, x, **{option: given}), make(theirs, tiny))
            key = f"{name}, bidirectional, {make.__name__}"
            yield Case(key, key, make(both, x), make(their_both, tiny))
            key = f"{name}, step, {make.__name__}"
            yield Case(key, key, make(stepped, tiny[0], state, run=stepped.step), make(cell, tiny[0], of_cell))


def cases() -> Iterator[Case]:
    yield from plain()
    yield from special()


def memory(call: Callable[[], object]) -> Memory:
    """Return the memory of a call that is like one before it."""
    call()
    return memory_of(call, torch.device("cpu"))[1]


HEAD = (
    "| host, microseconds | fastrnn, launching nothing | torch.nn on the CPU, T = B = 1 | ratio | allocations | KiB |"
)


def rows(found: Iterator[Case], count: int, head: str) -> Iterator[str]:
    yield head
    yield "|---" * (head.count("|") - 1) + "|"
    for name, _, ours, theirs in found:
        us, other = medians_us([ours, theirs], count)
        took = memory(ours)
        figures = f"{us:.0f} | {other:.0f} | {us / other:.2f} | {took.allocations} | {took.peak / 1024:.1f}"
        yield f"| {name} | {figures} |"


def tables(count: int) -> Iterator[str]:
    yield from rows(plain(), count, HEAD)
    yield ""
    yield from rows(special(), count, HEAD.replace("torch.nn on the CPU, T = B = 1", "torch.nn's layer or cell"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="calls to measure (default: 400)")
    parser.add_argument("--calls", action="store_true", help="count the functions called, not microseconds")
    parser.add_argument("--memory", action="store_true", help="count allocations, and bytes at their peak")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count: expected a positive number, got {args.count}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lines = []
    with launching_nothing():
        if args.calls:
            print(json.dumps({case.key: functions_of(case.ours) for case in cases()}))
            return 0
        if args.memory:
            found = ((case.key, memory(case.ours)) for case in cases())
            print(json.dumps({key: [took.allocations, took.peak] for key, took in found}))
            return 0
        for line in tables(args.count):
            print(line, flush=True)
            lines.append(line)
    if args.write:
        write("python -m bench.host_cost --write", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
