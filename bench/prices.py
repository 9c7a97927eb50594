"""Write the tables that "auto" decides by: simulated steps, measured steps, and what it takes.

    python -m bench.prices                    what "auto" takes and its price, over H, B and cells
    python -m bench.prices --write            ... into docs/performance.md
    python -m bench.prices --simulate         fastrnn/planning/prices.json anew (half an hour: every form is compiled)
    python -m bench.prices --simulate --arch sm_90 --cell lstm     ... these alone, the rest stays
    python -m bench.prices --rows 16 32 64    a step of programs with so many rows, on sm_90; its products for nothing
    python -m bench.prices --measured         us of fastrnn/tuned/sm_90.json, from the records in bench/measured/

No GPU is needed.
"""

import argparse
import contextlib
import itertools
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton

import fastrnn
from fastrnn.inspect.compile import PASSES, Launch, Problem, call_backward, call_forward, launches
from fastrnn.inspect.resources import spill_bytes
from fastrnn.inspect.simulator.figures import figures
from fastrnn.inspect.simulator.simulate import of_launch
from fastrnn.inspect.simulator.what_if import FREED
from fastrnn.planning import cluster, cooperative, prices, resident, tuning
from fastrnn.planning.kernel_plan import GridTooLargeError, KernelPlan, Request

from . import DOCUMENT, write
from .measured import VISIT, records
from .tune import of_torch

ARCHS, CELLS = ("sm_80", "sm_90", "sm_100"), ("lstm", "gru", "rnn_tanh")
DTYPES = {"bfloat16": (torch.bfloat16, "ieee"), "float32-tf32": (torch.float32, "tf32"),
          "float32-ieee": (torch.float32, "ieee")}  # fmt: skip
# H of kernels that pad it to a power of two, and of slices, by the bytes of a number.
PADDED = {2: (16, 32, 64, 128, 256, 512, 1024), 4: (16, 64, 128, 256, 512)}
SLICED = {2: (256, 512, 1024, 2048), 4: (256, 1024)}


def problems(arch: str, dtype: str, cell: str) -> Iterator[Problem]:
    of, precision = DTYPES[dtype]
    for H in sorted({*PADDED[of.itemsize], *SLICED[of.itemsize]}):
        yield Problem(cell, H, 16, dtype=of, arch=arch, precision=precision)


def plans(problem: Problem) -> Iterator[tuple[str, Request, KernelPlan]]:
    """Yield every form that the planner may take, of one batch tile."""
    request = problem.request
    if problem.hidden_size in PADDED[problem.dtype.itemsize]:
        if cluster.held(request, 1) is None:
            with contextlib.suppress(NotImplementedError):
                yield "resident", request, resident.resident(request)
        sizes = [ctas for ctas in (1, *tuning.CTAS) if ctas <= request.spec.cluster_limit]
        if request.precision == "ieee" and request.dtype == torch.float32:
            sizes = sizes[:1]
        for ctas, rows in itertools.product(sizes, (cluster.BLOCK_B, cluster.NARROW_B, *cluster.TALL_B)):
            full = request._replace(B=max(rows, request.B))
            kernel = cluster.held(full, ctas, rows)
            if kernel is not None and (ctas == 1 or kernel.units >= 16):
                yield "resident" if ctas == 1 else "cluster", full, kernel
    if problem.hidden_size in SLICED[problem.dtype.itemsize]:
        dialects = set()
        for tiling in cooperative._tilings(request):
            one = request._replace(B=tiling.block_b)
            try:
                kernel = cooperative.of_tiling(one, tiling)
            except (NotImplementedError, GridTooLargeError):
                continue
            dialects.add(kernel.dialect)
            if kernel.dialect == "Gluon" or "Gluon" not in dialects:  # those of tile Triton are far slower
                yield "cooperative", one, kernel


def cycles(problem: Problem, tier: str, request: Request, kernel: KernelPlan) -> tuple[float, float]:
    """Return the simulated cycles of a step of this kernel, forward and backward."""
    found = compiled(replace(problem, batch_size=request.B), tier, kernel)
    assert not any(spill_bytes(launch.asm) > 64 for launch in found), (kernel, found)
    of_forward, of_backward = (of_launch(launch, is_cached=True).cycles for launch in found)
    return of_forward, of_backward


