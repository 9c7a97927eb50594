"""Measure how long a first call takes, most of which is Triton's compiler, and what fastrnn.warmup saves.

    python -m bench.first_call           a table (two minutes); --write puts it into docs/performance.md

No GPU is needed: what is compiled is what an H100 would load (bench/host_cost.py), which takes a GPU some milliseconds
more. Every figure is of a process of its own, which had compiled nothing, or which found all on disk.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
import triton

import fastrnn

from . import clock, write
from .host_cost import SPEC, launching_nothing

LAYERS = (("LSTM", 64, "float32"), ("GRU", 64, "float32"), ("LSTM", 256, "bfloat16"), ("LSTM", 1024, "bfloat16"))
# Of a model for each kind of its calls, all of which want kernels of their own: 8 kinds of layer, both passes.
TOGETHER = tuple((cell, H, dtype) for cell in ("LSTM", "GRU") for H in (48, 64) for dtype in ("float32", "bfloat16"))
T, B, INPUT = 4, 16, 16


def made(cell: str, H: int, dtype: str) -> tuple[torch.nn.Module, torch.Tensor]:
    of_dtype: torch.dtype = getattr(torch, dtype)
    planned = fastrnn.plan(cell.lower(), hidden_size=H, batch_size=B, seq_len=T, dtype=of_dtype, device=SPEC)
    module = getattr(fastrnn, cell)(INPUT, H, backend=planned.backend, dtype=of_dtype)
    return module, torch.randn(T, B, INPUT, dtype=of_dtype)


def first_call(cell: str, H: int, dtype: str) -> list[float]:
    """Return the seconds of forward and of backward."""
    module, x = made(cell, H, dtype)
    start = time.perf_counter()
    y, _ = module(x)
    between = time.perf_counter()
    y.sum().backward()
    return [between - start, time.perf_counter() - between]


class Together(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(made(*layer)[0] for layer in TOGETHER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x.to(layer.weight_hh_l0.dtype))[0].float().sum() for layer in self.layers])


def warmed(jobs: int) -> list[float]:
    """Return how many kernels were compiled, and the seconds."""
    module = Together()
    start = time.perf_counter()
    count = fastrnn.warmup(module, (T, B, INPUT), jobs=jobs)
    return [count, time.perf_counter() - start]


def alone(folder: str, *arguments: object) -> list[float]:
    """Run first_call or warmed in another process, with Triton's cache in a folder."""
    command = [sys.executable, "-m", "bench.first_call", "--one", json.dumps(arguments)]
    done = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": folder}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


HEAD = "| seconds of a first call | forward | backward | both, found on disk |"


def rows() -> Iterator[str]:
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    yield f"{clock.cpu()}, {os.cpu_count()} CPUs, on which {os.getloadavg()[0]:.1f} processes ran already; {versions}."
    yield ""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for cell, H, dtype in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            forward, backward = alone(folder, cell, H, dtype)
            loaded = sum(alone(folder, cell, H, dtype))
        yield f"| {cell}, H = {H}, {dtype} | {forward:.1f} | {backward:.1f} | {loaded:.1f} |"
    yield ""
    yield "| warmup of a model with 8 kinds of layer | kernels | seconds |"
    yield "|---|---|---|"
    for jobs in sorted({1, 2, os.cpu_count() or 1}):
        with tempfile.TemporaryDirectory() as folder:
            count, seconds = alone(folder, jobs)
            yield f"| jobs = {jobs} | {count:.0f} | {seconds:.1f} |"
            if jobs == 1:
                count, seconds = alone(folder, jobs)
                yield f"| all found on disk | {count:.0f} | {seconds:.1f} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args(argv)
    if args.one:
        given = json.loads(args.one)
        with launching_nothing(), contextlib.redirect_stdout(sys.stderr):
            found = warmed(*given) if len(given) == 1 else first_call(*given)
        print(json.dumps(found))
        return 0
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write("python -m bench.first_call --write", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
