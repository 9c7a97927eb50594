"""One launch of each pass of a tier, against the reference; a process for each, since one may hang or crash.

python -m bench.launches check resident lstm 64 bfloat16 plain     a JSON object: faults, or why there is none
python -m bench.launches once resident lstm 64 8                   T = 8, for a sanitizer or a profiler
"""

import functools
import json
import sys
import time
from unittest import mock

import torch

from fastrnn import ops
from fastrnn.inspect.compile import Problem
from fastrnn.planning.kernel_plan import GridTooLargeError
from tests.support.cases import Case, make_problem, make_sequences, over_budget

from . import prepare
from .stages import Record

# Tier, cell, H, dtype, kind of sequence: first one of each tier.
FIRST = (
    ("resident", "lstm", 64, "bfloat16", "plain"),
    ("cooperative", "lstm", 256, "bfloat16", "plain"),
    ("cluster", "lstm", 256, "bfloat16", "plain"),
)
MORE = (
    ("resident", "gru", 128, "float16", "plain"),
    ("resident", "lstm", 64, "tf32", "plain"),
    ("resident", "lstm", 64, "float32", "plain"),
    ("resident", "rnn_relu", 96, "bfloat16", "ragged"),
    ("resident", "gru", 64, "bfloat16", "resets to a state"),
    ("cooperative", "gru", 1024, "float16", "plain"),
    ("cooperative", "lstm", 512, "float32", "plain"),
    ("cooperative", "lstm", 512, "tf32", "plain"),
    ("cooperative", "lstm", 300, "bfloat16", "ragged, resets by step"),
    ("cluster", "gru", 512, "float16", "plain"),
    ("cluster", "lstm", 100, "tf32", "plain"),
    ("cluster", "lstm", 384, "bfloat16", "lengths, resets by step"),
)
DRY = (("resident", "gru", 8, "float32", "plain"), ("cooperative", "lstm", 8, "float32", "lengths"))


def check(tier: str, cell: str, H: int, dtype: str, kind: str) -> Record:
    """Return the faults of both passes; none if they are as exact as the tests ask."""
    native = torch.cuda.is_available()
    device, case = ("cuda", Case(33, 17, H, 2)) if native else ("cpu", Case(2, 2, H, 2))
    precision = "tf32" if dtype == "tf32" else "ieee"
    # tf32 keeps as many bits as float16: that dtype's reference sets the budget.
    exact = torch.float16 if dtype == "tf32" else getattr(torch, dtype)
    run_in = torch.float32 if dtype == "tf32" else exact
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    make = make_problem if kind == "plain" else functools.partial(make_sequences, kind=kind)
    problem = make(cell, case, exact, device)

    def recurrence(name, *inputs, **options):
        converted = (None if t is None else t.to(run_in) for t in inputs)
        results = ops.recurrence(name, *converted, backend=tier, **options)
        return tuple(None if t is None else t.to(exact) for t in results)

    start = time.perf_counter()
    with mock.patch("fastrnn.planning.planner.torch_precision", lambda: precision):
        try:
            faults = over_budget(problem, recurrence)
        except (NotImplementedError, GridTooLargeError) as reason:
            return {"missing": str(reason)}
    return {"disagreement": json.dumps(faults) if faults else "none", "s": round(time.perf_counter() - start, 1)}


def once(tier: str, cell: str, H: int, T: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arch = prepare.spec(device == "cpu").arch
    outputs = prepare.one_launch(Problem(cell, H, 16, T, dtype=dtype, arch=arch), tier, device)
    print("ok", float(outputs["y"].float().abs().sum()), float(outputs["d_x_gates"].float().abs().sum()))


def main() -> None:
    command, tier, cell, H, *rest = sys.argv[1:]
    if command == "once":
        once(tier, cell, int(H), int(rest[0]))
    else:
        dtype, kind = rest
        print(json.dumps(check(tier, cell, int(H), dtype, kind)))


if __name__ == "__main__":
    main()
