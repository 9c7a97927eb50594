"""Run by test_compiled.py and test_cluster.py in a process that compiles: execute kernels' PTX, print what errs.

A JSON object a line:

python -m tests.support.executed kernels sm_90 resident     every cell, pass and dtype, under a schedule of its own
python -m tests.support.executed sequences sm_90 resident ragged   kinds of SEQUENCES with this word, with cell states
python -m tests.support.executed absent sm_90 resident      first states left out, plain and with sequences
python -m tests.support.executed tile sm_90 resident        the same in tile Triton, where Gluon takes its place
python -m tests.support.executed rows sm_90 resident 16     kernels and sequences in batch tiles of so many rows
python -m tests.support.executed plans 512 FOLDER           what "auto" plans at H=512, every cell: results in a file
python -m tests.support.executed schedules sm_90 cluster 50 every cell and pass in one dtype, under so many schedules
python -m tests.support.executed windows sm_90 resident     what a run in two windows gives that a whole one does not
python -m tests.support.executed parts sm_90                what a batch in parts gives that one launch does not
python -m tests.support.executed mutations                  after a change to the PTX, which must be noticed
python -m tests.support.executed clusters                   cluster_race.py, compiled and changed, by rule and executed
python -m tests.support.executed counted                    what `inspect` counts of a kernel with an exchange in it
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fastrnn import ops, plan
from fastrnn.device import DeviceSpec
from fastrnn.inspect import cluster
from fastrnn.inspect.compile import Launch, launches
from fastrnn.inspect.execute import ExecutionError, execute
from fastrnn.inspect.resources import resources
from fastrnn.ops import library
from fastrnn.ops.schema import Args
from fastrnn.planning import cooperative
from fastrnn.reference import stacked

from .cases import CELLS, SEQUENCES, TIMES, TIMES_FLOAT32, Case, Problem, make_problem, make_sequences, over_budget
from .cluster_race import residual
from .planned import tiles_of
from .versions import HAS_CLUSTERS

# Not aligned to 16 bytes, and aligned; rows and units masked; two tiles of 8 rows; two directions; several programs
# where W_hh is split, and pieces of 32 and 16 columns.
CASES = {
    "resident": Case(T=3, B=11, H=24, D=2),
    "cluster": Case(T=3, B=11, H=100, D=2),
    "cooperative": Case(T=6, B=3, H=262, D=1),
}
KINDS = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32"))


def kernels(arch: str, backend: str) -> Iterator[dict]:
    kinds = [kind for kind in KINDS if kind != ("float32", "ieee") or backend != "cluster"]
    for seed, cell in enumerate(CELLS):
        for dtype, precision in kinds if cell == "lstm" else kinds[seed % 2 :: 2]:
            # tf32 keeps as many bits as float16: that dtype's reference sets the budget.
            exact = torch.float16 if precision == "tf32" else getattr(torch, dtype)
            problem = make_problem(cell, CASES[backend], exact, "cpu")
            # At this size all of W_hh fits in registers: leave one operand there for one cell, the rest goes to shared.
            held = (8,) if cell == "gru" else cooperative.WEIGHT_REGISTERS
            with mock.patch.object(cooperative, "WEIGHT_REGISTERS", held), short_rounds(seed % 2 == 0):
                faults = faults_of(problem, arch, backend, precision, functools.partial(execute, seed=seed), dtype)
            yield {"cell": cell, "dtype": dtype, "precision": precision, "seed": seed, "faults": faults}


def short_rounds(are_short: bool = True):
    """Plan cooperative kernels of rounds of two steps, so that six take slots twice."""
    return mock.patch.object(cooperative, "ROUND", 2 if are_short else cooperative.ROUND)


def sequences(arch: str, backend: str, word: str = "") -> Iterator[dict]:
    for seed, kind in enumerate(kind for kind in SEQUENCES if word in kind):
        for cell in ("lstm", ("gru", "rnn_tanh")[seed % 2]):
            problem, spills = make_sequences(cell, CASES[backend], torch.bfloat16, "cpu", kind), []

            def run(launch: Launch, seed: int = seed, spills: list[str] = spills) -> None:
                execute(launch, seed)
                spills += [launch.name] * (resources(launch).spill_bytes > 0)

            faults = faults_of(problem, arch, backend, "ieee", run, "bfloat16")
            yield {"cell": cell, "kind": kind, "faults": faults, "spills": spills}


def absent(arch: str, backend: str) -> Iterator[dict]:
    """First states that are not given have the bits of zeros that are, and these are right."""
    for seed, (cell, kind) in enumerate((("gru", "resets"), ("lstm", "lengths"), ("lstm", "resets"))):
        problem = make_sequences(cell, CASES[backend], torch.bfloat16, "cpu", kind)
        *weights, h_0, c_0 = problem.inputs
        states = [None if state is None else torch.zeros_like(state) for state in (h_0, c_0)]
        problem = problem._replace(inputs=(*weights, *states))
        run, found = functools.partial(execute, seed=seed), []
        faults = faults_of(problem, arch, backend, "ieee", run, "bfloat16")
        rows, reset = problem.options["sequences"]
        for state_0 in (stacked(*states), None):
            given = [weight.clone().requires_grad_() for weight in weights]
            args = Args(*given, state_0, cell=cell, save=False, backend=backend, rows=rows, reset=reset)
            with launches(DeviceSpec.named(arch), run=run):
                results = library.run(args)
                total = results.y.sin().sum() + results.finals.sin().sum()
                found.append((results.y, results.finals, *torch.autograd.grad(total, given)))
        differ = [n for n, pair in enumerate(zip(*found, strict=True)) if not torch.equal(*pair)]
        yield {"cell": cell, "kind": kind, "faults": faults, "differ": differ}


def tile(arch: str, backend: str) -> Iterator[dict]:
    with mock.patch("fastrnn.compat.spills.triton_version", lambda: (3, 5)):  # which has no Gluon
        yield from kernels(arch, backend)


def rows(arch: str, backend: str, count: str) -> Iterator[dict]:
    case = CASES[backend]._replace(B=int(count) + 3)
    with tiles_of(int(count)), mock.patch.dict(CASES, {backend: case}):
        yield from kernels(arch, backend)
        yield from sequences(arch, backend, "by step")


def plans(H: str, folder: str) -> Iterator[dict]:
    """What "auto" plans for sm_90 at a size: problems and their outputs and gradients are written to the folder."""
    for cell in CELLS:
        problem = make_problem(cell, Case(T=2, B=3, H=int(H), D=1), torch.bfloat16, "cpu")
        backend = plan(cell, hidden_size=int(H), batch_size=3, dtype=torch.bfloat16, device="sm_90").backend
        with launches(DeviceSpec.named("sm_90"), run=functools.partial(execute, seed=int(H))):
            found = problem.run(functools.partial(ops.recurrence, backend=backend))
        torch.save((problem.inputs, problem.upstream, found), f"{folder}/{cell}.pt")
        yield {"cell": cell, "backend": backend}


def schedules(arch: str, backend: str, count: str) -> Iterator[dict]:
    for cell in CELLS:
        problem = make_problem(cell, CASES[backend], torch.bfloat16, "cpu")
        for seed in range(int(count)):
            with short_rounds():
                faults = faults_of(problem, arch, backend, "ieee", functools.partial(execute, seed=seed), "bfloat16")
            yield {"cell": cell, "seed": seed, "faults": faults}


def faults_of(problem: Problem, arch: str, backend: str, precision: str, run: Callable, dtype: str) -> dict:
    def recurrence(cell, *inputs, **options):
        converted = (None if t is None else t.to(getattr(torch, dtype)) for t in inputs)
        results = ops.recurrence(cell, *converted, backend=backend, **options)
        return tuple(None if t is None else t.to(problem.inputs[0].dtype) for t in results)

    with launches(DeviceSpec.named(arch), run=run, precision=precision):
        return over_budget(problem, recurrence, times=TIMES_FLOAT32 if dtype == "float32" else TIMES)


def windows(arch: str, backend: str) -> Iterator[dict]:
    """A state in fp32 is as exact between launches as between steps: all that is no sum over time has the same bits."""
    for seed, (cell, kept) in enumerate((("lstm", torch.float32), ("gru", torch.float32), ("gru", torch.bfloat16))):
        problem = make_problem(cell, CASES[backend]._replace(T=4, D=1), torch.bfloat16, "cpu")

        def in_two(cell, x_gates, W_hh, b_hh, *state, kept=kept):
            state, ys = tuple(None if s is None else s.to(kept) for s in state), []
            for part in x_gates.split((3, 1)):
                y, *state = ops.recurrence(cell, part, W_hh, b_hh, *state, backend=backend)
                ys.append(y)
            return torch.cat(ys), *(None if s is None else s.to(x_gates.dtype) for s in state)

        with launches(DeviceSpec.named(arch), run=functools.partial(execute, seed=seed)):
            whole, found = problem.run(functools.partial(ops.recurrence, backend=backend)), problem.run(in_two)
        sums = {"d_W_hh", "d_b_hh"}
        differ = [name for name in whole.keys() - sums if not torch.equal(whole[name], found[name])]
        yield {"cell": cell, "kept": str(kept), "differ": differ}


def mutated(name: str, change: Callable[[str], str], seed: int) -> Callable[[Launch], None]:
    """Execute launches, that of the named pass with changed PTX."""

    def run(launch: Launch) -> None:
        if launch.name == name:
            changed = change(launch.asm["ptx"])
            assert changed != launch.asm["ptx"], "the mutation changed nothing"
            launch = dataclasses.replace(launch, asm={**launch.asm, "ptx": changed})
        execute(launch, seed)

    return run


def replace(pattern: str, by: str, count: int = 0) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, by, ptx, count=count)


def nth(pattern: str, by: str, n: int) -> Callable[[str], str]:
    """Replace the n-th match only, from the end if negative."""

    def change(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[n]
        return ptx[: match.start()] + match.expand(by) + ptx[match.end() :]

    return change


STRONG_LOAD, STRONG_STORE = (rf"{of}\.relaxed\.gpu\.global" for of in ("ld", "st"))
CLUSTER_BARRIER = (r"barrier\.cluster\.arrive[^;]*;\s*barrier\.cluster\.wait[^;]*;", "bar.sync 0;")
# What is broken: tier, pass, the change, and what it must be noticed as ("" for a result over its budget).
MUTATIONS = {
    "a barrier between shared load and store removed": ("resident", "forward", nth(r"bar\.sync\s+0;", "", -1), "race"),
    "the grid barrier's spin removed": (
        "cooperative", "forward",
        replace(r"(setp\.lt\.s64\s+(%p\d+), )%rd\d+, %rd\d+;(\s+@\2 bra)", r"\g<1>1, 0;\3"), "race"),
    "state loaded weakly": ("cooperative", "forward", replace(STRONG_LOAD, "ld.global"), "race: reads weakly"),
    "d_gates loaded weakly": ("cooperative", "backward", replace(STRONG_LOAD, "ld.global"), "race: reads weakly"),
    "state sent weakly": ("cooperative", "forward", replace(STRONG_STORE, "st.global"), "race"),
    "d_gates sent weakly": ("cooperative", "backward", replace(STRONG_STORE, "st.global"), "race"),
    "what is missing not waited for": ("cooperative", "forward", replace(r"@%q0 bra POLL\w+;", ""), ""),
    "a word not looked at": ("cooperative", "backward", nth(r"(max\.u32 %r\d+, %r\d+), %r\d+;", r"\1, 0;", -1), ""),
    "numbers of a word sent apart": (
        "cooperative", "forward", replace(rf"{STRONG_STORE}\.b32", "st.relaxed.gpu.global.b16"), "race: reads 4 bytes"),
    "numbers of a word swapped": (
        "cooperative", "forward", replace(r"(prmt\.b32 %r\d+, %r\d+, %r\d+, )21520", r"\g<1>4180"), ""),
    "a gate never taken back": (
        "cooperative", "backward", nth(r"@%p\d+ st\.global\.b16[^;]*;", "", 0), ""),
    "another number than the missing one put back": (
        "cooperative", "forward", replace(r"(mov\.b16\s+%rs\d+, )-1;", r"\g<1>-3;"), ""),
    "acquire made relaxed": ("cooperative", "forward", replace(r"gpu\.acquire", "gpu.relaxed"), "race"),
    "release made relaxed": ("cooperative", "backward", replace(r"gpu\.release", "gpu.relaxed"), "race"),
    "the barrier before the warps' sums are read removed": (
        "cooperative", "forward", replace(r"bar\.sync\s+0;((?:[^\n]*\n){1,3}\s*ld\.shared\.b32)", r"\1"), "race"),
    "sums of another gate read": (
        "cooperative", "forward", nth(r"(ld\.shared\.b32\s+%r\d+, \[%r\d+\+)(\d+)\]", r"\g<1>0]", -1), ""),
    "a column of the state multiplied by another's weights": (
        "cooperative", "backward", nth(r"(mma\S+\s+\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", -1), ""),
    "arrival removed": ("cooperative", "forward", replace(r"@%p\d+ red\.global[^;]*;", ""), "deadlock"),
    "differences turned round": (
        "resident", "backward", replace(r"sub\.f32(\s+%r\d+), (%r\d+), (%r\d+)", r"sub.f32\1, \3, \2"), ""),
    "factors of a product swapped": (
        "resident", "forward", nth(r"(mma\S+\s+\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", -1), ""),
    "a cluster's barrier made a program's": (
        "cluster", "forward", replace(*CLUSTER_BARRIER), "race"),
    "a cluster's barrier made a program's, backward": (
        "cluster", "backward", replace(*CLUSTER_BARRIER), "race"),
    "a cluster's fence removed": ("cluster", "forward", replace(r"fence\.release[^;]*;", ""), "race"),
    "a cluster's fence removed, backward": ("cluster", "backward", replace(r"fence\.release[^;]*;", ""), "race"),
    "prefetched past the last step": (
        "resident", "forward", replace(r"(prefetch\.global\.L2 \[ ?%rd\d+) ?\]", r"\1+65536]"), "out of bounds"),
    "prefetched before the first step": (
        "resident", "backward", replace(r"(prefetch\.global\.L2 \[ ?%rd\d+) ?\]", r"\1+-65536]"), "out of bounds"),
    "a sum of another row": (
        "resident", "forward", nth(r"(st\.shared\.b32\s+\[%r\d+\], )%r\d+", r"\g<1>0", -1), ""),
    "one row too many": ("resident", "forward", replace(r"setp\.lt\.s64", "setp.le.s64"), "out of bounds"),
}  # fmt: skip


def mutations() -> Iterator[dict]:
    for name, (backend, which, change, expected) in MUTATIONS.items():
        if backend == "cluster" and not HAS_CLUSTERS:
            continue
        problem = make_problem("lstm", CASES[backend], torch.bfloat16, "cpu")
        noticed = None
        for seed in range(4):
            try:
                with short_rounds():
                    faults = faults_of(problem, "sm_90", backend, "ieee", mutated(which, change, seed), "bfloat16")
                noticed = f"over budget: {faults}" if faults else None
            except ExecutionError as error:
                noticed = str(error)
            if noticed:
                break
        yield {"mutation": name, "expected": expected or "over budget", "noticed": noticed}


CLUSTER_BARRIER = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
# Of residual, compiled for a cluster: the number of products, and a change to the PTX.
CLUSTERS = {
    "one product": (1, replace("", "", count=1)),
    "two products": (2, replace("", "", count=1)),
    "one product, without its cluster barrier": (
        1, replace(r"barrier\.cluster\.arrive\S*;\s*barrier\.cluster\.wait\S*;", "bar.sync 0;", count=1)),
    "two products, with a cluster barrier more": (
        2, replace(r"(stmatrix[^;]*;\s*)bar\.sync\s+0;", rf"\1{CLUSTER_BARRIER}")),
}  # fmt: skip


def clusters() -> Iterator[dict]:
    for case, (products, change) in CLUSTERS.items():
        x, w, y = torch.randn(16, 64).half(), (torch.randn(64, 64) / 8).half(), torch.empty(16, 64).half()
        expected = x.float()
        for _ in range(products):
            expected = expected + expected @ w.float()
        with launches(DeviceSpec.named("sm_90")) as found:
            residual[(1,)](x, w, y, H=64, PRODUCTS=products, num_warps=4, num_ctas=2, enable_fp_fusion=True)
        launch = dataclasses.replace(found[0], asm={"ptx": change(found[0].asm["ptx"])})
        noticed = None
        for seed in range(4):
            y.fill_(float("nan"))
            try:
                execute(launch, seed)
            except ExecutionError as error:
                noticed = str(error)
                break
            if not (y.float() - expected).abs().max() < 0.02:  # a few roundings
                noticed = "a wrong result"
        ptx = launch.asm["ptx"]
        unguarded = [f"{remote.text}, {other.text}" for remote, other in cluster.unguarded(ptx)]
        reads = ptx.count("ld.shared::cluster")
        yield {"case": case, "remote_reads": reads, "unguarded": unguarded, "noticed": noticed}


def parts(arch: str) -> Iterator[dict]:
    """A batch of three tiles in three launches of the cooperative kernels: the bits of one launch.

    The last of them is left out to see that this would be noticed.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
    problem = make_problem("lstm", Case(T=2, B=20, H=262, D=1), torch.bfloat16, "cpu")
    found: dict[str, dict] = {}
    for name, multiprocessors in (("whole", 17 * 3), ("parts", 17), ("one left out", 17)):
        spec, grids = dataclasses.replace(DeviceSpec.named(arch), multiprocessors=multiprocessors), []

        def run(launch: Launch, name=name, grids=grids) -> None:
            grids.append(launch.grid)
            if name != "one left out" or len(grids) != 3:
                execute(launch, seed=len(grids))

        with launches(spec, run), mock.patch("fastrnn.planning.prices.cheapest", lambda plans, request: plans[0]):
            cooperative.cooperative.cache_clear()
            found[name] = problem.run(functools.partial(ops.recurrence, backend="cooperative"))
        differ = [key for key, tensor in found["whole"].items() if not torch.equal(tensor, found[name][key])]
        yield {"name": name, "grids": grids, "differ": differ}


