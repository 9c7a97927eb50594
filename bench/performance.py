"""The table of modelled times in docs/performance.md: what the planner takes, and what the model says of its kernels.

    python -m bench.performance                     print it (some minutes: every kernel is compiled)
    python -m bench.performance --write             put it into docs/performance.md

No GPU is needed, and nothing is measured: fastrnn/inspect/timing.py says what the model rests on.
"""

import argparse
from collections.abc import Iterator

import torch

from fastrnn import launch
from fastrnn.inspect.compile import Problem, compile_problem, launches
from fastrnn.inspect.timing import modelled
from fastrnn.reference import GATES

from . import write

# LSTM: to reach, of the design, for H.
TARGETS = {64: 800, 128: 1000, 256: 1100, 512: 1300, 1024: 1150, 2048: 2200}
HEAD = "| cell, H | kernel | target | forward | inference | backward | largest of forward, of backward |"


def rows(cells: list[str], sizes: list[int], arch: str) -> Iterator[str]:
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for cell in cells:
        for H in sizes:
            yield row(Problem(cell, H, dtype=torch.bfloat16, arch=arch))


def row(problem: Problem) -> str:
    name = f"{problem.cell.removesuffix('_tanh')}, {problem.hidden_size}"
    try:
        compiled = compile_problem(problem)
    except (NotImplementedError, ValueError) as reason:
        return f"| {name} | none: {reason} | | | | | |"
    inputs = [compiled.tensors[key] for key in ("x_gates", "W_hh", "b_hh", "h_0", "c_0")]
    with launches(problem.spec) as found:
        launch.forward(problem.cell, *inputs, save=False, backend=compiled.plan.backend)  # type: ignore[arg-type]
    kernel = compiled.plan.kernel
    assert kernel is not None
    passes = [modelled(each) for each in (compiled.launches["forward"], found[0], compiled.launches["backward"])]
    forward, inference, backward = (each for each in passes if each is not None)
    split = (
        f"{kernel.ctas} CTAs, " if kernel.ctas > 1 else f"{kernel.grid[0]} programs, " if len(kernel.grid) > 2 else ""
    )
    target = TARGETS.get(problem.hidden_size, "") if problem.cell == "lstm" else ""
    cycles = " | ".join(f"{each.cycles:,}" for each in (forward, inference, backward))
    what = f"{compiled.plan.backend}, {kernel.dialect}, {split}{kernel.warps} warps"
    return f"| {name} | {what} | {target} | {cycles} | {forward.limit}, {backward.limit} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cell", nargs="+", choices=list(GATES), default=["lstm", "gru", "rnn_tanh"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 96, 128, 192, 256, 384, 512, 1024, 2048])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    lines = []
    for line in rows(args.cell, args.hidden, args.arch):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write("python -m bench.performance --write", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
