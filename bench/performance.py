"""Write the tables of simulated times in docs/performance.md: the planner's choice, and its simulated steps.

    python -m bench.performance                     print the table (some minutes: every kernel is compiled)
    python -m bench.performance --sequences         another: what lengths and resets add to a step
    python -m bench.performance --heads             another: 768 units in heads, beside what FlashRNN published
    ... --write                                     put it into docs/performance.md

No GPU is needed, and nothing of it is measured, but for what stands beside it in the first table, from bench/measured/:
fastrnn/inspect/simulator says what the simulation rests on. What a step reads is taken to be in L2.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from fastrnn.cells import CELLS
from fastrnn.inspect.compile import PASSES, Launch, Problem, compile_problem, launches
from fastrnn.inspect.simulator.simulate import Simulated, of_launch
from fastrnn.inspect.timing import RATES
from fastrnn.ops import launch
from fastrnn.ops.schema import Args, BackwardArgs
from fastrnn.sequences import Sequences

from . import write
from .measured import today
from .published import FLASHRNN_MS
from .simulated import MHZ

# LSTM: to reach, of the design, for H.
TARGETS = {64: 800, 128: 1000, 256: 1100, 512: 1300, 1024: 1150, 2048: 2200}
HEAD = (
    "| cell, H | kernel | target | forward | inference | backward | measured: forward, backward | "
    "most waited for: forward, backward |"
)
WORK = ("issue", "stall count")  # no wait for anything but the warp itself


def simulated(launch: Launch) -> Simulated:
    return of_launch(launch, is_cached=True)


def waited_for(of: Simulated) -> str:
    """The longest wait of a warp."""
    return next(f"{cause} {cycles:,.0f}" for cause, cycles in of.waits.items() if cause not in WORK)


def measured(problem: Problem) -> str:
    """Return the cycles of a step on an H100, forward and backward, if this form was measured."""
    times = [today(problem.cell, problem.hidden_size, which) for which in PASSES]
    return ", ".join("" if us is None else f"{us * MHZ:,.0f}" for us in times) if any(times) else ""


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
        return f"| {name} | none: {reason} | | | | | | |"
    inputs = {name: compiled.tensors[name] for name in ("x_gates", "W_hh", "b_hh", "state_0")}
    with launches(problem.spec) as found:
        launch.forward(Args(**inputs, cell=problem.cell, save=False, backend=compiled.plan.backend))
    kernel = compiled.plan.kernel
    assert kernel is not None
    all_three = (compiled.launches["forward"], found[0], compiled.launches["backward"])
    forward, inference, backward = map(simulated, all_three)
    split = (
        f"{kernel.ctas} CTAs, " if kernel.ctas > 1 else f"{kernel.grid[0]} programs, " if len(kernel.grid) > 2 else ""
    )
    target = TARGETS.get(problem.hidden_size, "") if problem.cell == "lstm" else ""
    cycles = " | ".join(f"{each.cycles:,.0f}" for each in (forward, inference, backward))
    what = f"{compiled.plan.backend}, {kernel.dialect}, {split}{kernel.warps} warps, {kernel.block_b} rows"
    waits = f"{waited_for(forward)}, {waited_for(backward)}"
    return f"| {name} | {what} | {target} | {cycles} | {measured(problem)} | {waits} |"


SEQUENCES_HEAD = "| cell, H | kernel | plain | resets | lengths | lengths, resets | lengths, resets to a state |"


def sequences_rows(cells: list[str], sizes: list[int], arch: str) -> Iterator[str]:
    yield SEQUENCES_HEAD
    yield "|---" * (SEQUENCES_HEAD.count("|") - 1) + "|"
    for cell in cells:
        for H in sizes:
            problem = Problem(cell, H, dtype=torch.bfloat16, arch=arch)
            yield sequences_row(problem, problem.plan().backend)


def sequences_row(problem: Problem, backend: str) -> str:
    """Return a row: forward and backward of each form, in cycles a step."""
    tensors: Any = problem.tensors()
    inputs = {name: tensors[name] for name in ("x_gates", "W_hh", "b_hh", "state_0")}
    upstream = {name: tensors[name] for name in ("dy", "d_finals", "W_hh", "state_0")}
    T, B = tensors["x_gates"].shape[:2]
    rows, reset = Sequences.of(T, B, lengths=torch.full((B,), T), reset=torch.zeros(T, B, dtype=torch.bool))
    both = {"rows": rows, "reset": reset}
    forms = ({}, {"reset": reset}, {"rows": rows}, both, both | {"starts": tensors["state_0"]})
    cells = []
    for form in forms:
        with launches(problem.spec) as found:
            made = launch.forward(Args(**inputs, cell=problem.cell, save=True, backend=backend, **form))
            kept = {"y": made.y, "saved": made.saved, "steps": made.steps, "d_steps": None}
            wanted = {"needs_dW": False, "needs_db": False}
            launch.backward(BackwardArgs(**upstream, **kept, cell=problem.cell, **wanted, backend=backend, **form))
        cells.append(" / ".join(f"{simulated(each).cycles:,.0f}" for each in found))
    return f"| {problem.cell.removesuffix('_tanh')}, {problem.hidden_size} | {backend} | {' | '.join(cells)} |"


HEADS_HEAD = (
    "| cell, heads x units | kernel | simulated: forward, backward | of T = 1024: forward, both | "
    "published: FlashRNN Triton, fused | FlashRNN CUDA, fused |"
)


def heads_rows(cells: list[str], sizes: list[int], arch: str) -> Iterator[str]:
    """Simulated us a step, and ms of 1024 steps, beside published ms: forward, and forward and backward."""
    yield HEADS_HEAD
    yield "|---" * (HEADS_HEAD.count("|") - 1) + "|"
    for cell in cells:
        for K in sizes:
            compiled = compile_problem(Problem(cell, 768, num_heads=768 // K, dtype=torch.bfloat16, arch=arch))
            kernel = compiled.plan.kernel
            assert kernel is not None
            cycles = [simulated(compiled.launches[which]).cycles for which in PASSES]
            forward, backward = (each / RATES[arch].ghz / 1000 for each in cycles)
            both = forward + backward
            published = [FLASHRNN_MS[f"FlashRNN {form}, fused"].get(K, ()) for form in ("Triton", "CUDA")]
            texts = [", ".join("does not fit" if ms is None else f"{ms:.2f}" for ms in of) or "-" for of in published]
            yield (
                f"| {cell}, {768 // K} x {K} | {compiled.plan.backend}, {kernel.programs} programs | {forward:.2f}, "
                f"{backward:.2f} us | {forward * 1.024:.2f}, {both * 1.024:.2f} ms | {' | '.join(texts)} |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cell",
        nargs="+",
        choices=list(CELLS),
    )
    parser.add_argument("--hidden", nargs="+", type=int)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--sequences", action="store_true", help="show what lengths and resets add to a step")
    parser.add_argument("--heads", action="store_true", help="show 768 units in heads of --hidden units each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    cells = args.cell or (["lstm", "slstm"] if args.heads else ["lstm", "gru", "rnn_tanh"])
    if args.heads:
        table, flag, sizes = heads_rows, " --heads", [16, 32, 64, 128, 256, 768]
    elif args.sequences:
        table, flag, sizes = sequences_rows, " --sequences", [64, 128, 256, 512, 1024]
    else:
        table, flag, sizes = rows, "", [64, 96, 128, 192, 256, 384, 512, 1024, 2048]
    lines = []
    for line in table(cells, args.hidden or sizes, args.arch):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write(f"python -m bench.performance{flag} --write", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
