"""Time of forms of kernels: those that the planner may take, and sizes of clusters, warps and shares beside them.

    python -m bench.forms tuning --out FILE     every form of the planner's, from which tuned/<arch>.json is made
    python -m bench.forms sweep --out FILE      programs of a cluster x warps x groups that share a product's sum

One process measures; all cores compile before. A GPU is needed, except with --dry-run.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from fastrnn.cells import CELLS
from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.inspect import measure
from fastrnn.inspect.compile import Problem, call_backward, call_forward, compile_problem, launches
from fastrnn.inspect.resources import spill_bytes
from fastrnn.ops import launch
from fastrnn.ops.schema import Args
from fastrnn.planning import cluster, resident, tuning
from fastrnn.planning.kernel_plan import KernelPlan, Request, common, registers, tiles

from . import prepare, tune
from .processes import Log, options
from .stages import Record, Setup

BESIDE_WEIGHTS = 60  # registers a thread that no kernel did without
SHARED_FOR_WEIGHTS = 160 * 1024


class Form(NamedTuple):
    """One way to run a pass of a kernel that holds W_hh in so many programs."""

    cell: str
    hidden: int
    ctas: int
    warps: int
    shares: int
    which: str

    @property
    def key(self) -> Record:
        names = ("cell", "H", "ctas", "warps", "shares", "pass")
        return dict(zip(names, self, strict=True))

    @property
    def possible(self) -> bool:
        """Each warp has eight columns, and each group sixteen units to sum over."""
        units = self.hidden // self.ctas
        depth, columns = (self.hidden, units) if self.which == "forward" else (units, self.hidden)
        return depth // self.shares >= 16 and 1 <= self.warps // self.shares <= columns // 8

    def problem(self, arch: str) -> Problem:
        backend = "resident" if self.ctas == 1 else "cluster"
        return Problem(self.cell, self.hidden, dtype=torch.bfloat16, arch=arch, backend=backend)

    def choices(self, spec: DeviceSpec) -> tuple[dict[str, Any], ...]:
        """Constants to try, the most of W_hh in registers first."""
        gates = CELLS[self.cell].gates
        room = (registers(spec, self.warps) - BESIDE_WEIGHTS) * 4 * 32 * self.warps
        gate_bytes = self.hidden * (self.hidden // self.ctas) * 2
        found: list[dict[str, Any]] = []
        for held in range(gates, -1, -1):
            if held * gate_bytes <= room and (gates - held) * gate_bytes <= SHARED_FOR_WEIGHTS:
                form = {"SHARES": self.shares, "IN_REGISTERS": held}
                forward = self.which == "forward"
                found += [form | {"BIAS_KEPT": kept} for kept in (True, False)] if forward else [form]
        return tuple(found)


def forms() -> Iterator[Form]:
    """Yield the forms worth compiling; first the clusters at sizes where two tiers compete."""
    sizes = {256: (4, 8, 16), 512: (8, 16), 64: (1, 2), 128: (1, 2, 4)}
    for hidden, ctas in sizes.items():
        for cell, count in itertools.product(("lstm", "gru"), ctas):
            warps = (4, 8, 16) if hidden == 64 else (8, 16)
            for how in itertools.product(warps, (1, 2, 4), ("forward", "backward")):
                yield Form(cell, hidden, count, *how)
    for hidden in (128, 256):
        for how in itertools.product((8, 16), (1, 2, 4), ("forward", "backward")):
            yield Form("rnn_tanh", hidden, 1, *how)


@contextlib.contextmanager
def only(form: Form, arch: str) -> Iterator[None]:
    """Plan this form, whatever the planner would; launches of its pass in the block take it."""

    def held(request: Request, ctas: int, block_b: int = cluster.BLOCK_B) -> KernelPlan | None:
        choices = form.choices(request.spec)
        if ctas != form.ctas or block_b != cluster.BLOCK_B or not choices:
            return None
        return KernelPlan(
            **common(request), dialect="Gluon", block_b=cluster.BLOCK_B, units=request.H // ctas,
            grid=(tiles(request.B, cluster.BLOCK_B), request.recurrences), ctas=ctas, warps=form.warps,
            form={"BLOCK_B": cluster.BLOCK_B, "BLOCK_H": request.H},
            choices=dict.fromkeys(("forward", "backward"), choices), weight_bytes=0, weight_place="", shared_bytes=0,
        )  # fmt: skip

    with (
        mock.patch.object(cluster, "held", held),
        mock.patch.object(resident, "held", held),
        tune.trying(arch, tuning.Tuned()),
    ):
        resident.resident.cache_clear()
        try:
            yield
        finally:
            resident.resident.cache_clear()


def call_of(form: Form, problem: Problem, tensors: Any) -> Callable[[], object]:
    """The form's pass alone; backward after a forward that was not run, on values between 0.1 and 0.9."""
    if form.which == "forward":
        return lambda: call_forward(problem.cell, tensors, problem.backend)
    inputs = {name: tensors[name] for name in ("x_gates", "W_hh", "b_hh", "state_0")}
    outputs = launch.allocate_forward(Args(**inputs, cell=problem.cell, save=True, backend=problem.backend))._asdict()
    for name in ("y", "saved", "steps"):
        outputs[name].uniform_(0.1, 0.9)
    return lambda: call_backward(problem.cell, tensors, outputs, problem.backend, needs_sums=False)


