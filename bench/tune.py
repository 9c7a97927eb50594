"""The planner's open choices measured: forms of a kernel, programs of a cluster; run by bench/forms.py."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import PASSES, Problem, call_backward, call_forward
from fastrnn.inspect.measure import us_per_step
from fastrnn.ops import prepared
from fastrnn.planning import cluster, cooperative, planner, prices, tuning
from fastrnn.planning.kernel_plan import KernelPlan, Request

from . import clock
from .processes import read
from .stages import Setup

SIZES = {"lstm": (64, 128, 256, 512, 1024), "gru": (128, 256, 512, 1024), "rnn_tanh": (256, 1024)}
WORTH = 0.98  # of the time of the planner's own choice: less of a gain is noise


def problems(arch: str, dry: bool) -> list[Problem]:
    """What is tuned, large and small sizes in turn."""
    if dry:
        return [Problem("gru", 8, 2, 2, dtype=torch.float32, arch=arch, backend="resident")]
    return [Problem(cell, H, arch=arch) for cell, sizes in SIZES.items() for H in sizes]


def name(problem: Problem) -> str:
    return f"{problem.cell} H={problem.hidden_size}"


@contextlib.contextmanager
def trying(arch: str, tuned: tuning.Tuned) -> Iterator[None]:
    """Plan by this instead of by the file, forgetting what was planned and compiled; to measure it."""

    def forget() -> None:
        cluster.cluster.cache_clear()
        cooperative.cooperative.cache_clear()
        spills._chosen.clear()
        prepared.forget()

    kept = dict(tuning.TUNED)
    tuning.TUNED[arch] = tuned
    forget()
    try:
        yield
    finally:
        tuning.TUNED.clear()
        tuning.TUNED.update(kept)
        forget()


def tune(problem: Problem, setup: Setup) -> list[dict[str, Any]]:
    """The time of each form in each pass, of every cluster that fits."""
    spec = DeviceSpec.of(torch.device("cpu" if setup.dry else "cuda"))
    records = []
    with trying(setup.arch, tuning.Tuned()):
        own = _kernel(problem, spec)
    sizes = [own.ctas] if own.ctas == 1 else [ctas for ctas in tuning.CTAS if ctas <= spec.cluster_limit]
    for ctas in sizes:
        wanted = {} if ctas == 1 else {_cluster_key(problem): ctas}
        with trying(setup.arch, tuning.Tuned(ctas=wanted)):
            kernel = _kernel(problem, spec)
        if kernel.ctas != ctas:  # it does not fit, and the planner kept to its own
            continue
        key = tuning.kernel_key(problem.request, kernel)
        for which in PASSES:
            for number, form in enumerate(kernel.choices[which]):
                tuned = tuning.Tuned({key: {which: form}}, wanted)
                with trying(setup.arch, tuned):
                    us = _us_per_step(problem, which, setup.dry)
                    spilled = not setup.dry and form not in spills.taken(which)
                record = {"kernel": key, "cluster": _cluster_key(problem) if ctas > 1 else None, "ctas": ctas}
                record |= {"pass": which, "form": json.dumps(form), "us": None if spilled else us, "spills": spilled}
                records.append(record | {"planner's own": ctas == own.ctas and number == 0})
    return records


def choices(problem: Problem, spec: DeviceSpec) -> Iterator[tuning.Tuned]:
    """What `tune` plans by, one after the other: to compile it before."""
    with trying(problem.arch, tuning.Tuned()):
        own = _kernel(problem, spec)
    for ctas in [1] if own.ctas == 1 else [ctas for ctas in tuning.CTAS if ctas <= spec.cluster_limit]:
        wanted = {} if ctas == 1 else {_cluster_key(problem): ctas}
        with trying(problem.arch, tuning.Tuned(ctas=wanted)):
            kernel = _kernel(problem, spec)
        key = tuning.kernel_key(problem.request, kernel)
        if kernel.ctas == ctas:
            for which in PASSES:
                yield from (tuning.Tuned({key: {which: form}}, wanted) for form in kernel.choices[which])


def _kernel(problem: Problem, spec: DeviceSpec) -> KernelPlan:
    kernel = planner.plan(
        problem.cell,
        hidden_size=problem.hidden_size,
        batch_size=problem.batch_size,
        seq_len=problem.seq_len,
        dtype=problem.dtype,
        device=spec,
        backend=problem.backend,
        precision=problem.precision,
    ).kernel
    if kernel is None:
        raise NotImplementedError(f"no kernel is planned for {problem}")
    return kernel


def _cluster_key(problem: Problem) -> str:
    tiles = -(-problem.batch_size // cluster.BLOCK_B) * problem.directions
    return tuning.cluster_key(problem.request, tiles)


def _us_per_step(problem: Problem, which: str, dry: bool) -> float:
    """Measured on the GPU; in a dry run the interpreter's, which decides nothing."""
    if not dry:
        return us_per_step(problem, [which])[which]
    tensors: Any = problem.tensors()
    with mock.patch("fastrnn.planning.planner.torch_precision", lambda: problem.precision):
        started = time.perf_counter()
        outputs = call_forward(problem.cell, tensors, problem.backend)
        if which == "backward":
            call_backward(problem.cell, tensors, outputs, problem.backend, needs_sums=False)
    return (time.perf_counter() - started) / problem.seq_len * 1e6


