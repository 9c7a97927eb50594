"""Measure fastrnn's kernels for CPUs on this machine, in turns with torch.nn, and the other means that were tried.

    python -m bench.cpu              print the table: the issue's rows, one thread and two (some minutes)
    python -m bench.cpu --auto       what "auto" takes beside torch.nn, in all cases: fails where it is slower or larger
    python -m bench.cpu --options    lengths, resets, cell states and step(): torch's kernels, and ours
    python -m bench.cpu --ladder     the GRU's training step by one means after the other
    python -m bench.cpu --write      put them into docs/performance.md (with --ladder that one)
    python -m bench.cpu --prices     measure what "auto" goes by: fastrnn/planning/cpu.json (half an hour)

Times are of one call: inference without gradients; training with those of input and weights. float32, I = H. Ratios are
medians of pairs, two calls of one round, of the CPU time of this thread where there is one thread, so that a busy
machine may run it. Both must give the same, or nothing is printed.
"""

import argparse
import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastrnn
from fastrnn import cells, ops, reference
from fastrnn.planning import cpu

from . import clock, cpu_auto, write
from .cpu_ladder import MEANS
from .turns import quartiles

Call = Callable[[], Any]
SHAPES = ((128, 8, 64), (512, 16, 64), (128, 16, 128), (128, 32, 256), (64, 128, 256))  # T, B, I = H
PASSES = ("inference", "training")
# What "auto" goes by.
AXES = {"T": [4, 32, 64, 128], "B": [1, 8, 64], "H": [16, 64, 128, 256, 512]}
HEAD = (
    "| T, B, H | cell | inference: torch.nn, us a step | ours | ratio | training: torch.nn, us a step | ours | ratio "
    "| two threads: ratios |"
)


def in_turns(calls: list[Call], seconds: float, least: int = 3) -> list[list[float]]:
    """Seconds of every call of each, round by round."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(found[0]) < least or time.perf_counter() < end:
        for times, call in zip(found, calls, strict=True):
            start = now()
            call()
            times.append(now() - start)
    return found


def call_of(run: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], which: str) -> Call:
    if which == "inference":
        return torch.no_grad()(lambda: run(x))
    given = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(run(given).sum(), [given, *leaves])


def pair(cell: str, shape: tuple[int, int, int], which: str, **how: Any) -> list[Call]:
    """torch.nn's call, or torch's kernels' where there are lengths, and ours, which agree."""
    T, B, H = shape
    name, options = (cell.upper(), {}) if cell in ("lstm", "gru") else ("RNN", {"nonlinearity": cell[4:]})
    module = getattr(fastrnn if how else torch.nn, name)(H, H, **options, **({"backend": "torch"} if how else {}))
    own = getattr(fastrnn, name)(H, H, **options, backend="cpu")
    own.load_state_dict(module.state_dict())
    x = torch.randn(T, B, H)

    def run(module: Any, x: Tensor) -> Tensor:
        y, _, *c = module(x, **how)
        return y + c[0] if c else y

    calls = [call_of(functools.partial(run, m), x, list(m.parameters()), which) for m in (module, own)]
    expected, found = (call() for call in calls)
    if cell == "rnn_relu" and which == "training":
        return calls  # where rounding moves a unit over the kink, gradients are others
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * max(1.0, (B * T) ** 0.5 / 10))
    return calls


def measured(calls: list[Call], T: int, seconds: float) -> tuple[float, float, float]:
    """Microseconds a step of both, and the ratio."""
    theirs, own = in_turns(calls, seconds)
    ratio = quartiles(a / b for a, b in zip(theirs, own, strict=True))[1]
    return 1e6 * statistics.median(theirs) / T, 1e6 * statistics.median(own) / T, ratio


