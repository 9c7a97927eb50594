"""Measure fastrnn's kernels for CPUs on this machine, in turns with torch.nn, and the other means that were tried.

    python -m bench.cpu              print the table: the issue's rows, one thread and two (some minutes)
    python -m bench.cpu --ladder     the GRU's training step by one means after the other
    python -m bench.cpu --write      put them into docs/performance.md (with --ladder that one)
    python -m bench.cpu --prices     measure what "auto" goes by: fastrnn/planning/cpu.json (most of an hour)

Times are of one call: inference without gradients; training with those of input and weights. float32, I = H. Ratios are
medians of pairs, two calls of one round, of the CPU time of this thread where there is one thread, so that a busy
machine may run it. Both must give the same, or nothing is printed.
"""

import argparse
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

from . import clock, write
from .cpu_ladder import MEANS
from .turns import quartiles

Call = Callable[[], Any]
SHAPES = ((128, 8, 64), (512, 16, 64), (128, 16, 128), (128, 32, 256), (64, 128, 256))  # T, B, I = H
PASSES = ("inference", "training")
# What "auto" goes by.
AXES = {"T": [4, 32, 128], "B": [1, 8, 64], "H": [16, 64, 128, 256, 512]}
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
    calls = [call_of(lambda x, m=m: m(x, **how)[0], x, list(m.parameters()), which) for m in (module, own)]
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
    for cell in ("gru", "rnn_tanh", "rnn_relu", "lstm"):
        for kind in ("", ", lengths"):
            ratios[cell + kind] = [
                [[_price(cell, (T, B, H), kind, seconds) for H in AXES["H"]] for B in AXES["B"]] for T in AXES["T"]
            ]
            print(cell + kind, ratios[cell + kind], flush=True)
            _store(ratios)


def _store(ratios: dict[str, Any]) -> None:
    made = {"cpu": clock.cpu(), "torch": torch.__version__, "llvmlite": clock.installed("llvmlite"), "threads": 1}
    text = json.dumps({"made": made, **AXES, "ratios": ratios}, indent=1)
    cpu.FILE.write_text(_compact(text) + "\n")


def _compact(text: str) -> str:
    """JSON with the innermost lists on a line each."""
    return re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)


def _price(cell: str, shape: tuple[int, int, int], kind: str, seconds: float) -> float:
    T, B, _ = shape
    how = {"lengths": torch.linspace(max(1, T // 2), T, B).long()} if kind else {}
    found = [measured(pair(cell, shape, which, **how), T, seconds)[2] for which in PASSES]
    return round(min(found), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring for each pair (default: 2)")
    for flag in ("ladder", "prices", "write"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument(
        "--busy", action="store_true", help="measure one thread only, if the second core has other work"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.prices:
        prices(args.seconds / 10)
        return 0
    lines = []
    for line in ladder(args.seconds) if args.ladder else table(args.seconds, args.busy):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write(f"python -m bench.cpu{' --ladder' if args.ladder else ''} --write", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