def compiled(problem: Problem, tier: str, kernel: KernelPlan) -> list[Launch]:
    """Compile both passes of a kernel."""
    problem = replace(problem, backend=tier)
    tensors = problem.tensors()
    with (
        mock.patch("fastrnn.planning.planner.kernel_for", lambda request, tier: kernel),
        launches(problem.spec, precision=problem.precision) as found,
    ):
        outputs = call_forward(problem.cell, tensors, tier)
        call_backward(problem.cell, tensors, outputs, tier, needs_sums=False)
    return found


def simulate(archs: list[str], cells: list[str], dtypes: list[str]) -> None:
    """Write the table anew for these, and keep the others."""
    for arch, dtype, cell in itertools.product(archs, dtypes, cells):
        found: dict[str, list[list[float]]] = {}
        for problem in problems(arch, dtype, cell):
            for tier, request, kernel in plans(problem):
                key = f"{arch} {dtype} {cell} {prices.form_of(kernel)}"
                try:
                    of = cycles(problem, tier, request, kernel)
                except Exception as error:
                    print(f"{key}, H={request.H}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                    continue
                found.setdefault(key, []).append([request.H, *map(round, of)])
                print(key, found[key][-1], flush=True)
        table = json.loads(prices.FILE.read_text())
        start = f"{arch} {dtype} {cell} "
        kept = {key: points for key, points in table["cycles"].items() if not key.startswith(start)}
        write_table(table | {"made": f"Triton {triton.__version__}", "cycles": dict(sorted((kept | found).items()))})


def write_table(table: dict[str, Any]) -> None:
    """A line a form."""
    table = table | {"error": errors(), "torch": torchs()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(points)}" for key, points in table.pop("cycles").items())
    rest = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    prices.FILE.write_text(f'{{\n{rest},\n "cycles": {{\n{lines}\n }}\n}}\n')


def errors() -> dict[str, list[float]]:
    """Simulated over measured, less one, forward and backward: what docs/performance.md says of each tier."""
    found: dict[str, list[float]] = {}
    for which in PASSES:
        for tier, percent in re.findall(rf"^\| (.+), {which} \| \d+ \| (-?\+?\d+)% \|", DOCUMENT.read_text(), re.M):
            form = "ctas=1" if tier == "resident" else "grid" if tier == "cooperative" else f"ctas={tier.split()[-1]}"
            found.setdefault(form, []).append(int(percent) / 100)
    return found


def torchs() -> dict[str, Any]:
    """Microseconds of a step of torch's kernel, forward and backward, as an H100 took them at B = 16.

    launched: the median of those that launch step by step; persistent: of those that do not, by H.
    """
    launched, persistent = [], {}
    for request, us in of_torch(records("compare"), "sm_90"):
        of = persistent.setdefault(request.H, []) if prices.is_persistent(request, "forward", 1) else launched
        of.append(us)

    def middle(of: list[list[float]]) -> list[float]:
        return [round(statistics.median(times), 2) for times in zip(*of, strict=True)]

    return {"launched": middle(launched), "persistent": [[H, *middle(persistent[H])] for H in sorted(persistent)]}


def measured_steps() -> dict[str, list[float]]:
    """us of fastrnn/tuned/sm_90.json: kernels that the planner may take, from bench/measured/, and torch's."""
    found: dict[str, dict[str, float]] = {}
    for record in records("forms"):
        request = Problem(record["cell"], record["H"], arch="sm_90").request
        kernel = cluster.held(request, record["ctas"])
        if kernel is None or "us" not in record or kernel.warps != record["warps"]:
            continue
        if kernel.choices[record["pass"]][0]["SHARES"] == record["shares"]:
            found.setdefault(tuning.kernel_key(request, kernel), {})[record["pass"]] = record["us"]
    # No cooperative kernel: those of that day waited at a counter, and today's poll.
    us = {key: [passes[which] for which in PASSES] for key, passes in found.items() if len(passes) == 2}
    return us | {tuning.torch_key(request): passes for request, passes in of_torch(records("compare"), "sm_90")}


def write_measured() -> None:
    us = measured_steps()
    file = tuning.FOLDER / "sm_90.json"
    made = {"gpu": "NVIDIA H100 80GB HBM3", "records": VISIT.name, "by": "python -m bench.prices --measured"}
    of_forms = {"forms": {}, "ctas": {}} if not file.exists() else json.loads(file.read_text())
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(us[key])}" for key in sorted(us))
    rest = "".join(f" {json.dumps(key)}: {json.dumps(of_forms[key])},\n" for key in ("forms", "ctas"))
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{\n "made": {json.dumps(made)},\n{rest} "us": {{\n{lines}\n }}\n}}\n')
    tuning.read(file)