def choose(records: list[dict[str, Any]]) -> dict[str, Any]:
    """forms, ctas and us of a tuned file, from the records of all problems; of the first two what is clearly faster."""
    timed = [r for r in records if r.get("us") is not None]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for record in timed:
        key = record["kernel"], record["pass"]
        if key not in best or record["us"] < best[key]["us"]:
            best[key] = record
    forms: dict[str, dict[str, Any]] = {}
    for (kernel, which), record in best.items():
        own = next(r for r in timed if (r["kernel"], r["pass"]) == (kernel, which))  # the first that does not spill
        if record["us"] < WORTH * own["us"]:
            forms.setdefault(kernel, {})[which] = json.loads(record["form"])
    ctas: dict[str, int] = {}
    for key in dict.fromkeys(r["cluster"] for r in timed if r["cluster"]):
        both: dict[int, float] = {}  # of a cluster's size, the best of each pass
        for (_, _), record in best.items():
            if record["cluster"] == key:
                both[record["ctas"]] = both.get(record["ctas"], 0.0) + record["us"]
        own_size = next((r["ctas"] for r in timed if r["cluster"] == key and r["planner's own"]), None)
        fastest = min(both, key=both.__getitem__)
        if own_size is None or both[fastest] < WORTH * both[own_size]:
            ctas[key] = fastest
    passes = {kernel: [best.get((kernel, which), {}).get("us") for which in PASSES] for kernel, _ in best}
    return {"forms": forms, "ctas": ctas, "us": {kernel: us for kernel, us in passes.items() if None not in us}}


def of_torch(rows: list[dict[str, Any]], arch: str) -> Iterator[tuple[Request, list[float]]]:
    """Microseconds of a step of torch's kernel, forward and backward, from bench/layers.py's records at B = 16.

    They are of whole layers, whose products beside the loop, one forward and three backward, are left out of both its
    price and ours: they are subtracted, at the rate that prices.py takes.
    """
    for row in rows:
        if row["kind"] != "plain" or row["layers"] > 1 or row["bi"] or row["B"] != 16 or "nn_train" not in row:
            continue
        cell = {"RNN": "rnn_tanh"}.get(row["cell"], row["cell"].lower())
        dtype = getattr(torch, row["dtype"])
        problem = Problem(cell, row["H"], row["B"], dtype=dtype, arch=arch, precision="tf32")
        rate = prices.BOARDS[arch].tflops / (1 if dtype.itemsize == 2 else 2)
        product = 2 * row["B"] * problem.request.gates * row["H"] ** 2 / rate / 1e6
        forward, both = (row[name] * 1000 / row["T"] for name in ("nn_fwd", "nn_train"))
        yield problem.request, [round(forward - product, 3), round(both - forward - 3 * product, 3)]


def write(setup: Setup) -> None:
    """The planner's file, from the records of all problems, checked as it will be read; beside the other results."""
    records = read(setup.folder / "tuning.jsonl")
    made = {key: value for key, value in clock.machine().items() if key != "clocks"}
    file = setup.folder / f"tuned-{setup.arch}.json"
    chosen = choose(records)
    if setup.arch in prices.BOARDS:
        for request, us in of_torch(read(setup.folder / "compare.jsonl"), setup.arch):
            chosen["us"][tuning.torch_key(request)] = us
    file.write_text(json.dumps({"made": made, **chosen}, indent=1) + "\n")
    tuning.read(file)
