"""Simulate steps that read from device memory, and check that prefetches bring into L2 what they read.

    python -m bench.prefetched                        cycles of a step from L2 and from device memory (some minutes)
    python -m bench.prefetched --check lstm 64        how many steps ahead each line of memory is prefetched, as JSON
    ... --ahead N                                     with another distance than kernels/loop.py has
    ... --write                                       put the table into docs/performance.md

bf16, B = 16, sm_90. No GPU is needed: nothing here is measured, fastrnn/inspect/simulator says what it rests on.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from fastrnn.inspect.compile import PASSES, Problem, compile_problem
from fastrnn.inspect.simulator.simulate import STEPS, Kernel, of_launch, prepared
from fastrnn.kernels import loop

from . import write

CELLS, SIZES = ("lstm", "gru", "rnn_tanh"), (16, 64, 128, 256, 512)
HEAD = "| cell, H | kernel | forward: from L2, from device memory | backward: from L2, from device memory |"


def distances(kernel: Kernel) -> dict[str, int]:
    """Steps from a line's prefetch to its load, and of how many lines; "none" of those that no step prefetches.

    Those of the first steps, which nothing could prefetch, are left out.
    """
    traces, loads, prefetches = prepared(kernel).traces, {}, {}  # type: ignore[var-annotated]
    for ran, begins in zip(traces.ran, traces.begins, strict=True):
        for step in range(STEPS):
            for op, _, access, _ in ran[begins[step] : begins[step + 1]]:
                if access is not None and access.lines:
                    found = prefetches if op.is_prefetch else loads if op.name == "LDG" else {}
                    for line in access.lines:
                        found.setdefault(line, step)
    first = min(prefetches.values(), default=0) + loop.AHEAD.value
    late = {line: step for line, step in loads.items() if step >= first and line not in traces.loaded_before}
    found = Counter(str(step - prefetches[line]) if line in prefetches else "none" for line, step in late.items())
    return dict(found)


def check(cell: str, H: int) -> dict[str, Any]:
    """Of both passes: distances, and cycles of a step from L2 and from device memory."""
    of = compile_problem(Problem(cell, H, dtype=torch.bfloat16)).launches
    return {
        which: {"steps": distances(Kernel.of(of[which])), "L2": cycles(of[which], True), "memory": cycles(of[which])}
        for which in PASSES
    }


def cycles(launch: Any, is_cached: bool = False) -> int:
    return round(of_launch(launch, is_cached=is_cached).cycles)


def rows() -> Iterator[str]:
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for cell in CELLS:
        for H in SIZES:
            compiled = compile_problem(Problem(cell, H, dtype=torch.bfloat16))
            kernel = compiled.plan.kernel
            assert kernel is not None
            clusters = f"clusters of {kernel.ctas}" if kernel.ctas > 1 else compiled.plan.backend
            times = [
                f"{cycles(compiled.launches[which], True):,}, {cycles(compiled.launches[which]):,}" for which in PASSES
            ]
            name = f"{cell.removesuffix('_tanh')}, {H}"
            yield f"| {name} | {clusters}, tiles of {kernel.block_b} rows | {' | '.join(times)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", nargs=2, metavar=("CELL", "H"), help="check the prefetches of one kernel")
    parser.add_argument("--ahead", type=int, metavar="N", help="prefetch N steps ahead")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    if args.ahead is not None:
        loop.AHEAD = type(loop.AHEAD)(args.ahead)
    if args.check:
        print(json.dumps(check(args.check[0], int(args.check[1]))))
        return
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write("python -m bench.prefetched --write", lines)


if __name__ == "__main__":
    main()
