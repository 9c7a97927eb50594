"""Measure time steps of kernels in microseconds, beside six bounds and a simulation, in one process, compiled before.

    python -m bench.steps planned --out FILE      what the planner takes, LSTM, GRU and RNN at 64 to 1024
    python -m bench.steps tiers --out FILE        tiers and sizes of clusters beside one another
    python -m bench.steps clusters --out FILE     how many clusters of a size are resident at once

bf16, B = 16. A GPU is needed, except with --dry-run.
"""

import itertools
import time

import torch
import triton

from fastrnn.inspect import measure

from . import prepare, resident
from .prepare import Job
from .processes import Log, options
from .stages import Record

# The most wanted first: what the planner's order rests on, and was not measured.
BESIDE = [
    (256, "cooperative", 0), (256, "cluster", 8), (512, "cooperative", 0), (512, "cluster", 16), (64, "cluster", 2),
    (64, "resident", 0), (128, "cluster", 4), (128, "resident", 0), (128, "cluster", 2), (256, "cluster", 4),
    (128, "cooperative", 0),
]  # fmt: skip
JOBS = {
    "planned": [Job(c, H) for H, c in itertools.product((64, 128, 256, 512, 1024), ("lstm", "gru", "rnn_tanh"))],
    "tiers": [Job(c, *how) for how, c in itertools.product(BESIDE, ("lstm", "gru"))],
    "clusters": [Job(c, H, "cluster", n) for H, n in ((256, 8), (512, 16), (128, 4), (64, 2)) for c in ("lstm", "gru")],
}
DRY = {"planned": [Job("gru", 8, "resident")], "tiers": [Job("gru", 8, "cooperative")], "clusters": []}


def timed(job: Job, arch: str, dry: bool) -> Record:
    """A record of one job: its kernel, and both passes' time."""
    problem = job.problem(arch)
    try:
        with prepare.planned(job, problem) as plan:
            kernel = plan.kernel
            assert kernel is not None
            found = {"backend": plan.backend, "ctas": kernel.ctas, "grid": list(kernel.grid), "warps": kernel.warps}
            if dry:
                start = time.perf_counter()
                prepare.one_launch(problem, plan.backend, "cpu")
                us = {"forward": (time.perf_counter() - start) / problem.seq_len * 1e6, "backward": None}
            else:
                us = measure.us_per_step(problem, ["forward", "backward"])
    except NotImplementedError as reason:
        return {"missing": str(reason)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return found | {which: value and round(value, 4) for which, value in us.items()}


def counted(job: Job, arch: str) -> Record:
    """How many clusters of a job's kernel the driver says are resident at once."""
    problem = job.problem(arch)
    try:
        with prepare.planned(job, problem) as plan:
            assert plan.kernel is not None
            return {"planned ctas": plan.kernel.ctas} | resident.clusters(problem, plan.backend)
    except NotImplementedError as reason:
        return {"missing": str(reason)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("which", choices=list(JOBS), help="what to measure")
    args = parser.parse_args()
    log, arch = Log(args.out, args.seconds), prepare.spec(args.dry_run).arch
    chosen = (DRY if args.dry_run else JOBS)[args.which]
    todo = [job for job in chosen if log.lacks(job.key)]
    arguments = [(job, "sm_90" if args.dry_run else arch) for job in todo]
    prepare.warm_up(args.dry_run)
    with prepare.side_by_side(prepare.modelled, arguments) as models:
        for job in log.each(todo, lambda job: job.key):
            model = next(models)
            found = counted(job, arch) if args.which == "clusters" else timed(job, arch, args.dry_run)
            log.add(job.key | found | model | {"triton": triton.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