def table(seconds: float, busy: bool = False) -> Iterator[str]:
    """busy: other work has the second core, and two threads are left out."""
    yield f"Measured on one {clock.cpu()}; torch {torch.__version__}, llvmlite {clock.installed('llvmlite')}."
    yield ""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for cell in ("gru", "rnn_tanh", "lstm"):
        for shape in SHAPES:
            columns, both = [], []
            for which in PASSES:
                torch.set_num_threads(1)
                calls = pair(cell, shape, which)
                theirs, own, ratio = measured(calls, shape[0], seconds)
                columns += [f"{theirs:.1f}", f"{own:.1f}", f"{ratio:.1f}x"]
                if not busy:
                    torch.set_num_threads(2)
                    both.append(f"{measured(calls, shape[0], seconds)[2]:.1f}x")
            columns = [", ".join(map(str, shape)), cell, *columns, ", ".join(both) or "not measured"]
            yield f"| {' | '.join(columns)} |"
    torch.set_num_threads(1)
    yield ""
    yield "Beside the loop in torch, which is all that torch has for these; T, B, H = 256, 8, 128, of x_gates:"
    yield ""
    yield "| cell | pass | the loop, us a step | ours | ratio |"
    yield "|---|---|---|---|---|"
    from examples import mgu  # noqa: F401 - it registers its cell

    for cell in ("slstm", "mgu"):
        for which in PASSES:
            theirs, own, ratio = measured(loops(cell, (256, 8, 128), which), 256, seconds)
            yield f"| {cell} | {which} | {theirs:.1f} | {own:.1f} | {ratio:.1f}x |"


def options(seconds: float) -> Iterator[str]:
    """Segments by torch's kernels and ours, where a call has options; then a step by torch's cells, and by ours."""
    torch.set_num_threads(1)
    yield f"Measured on one {clock.cpu()}, one thread; torch {torch.__version__}. Ours is so many times as fast:"
    yield ""
    yield "| T, B, H | cell | with | inference | training |"
    yield "|---|---|---|---|---|"
    for shape in SHAPES[:-1]:
        for cell in ("gru", "rnn_tanh", "lstm"):
            for kind in cpu.KINDS if cell == "lstm" else cpu.KINDS[:-1]:
                pairs = [pair(cell, shape, which, **options_of(kind, *shape[:2])) for which in PASSES]
                ratios = [f"{measured(calls, shape[0], seconds)[2]:.2f}x" for calls in pairs]
                yield f"| {', '.join(map(str, shape))} | {cell} | {kind} | {' | '.join(ratios)} |"
    for B, H in ((1, 64), (16, 128), (64, 256)):
        for name in ("GRU", "RNN", "LSTM"):
            modules = [getattr(fastrnn, name)(H, H, backend=backend) for backend in ("torch", "cpu")]
            leaves, x = [list(module.parameters()) for module in modules], torch.randn(B, H)
            calls = [
                [call_of(lambda x, m=m: m.step(x)[0], x, own, which) for m, own in zip(modules, leaves, strict=True)]
                for which in PASSES
            ]
            ratios = [f"{measured(of_pass, 1, seconds)[2]:.2f}x" for of_pass in calls]
            yield f"| step, {B}, {H} | {name.lower()} | step() | {' | '.join(ratios)} |"


def options_of(kind: str, T: int, B: int) -> dict[str, Any]:
    """Options of a call, by one of fastrnn.planning.cpu.KINDS, or none."""
    if kind == "lengths":  # all of a batch: torch's blocks are the longer, the fewer sequences end inside
        return {"lengths": torch.linspace(1, T, B).long() if B > 1 else torch.tensor([max(1, T - 1)])}
    if kind == "resets":
        return {"reset": torch.rand(T, B) < 1 / 64}
    return {"return_cell_states": True} if kind else {}


def loops(cell: str, shape: tuple[int, int, int], which: str) -> list[Call]:
    """A recurrence by the loop in torch, and ours."""
    (T, B, H), of_cell = shape, cells.CELLS[cell]
    G, others = of_cell.gates, len(of_cell.states) - 1
    x_gates, W_hh = torch.randn(T, B, 1, G, H), torch.randn(1, G * H, H) * H**-0.5
    h_0, c_0 = torch.zeros(1, B, H), torch.zeros(others, 1, B, H) if others else None
    leaves = [W_hh.requires_grad_()]

    def run(recurrence: Any, **how: Any) -> Callable[[Tensor], Tensor]:
        return lambda x_gates: recurrence(cell, x_gates, W_hh, None, h_0, c_0, **how)[0]

    runs = run(reference.recurrence), run(ops.recurrence, backend="cpu")
    return [call_of(of_one, x_gates, leaves, which) for of_one in runs]