def counted() -> Iterator[dict]:
    """What `inspect` counts of a kernel of fastrnn that at its end reads what another thread block has just stored."""
    store, read = "st.shared.b32 [global_smem], %r1;\n", "ld.shared::cluster.b32 %r1, [global_smem];\n"

    def run(launch: Launch) -> None:
        for barrier in ("bar.sync 0;\n", CLUSTER_BARRIER):
            exchange = f"{store}{barrier}{read}{CLUSTER_BARRIER}"
            ptx = launch.asm["ptx"].replace("\tret;", f"{exchange}\tret;")
            changed = dataclasses.replace(launch, asm={**launch.asm, "ptx": ptx})
            counts.append(resources(changed).unguarded_remote_accesses)

    counts: list[int] = []
    faults_of(
        make_problem("gru", CASES["resident"], torch.bfloat16, "cpu"), "sm_90", "resident", "ieee", run, "bfloat16"
    )
    yield {"counts": counts}


if __name__ == "__main__":
    torch.manual_seed(0)
    command, *arguments = sys.argv[1:]
    commands = (
        kernels, sequences, absent, tile, rows, plans, schedules, windows, parts, mutations, clusters, counted,
    )  # fmt: skip
    for record in {each.__name__: each for each in commands}[command](*arguments):
        print(json.dumps(record), flush=True)
