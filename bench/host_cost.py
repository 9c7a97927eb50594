"""What a call costs the host, measured on any machine: everything runs as on a GPU, but the driver launches nothing.

    python -m bench.host_cost            a table (half a minute); --write puts it into docs/performance.md
    python -m bench.host_cost --calls    how many functions, Python's and C's, a call runs: the same on every machine

Plan, allocation, binding of arguments and Triton's launcher run as on an H100; tensors are on the CPU, and what kernels
would have written is whatever memory held. Beside it torch.nn's whole call on the CPU at T = B = 1, the smallest there
is: calls in turn, in one process with one thread, medians. A ratio of 1 says that Python and torch together cost no
more than torch.nn's layer with its products.

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
from typing import Any
from unittest import mock

import torch

import fastrnn
from fastrnn.device import DeviceSpec

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


def inference(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def training(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        y, _ = module(x)
        y.backward(torch.ones_like(y))
        for parameter in module.parameters():
            parameter.grad = None

    return call


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


def calls() -> dict[str, int]:
    """functions_of of each module and kind of call, one layer and two."""
    found = {}
    for name in ("LSTM", "GRU"):
        for layers in (1, 2):
            module, x = getattr(fastrnn, name)(I, H, num_layers=layers, backend="resident"), torch.randn(T, B, I)
            for make in (inference, training):
                found[f"{name}, {layers}, {make.__name__}"] = functions_of(make(module, x))
    return found


HEAD = "| host, microseconds | fastrnn, launching nothing | torch.nn on the CPU, T = B = 1 | ratio |"


def rows(count: int) -> Iterator[str]:
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for name in ("LSTM", "GRU"):
        for layers in (1, 2):
            ours = getattr(fastrnn, name)(I, H, num_layers=layers, backend="resident")
            theirs = getattr(torch.nn, name)(SMALLEST, SMALLEST, num_layers=layers)
            x, tiny = torch.randn(T, B, I), torch.randn(1, 1, SMALLEST)
            for make in (inference, training):
                us, other = medians_us([make(ours, x), make(theirs, tiny)], count)
                yield f"| {name}, {layers} layer(s), {make.__name__} | {us:.0f} | {other:.0f} | {us / other:.2f} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="calls that count")
    parser.add_argument("--calls", action="store_true", help="count functions instead of microseconds")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count: expected a positive number, got {args.count}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lines = []
    with launching_nothing():
        if args.calls:
            print(json.dumps(calls()))
            return 0
        for line in rows(args.count):
            print(line, flush=True)
            lines.append(line)
    if args.write:
        write("python -m bench.host_cost --write", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