def compiled(form: Form, arch: str) -> str | None:
    """Compile a form; why not, if not."""
    problem = replace(form.problem(arch), seq_len=4)
    try:
        with only(form, arch), launches(problem.spec) as found:
            call_of(form, problem, problem.tensors())()
            chosen = next(iter(spills._chosen.values()))
        spilled = spill_bytes(found[0].asm)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return f"spills {spilled} bytes with {chosen}" if spilled else None


def timed(form: Form, arch: str) -> Record:
    """Return the microseconds a step of one form."""
    times = []
    try:
        with only(form, arch):
            for steps in measure.STEPS:
                problem = replace(form.problem(arch), seq_len=steps)
                times.append(measure.median_us(call_of(form, problem, measure.tensors_of(problem))))
            chosen = next(iter(spills._chosen.values()))
    except Exception as error:
        return {"missing": f"{type(error).__name__}: {str(error)[:120]}"}
    return {"us": round((times[1] - times[0]) / (measure.STEPS[1] - measure.STEPS[0]), 4), "form": str(chosen)}


def sweep(log: Log, arch: str, dry: bool) -> None:
    everything = [Form("gru", 64, 1, 8, 1, "forward")] if dry else [form for form in forms() if form.possible]
    todo = [form for form in everything if log.lacks(form.key)]
    prepare.warm_up(dry)
    with prepare.side_by_side(compiled, [(form, arch) for form in todo]) as reasons:
        for form in log.each(todo, lambda form: form.key):
            missing = next(reasons)
            found: Record = {"missing": missing} if missing else {} if dry else timed(form, arch)
            log.add(form.key | found | {"triton": triton.__version__})


def compiled_for_tuning(problem: Problem, tuned: tuning.Tuned) -> None:
    """Compile what tune.tune will launch under these choices."""
    with tune.trying(problem.arch, tuned), contextlib.suppress(Exception):  # it fails again where it is measured
        compile_problem(problem)


def measure_planners(log: Log, arch: str, dry: bool) -> None:
    """Every form of the planner's, of one problem after the other."""
    setup = Setup(log.file.parent, arch, dry, log.left, time.monotonic())
    todo = [p for p in tune.problems(arch, dry) if log.lacks({"problem": tune.name(p)})]
    choices = [] if dry else [(p, tuned) for p in todo for tuned in tune.choices(p, prepare.spec(dry))]
    prepare.warm_up(dry)
    with prepare.side_by_side(compiled_for_tuning, choices) as compiled_ones:
        for problem in log.each(todo, lambda problem: {"problem": tune.name(problem)}):
            for _ in range(sum(p == problem for p, _ in choices)):
                next(compiled_ones)
            try:
                records = tune.tune(problem, setup)
            except Exception as error:
                records = [{"error": f"{type(error).__name__}: {str(error)[:300]}"}]
            for record in records:
                log.add({"problem": tune.name(problem)} | record)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("what", choices=("tuning", "sweep"))
    args = parser.parse_args()
    log = Log(args.out, args.seconds)
    arch = prepare.spec(args.dry_run).arch
    if args.what == "tuning":
        measure_planners(log, arch, args.dry_run)
    else:
        sweep(log, "sm_90" if args.dry_run else arch, args.dry_run)


if __name__ == "__main__":
    main()
