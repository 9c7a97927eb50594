"""Measure what a call costs the host, beside other libraries, with each Triton kernel replaced by nothing.

    python -m bench.host_table           a table (a minute); --write puts it into docs/performance.md
    python -m bench.host_table --out DIR     leaves it for bench.report, as `make bench` does

Python, torch's operators, allocations, Triton's binder and launcher run as on a GPU; a kernel is neither compiled nor
run, and tensors are on the CPU. So FlashRNN's backward is here, too, which Triton 3.9 does not compile. torch.nn has no
kernel to leave out: it is its whole call on the CPU at its smallest, T = B = 1, I = H = 16. One thread, calls in turn,
one layer in float32; ratios are of pairs (bench/turns.py).

FlashRNN and TorchRL are timed where they are installed. Uses JITFunction._do_compile and what JITFunction.run and the
autotuner use of CompiledKernel and the driver, read in Triton 3.9.0.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastrnn.compat import interpreter
from tests.support.cases import Case

from . import clock, others, write
from .adapters import Builder, Missing, or_missing, ours, peer, torch_nn
from .host_cost import SMALLEST, B, H, I, Launcher, T, launching_nothing
from .turns import Call, call_of, in_turns, quartiles
from .workload import PASSES, Data, Workload

OURS, BASELINE = "fastrnn", "torch.nn, T = B = 1"
LIBRARIES: dict[str, Builder] = {
    OURS: ours("resident"),
    BASELINE: torch_nn,
    "FlashRNN, triton_fused": peer(functools.partial(others.flashrnn, backend="triton_fused")),
    "TorchRL, module, triton": peer(others.torchrl("triton", anywhere=True)),
    "TorchRL, function, triton": peer(others.torchrl_function),
}


class Nothing:
    """Takes the place of a CompiledKernel."""

    function, packed_metadata, n_spills = 0, b"", 0

    def __init__(self) -> None:
        self._run = Launcher(None, None)

    def _init_handles(self) -> None: ...

    @property
    def run(self) -> Launcher:
        return self._run

    def launch_metadata(self, grid: Any, stream: Any, *args: Any) -> None: ...


def _not_compiled(self: Any, key: Any, signature: Any, device: Any, *args: Any, **kwargs: Any) -> Nothing:
    return self.device_caches[device][0].setdefault(key, Nothing())


def _benchmarker(kernel_call: Any, quantiles: Any) -> list[float]:
    """The autotuner's, to which all forms of a kernel are equally fast."""
    kernel_call()
    return [1.0] * len(quantiles)


@contextlib.contextmanager
def compiling_nothing() -> Iterator[None]:
    """Inside, whoever launches a kernel of Triton's on CPU tensors launches nothing, as on an H100."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    with (
        launching_nothing(),
        mock.patch.object(driver.active, "get_benchmarker", lambda: _benchmarker, create=True),
        mock.patch.object(JITFunction, "_do_compile", _not_compiled),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield


def calls_of(cell: str, which: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Return each library's call that works, and why others do not."""
    calls, left_out = {}, {}
    for name, build in LIBRARIES.items():
        shape, size = (Case(1, 1, SMALLEST, 1), SMALLEST) if name == BASELINE else (Case(T, B, H, 1), I)
        data = Data(Workload("host", cell, shape, input_size=size), "cpu")
        try:
            call = call_of(build(data), data, which)
            or_missing(call) if name not in (OURS, BASELINE) else call()
        except Missing as reason:
            left_out[name] = str(reason).splitlines()[0]
        else:
            calls[name] = call
    return calls, left_out


def launches_of(call: Call) -> int:
    """How many kernels a call launches, or would."""
    call()
    with mock.patch.object(Launcher, "__call__", autospec=True) as launched:
        call()
    return launched.call_count


Record = dict[str, Any]


def records(cell: str, which: str, rounds: int) -> Iterator[Record]:
    """Return a record of each library: microseconds, and how many times ours."""
    calls, left_out = calls_of(cell, which)
    launches = {name: launches_of(call) for name, call in calls.items()}
    seconds = in_turns(calls, rounds, clock.WallClock())
    for name in LIBRARIES:
        record: Record = {"cell": cell, "pass": which, "library": name}
        if name in left_out:
            yield record | {"note": left_out[name]}
            continue
        us = round(statistics.median(seconds[name]) * 1e6)
        record |= {"launches": launches[name]}
        yield record | {"us": us, "times ours": times_ours(seconds[name], seconds[OURS])}


def times_ours(theirs: list[float], own: list[float]) -> str:
    """Of calls in turn: the median ratio and quartiles.

    >>> times_ours([4.0, 6.0, 8.0], [2.0, 2.0, 2.0])
    '3.00 (2.50 to 3.50)'
    """
    low, median, high = quartiles(other / ours for other, ours in zip(theirs, own, strict=True))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


TEXT = (
    "What a call costs the host, kernels replaced by nothing (python -m bench.host_table): microseconds, and how many "
    "times ours, the median of pairs and quartiles. torch.nn's is its whole smallest call on the CPU."
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="calls of each library (default: 300)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write stage-host.json into this folder")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected a positive number, got {args.rounds}")
    if find_spec("triton") is None or interpreter.ENABLED:
        print("left out: Triton is missing, or interprets kernels (TRITON_INTERPRET=1)", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found: list[Record] = []
    lines = ["| cell | pass | library | launches | us | times ours |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")
    with compiling_nothing():
        for cell, which in itertools.product(("lstm", "gru"), PASSES):
            for record in records(cell, which, args.rounds):
                found.append(record)
                columns = [record.get(key, "") for key in ("cell", "pass", "library", "launches", "us")]
                lines.append(f"| {' | '.join(map(str, columns))} | {record.get('times ours') or record['note']} |")
                print(lines[-1], flush=True)
    if args.out:
        stage = {"stage": "host", "text": TEXT, "complete": True, "records": found}
        (args.out / "stage-host.json").write_text(json.dumps(stage))
    if args.write:
        versions = (f"{package} {clock.installed(package)}" for package in ("torch", "triton", "flashrnn", "torchrl"))
        write("python -m bench.host_table --write", [f"{clock.cpu()}, one thread; {', '.join(versions)}.", "", *lines])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
