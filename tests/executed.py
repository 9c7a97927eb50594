"""Run by test_execute.py in a process that compiles: execute kernels' PTX and print what errs, a JSON object a line.

python -m tests.executed kernels sm_90 resident     every cell, pass and dtype, under a schedule of its own
python -m tests.executed mutations                  the same after a change to the PTX, which must be noticed
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fastrnn import ops, tiers
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import Launch, launches
from fastrnn.inspect.execute import ExecutionError, execute

from .cases import Case, Problem, make_problem, over_budget

# Not aligned to 16 bytes, and aligned; rows and units masked; two directions; several programs where W_hh is split, and
# pieces of 32 and 16 columns.
CASES = {"resident": Case(T=3, B=3, H=24, D=2), "cooperative": Case(T=3, B=3, H=262, D=1)}
KINDS = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32"))


def kernels(arch: str, backend: str) -> Iterator[dict]:
    for seed, cell in enumerate(("lstm", "gru", "rnn_tanh", "rnn_relu")):
        for dtype, precision in KINDS if cell == "lstm" else KINDS[seed % 2 :: 3]:
            # tf32 keeps as many bits as float16: that dtype's reference sets the budget.
            exact = torch.float16 if precision == "tf32" else getattr(torch, dtype)
            case = CASES[backend]
            if backend == "resident" and (cell, dtype) == ("lstm", "bfloat16"):
                case = case._replace(H=100)  # of the 16-bit kernels, the one in tile Triton
            problem = make_problem(cell, case, exact, "cpu")
            # At this size all of W_hh fits in registers: leave one operand there for one cell, the rest goes to shared.
            held = (8,) if cell == "gru" else tiers.WEIGHT_REGISTERS
            with mock.patch.object(tiers, "WEIGHT_REGISTERS", held):
                faults = faults_of(problem, arch, backend, precision, functools.partial(execute, seed=seed), dtype)
            yield {"cell": cell, "dtype": dtype, "precision": precision, "seed": seed, "faults": faults}


def faults_of(problem: Problem, arch: str, backend: str, precision: str, run: Callable, dtype: str) -> dict:
    def recurrence(cell, *inputs):
        converted = (None if t is None else t.to(getattr(torch, dtype)) for t in inputs)
        results = ops.recurrence(cell, *converted, backend=backend)
        return tuple(None if t is None else t.to(problem.inputs[0].dtype) for t in results)

    with launches(DeviceSpec.named(arch), run=run, precision=precision):
        # A GPU's exp is exp2 of a rounded product, which float32 shows.
        return over_budget(problem, recurrence, times=3 if dtype == "float32" else 2)


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


# What is broken: tier, pass, the change, and what it must be noticed as ("" for a result over its budget).
MUTATIONS = {
    "a barrier between shared load and store removed": ("resident", "forward", nth(r"bar\.sync\s+0;", "", -1), "race"),
    "the grid barrier's spin removed": (
        "cooperative", "forward",
        replace(r"(setp\.lt\.s64\s+(%p\d+), )%rd\d+, %rd\d+;(\s+@\2 bra)", r"\g<1>1, 0;\3"), "race"),
    "state loaded through L1": ("cooperative", "forward", replace(r"ld\.global\.cg", "ld.global"), "stale"),
    "d_gates loaded through L1": ("cooperative", "backward", replace(r"ld\.global\.cg", "ld.global"), "stale"),
    "acquire made relaxed": ("cooperative", "forward", replace(r"gpu\.acquire", "gpu.relaxed"), "race"),
    "release made relaxed": ("cooperative", "backward", replace(r"gpu\.release", "gpu.relaxed"), "race"),
    "the barrier before the warps' sums are read removed": (
        "cooperative", "forward", nth(r"bar\.sync\s+0;", "", -3), "race"),
    "sums of another gate read": (
        "cooperative", "forward", nth(r"(ld\.shared\.b32\s+%r\d+, \[%r\d+\+)(\d+)\]", r"\g<1>0]", -1), ""),
    "a column of the state multiplied by another's weights": (
        "cooperative", "backward", nth(r"(mma\S+\s+\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", -1), ""),
    "arrival removed": ("cooperative", "forward", replace(r"@%p\d+ red\.global[^;]*;", ""), "deadlock"),
    "differences turned round": (
        "resident", "backward", replace(r"sub\.f32(\s+%r\d+), (%r\d+), (%r\d+)", r"sub.f32\1, \3, \2"), ""),
    "factors of a product swapped": (
        "resident", "forward", nth(r"(mma\S+\s+\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", -1), ""),
    "one row too many": ("resident", "forward", replace(r"setp\.lt\.s64", "setp.le.s64"), "out of bounds"),
}  # fmt: skip


def mutations() -> Iterator[dict]:
    for name, (backend, which, change, expected) in MUTATIONS.items():
        problem = make_problem("lstm", CASES[backend], torch.bfloat16, "cpu")
        noticed = None
        for seed in range(4):
            try:
                faults = faults_of(problem, "sm_90", backend, "ieee", mutated(which, change, seed), "bfloat16")
                noticed = f"over budget: {faults}" if faults else None
            except ExecutionError as error:
                noticed = str(error)
            if noticed:
                break
        yield {"mutation": name, "expected": expected or "over budget", "noticed": noticed}


if __name__ == "__main__":
    torch.manual_seed(0)
    command, *arguments = sys.argv[1:]
    for record in {"kernels": kernels, "mutations": mutations}[command](*arguments):
        print(json.dumps(record), flush=True)