HIDDEN, BATCH = (64, 128, 256, 512, 1024, 2048), (16, 128, 1024, 4096)


def rows(cells: list[str], archs: list[str]) -> Iterator[str]:
    """Yield rows: the choice of "auto", and its price in us a step at T = 1024."""
    passes = ("inference", "training")
    yield f"| cell, H | B | {' | '.join(f'{arch}, {which}' for arch in archs for which in passes)} |"
    yield "|---" * (2 + len(archs) * len(passes)) + "|"
    for cell, H, B in itertools.product(cells, HIDDEN, BATCH):
        taken = [chosen(cell, H, B, arch, which == "training") for arch in archs for which in passes]
        yield f"| {cell.removesuffix('_tanh')}, {H} | {B} | {' | '.join(taken)} |"


def chosen(cell: str, H: int, B: int, arch: str, training: bool) -> str:
    plan = fastrnn.plan(
        cell, hidden_size=H, batch_size=B, seq_len=1024, dtype=torch.bfloat16, device=arch, training=training
    )
    if not plan.prices:
        return f"{plan.backend}, no price"
    kernel, price = plan.kernel, next(price for price in plan.prices if price.backend == plan.backend)
    how = plan.backend
    if kernel is not None and kernel.ctas > 1:
        how = f"cluster of {kernel.ctas}"
    elif kernel is not None and kernel.parts > 1:
        how = f"{how}, {kernel.parts} parts"
    return f"{how} {price.us / price.steps:.3g} {price.source[0]}"


def taller(cell: str, H: int, ctas: int, rows: int) -> Iterator[str]:
    """Yield a pass's cycles of a step of programs with so many rows; in brackets, if products cost nothing."""
    problem = Problem(cell, H, rows, dtype=torch.bfloat16, arch="sm_90")
    kernel = cluster.held(problem.request, ctas, rows)
    if kernel is None:
        yield "a thread's registers hold no more"
        return
    for launch in compiled(problem, "resident" if ctas == 1 else "cluster", kernel):
        free = replace(figures("sm_90"), **FREED["tensor cores"](figures("sm_90")))
        whole, less = (of_launch(launch, is_cached=True, of=of).cycles for of in (None, free))
        yield f"{whole:.0f} ({less:.0f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--simulate", action="store_true", help="write fastrnn/planning/prices.json")
    parser.add_argument("--measured", action="store_true", help="write fastrnn/tuned/sm_90.json")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, choices=(16, 32, 64), metavar="ROWS", help="16, 32 or 64")
    args = parser.parse_args()
    if args.rows:
        print("| cell | H | programs | rows | cycles of a step, forward / backward (products for nothing) |")
        print("|---|---|---|---|---|")
        for cell, (H, ctas), count in itertools.product(args.cell, ((64, 1), (128, 4), (256, 8)), args.rows):
            print(f"| {cell} | {H} | {ctas} | {count} | {' / '.join(taller(cell, H, ctas, count))} |", flush=True)
        return 0
    if args.simulate:
        simulate(args.arch, args.cell, args.dtype)
    if args.measured:
        write_measured()
        write_table(json.loads(prices.FILE.read_text()))
    if not (args.simulate or args.measured):
        lines = list(rows(args.cell, args.arch))
        print("\n".join(lines))
        if args.write:
            write("python -m bench.prices --write", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