def ladder(seconds: float) -> Iterator[str]:
    """The GRU's training step, T, B, H = 128, 8, 64, by every means at hand."""
    torch.set_num_threads(1)
    yield f"Measured on one {clock.cpu()}, one thread; torch {torch.__version__}. T, B, H = 128, 8, 64, training:"
    yield ""
    yield "| means | us a step | times as fast as torch.nn, in turns |"
    yield "|---|---|---|"
    T, B, H = 128, 8, 64
    gru, x = torch.nn.GRU(H, H), torch.randn(T, B, H)
    calls: dict[str, Call] = {}
    for name, build in MEANS.items():
        try:
            calls[name] = call_of(build(gru), x, list(gru.parameters()), "training")
            calls[name]()
        except ImportError as missing:
            yield f"| {name} | not installed: {missing.name} | |"
    for name, call in calls.items():
        theirs, own = in_turns([calls["torch.nn"], call], seconds)
        ratio = quartiles(a / b for a, b in zip(theirs, own, strict=True))[1]
        yield f"| {name} | {1e6 * statistics.median(own) / T:.1f} | {ratio:.1f} |"


def prices(seconds: float) -> None:
    """Write fastrnn/planning/cpu.json."""
    torch.set_num_threads(1)
    ratios: dict[str, Any] = {}
    # Of a GRU and an RNN resets cost torch's kernels more than lengths do, and those of the LSTM decide.
    kinds = {"lstm": ("", *cpu.KINDS)}
    for cell in ("gru", "rnn_tanh", "rnn_relu", "lstm"):
        for kind in kinds.get(cell, ("", "lengths")):
            for which in PASSES:
                name = ", ".join(filter(None, (cell, kind, which)))
                ratios[name] = [
                    [[_price(cell, (T, B, H), kind, which, seconds) for H in AXES["H"]] for B in AXES["B"]]
                    for T in AXES["T"]
                ]
                print(name, ratios[name], flush=True)
                _store(ratios)


def _store(ratios: dict[str, Any]) -> None:
    made = {"cpu": clock.cpu(), "torch": torch.__version__, "llvmlite": clock.installed("llvmlite"), "threads": 1}
    text = json.dumps({"made": made, **AXES, "ratios": ratios}, indent=1)
    cpu.FILE.write_text(_compact(text) + "\n")


def _compact(text: str) -> str:
    """JSON with the innermost lists on a line each."""
    return re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)


def _price(cell: str, shape: tuple[int, int, int], kind: str, which: str, seconds: float) -> float:
    calls = pair(cell, shape, which, **options_of(kind, *shape[:2]))
    return round(measured(calls, shape[0], seconds)[2], 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring for each pair (default: 2)")
    for flag in ("auto", "options", "ladder", "prices", "write"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument(
        "--busy", action="store_true", help="measure one thread only, if the second core has other work"
    )
    args = parser.parse_args()
    if args.write and (args.auto or args.options):
        parser.error("--write: expected the plain table or --ladder with it; the document has no other")
    torch.manual_seed(0)
    if args.prices:
        prices(args.seconds / 10)
        return 0
    wrong: list[str] = []
    if args.auto:
        found, flag = cpu_auto.table(args.seconds / 10, cpu_auto.rows(), wrong), " --auto"
    elif args.options:
        found, flag = options(args.seconds), " --options"
    else:
        found, flag = (ladder(args.seconds), " --ladder") if args.ladder else (table(args.seconds, args.busy), "")
    lines = []
    for line in found:
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write(f"python -m bench.cpu{flag} --write", lines)
    for row in wrong:
        print(f"costs more than it may: {row}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
