"""What a GPU has shown to be faster than the planner's own choice: fastrnn/tuned/<arch>.json, by `python -m bench.gpu`.

    {"made": {"gpu": "...", ...},
     "forms": {"Gluon lstm H=256 bfloat16 block_b=16 units=32 ctas=8": {"forward": {"SHARES": 2, ...}}},
     "ctas": {"lstm H=256 bfloat16 tiles=1": 8},
     "us": {"Gluon lstm H=256 bfloat16 block_b=16 units=32 ctas=8": [1.31, 1.33],
            "torch lstm H=256 bfloat16": [13.2, 16.1]}}

A form goes to the front of KernelPlan.choices, so that one that spills with another Triton still gives way to the next;
ctas is the size of the cluster; us are microseconds of a step, forward and backward, at B = 16, by which prices.py
chooses; a file may lack them. Where the planner knows no such form (another board of the same architecture has less
shared memory) its own order stays. Without a file, nothing changes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .kernel_plan import KernelPlan, Request

FOLDER = Path(__file__).parents[1] / "tuned"
KEYS = ("made", "forms", "ctas", "us")
PASSES = ("forward", "backward")
CONSTANTS = ("SHARES", "IN_REGISTERS", "BIAS_KEPT", "K_TILES", "maxnreg")  # of a form
CTAS = (2, 4, 8, 16)
_CELL = r"(lstm|gru|rnn_tanh|rnn_relu|slstm) H=\d+ (bfloat16|float16|float32-ieee|float32-tf32)"
_KERNEL = re.compile(rf"(Gluon|tile Triton) {_CELL} block_b=\d+ units=\d+ ctas=\d+")
_CLUSTER = re.compile(rf"{_CELL} tiles=\d+")
_TORCH = re.compile(rf"torch {_CELL}")

Form = dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """What was tuned for one architecture: the form to try first by kernel and pass, and cluster sizes by problem."""

    forms: Mapping[str, Mapping[str, Form]] = field(default_factory=dict)
    ctas: Mapping[str, int] = field(default_factory=dict)
    us: Mapping[str, Sequence[float]] = field(default_factory=dict)


def _problem(cell: str, H: int, dtype: torch.dtype, precision: str) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{cell} H={H} {name}" + (f"-{precision}" if dtype == torch.float32 else "")


def kernel_key(request: Request, kernel: KernelPlan) -> str:
    """Return the key of a form: everything that decides which forms a kernel has."""
    problem = _problem(request.cell, request.H, request.dtype, kernel.precision)
    return f"{kernel.dialect} {problem} block_b={kernel.block_b} units={kernel.units} ctas={kernel.ctas}"


def cluster_key(request: Request, tiles: int) -> str:
    """Return the key of a cluster's size. tiles counts the batch tiles of all directions."""
    return f"{_problem(request.cell, request.H, request.dtype, request.precision)} tiles={tiles}"


def torch_key(request: Request) -> str:
    """Return the key of the time of torch's own kernel."""
    return f"torch {_problem(request.cell, request.H, request.dtype, request.precision)}"


def read(file: Path) -> Tuned:
    """A file's content; ValueError, naming file and place, where it is not as above."""

    def check(holds: bool, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{file}: expected {expected}; got {got!r}")

    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON; {error}") from None
    found = {"us": {}} | found if isinstance(found, dict) else found
    check(isinstance(found, dict) and set(found) == set(KEYS), f"an object with {', '.join(KEYS)}", found)
    for key in KEYS:
        check(isinstance(found[key], dict), f"an object under {key}", found[key])
    for key, ctas in found["ctas"].items():
        check(_CLUSTER.fullmatch(key) is not None, "a cluster's problem under ctas", key)
        check(ctas in CTAS, f"one of {CTAS} for {key}", ctas)
    forms: dict[str, dict[str, Form]] = {}
    for key, passes in found["forms"].items():
        check(_KERNEL.fullmatch(key) is not None, "a kernel under forms", key)
        check(isinstance(passes, dict) and set(passes) <= set(PASSES), f"passes among {PASSES} for {key}", passes)
        for which, form in passes.items():
            check(isinstance(form, dict) and set(form) <= set(CONSTANTS), f"constants among {CONSTANTS}", form)
            check(all(isinstance(v, int | list) for v in form.values()), f"numbers for {key}", form)
            forms.setdefault(key, {})[which] = {name: _tuples(value) for name, value in form.items()}
    for key, us in found["us"].items():
        check((_KERNEL.fullmatch(key) or _TORCH.fullmatch(key)) is not None, "a kernel under us", key)
        numbers = isinstance(us, list) and len(us) == 2 and all(isinstance(t, int | float) and t > 0 for t in us)
        check(numbers, f"microseconds of two passes for {key}", us)
    return Tuned(forms, found["ctas"], found["us"])


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def known(folder: Path) -> dict[str, Tuned]:
    """Return the contents of a folder's files, by architecture."""
    return {file.stem: read(file) for file in sorted(folder.glob("*.json"))}


# Read on import: torch.compile traces what plans, and cannot trace the reading of a file.
TUNED = known(FOLDER)
NOTHING = Tuned()


def of(arch: str) -> Tuned:
    """Return what was tuned for an architecture."""
    return TUNED.get(arch, NOTHING)


def ordered(kernel: KernelPlan, request: Request) -> KernelPlan:
    """The plan with the tuned forms in front."""
    forms = of(request.spec.arch).forms
    passes = forms.get(kernel_key(request, kernel)) if forms else None
    if not passes:
        return kernel
    choices = {}
    for which, own in kernel.choices.items():
        first = [form for form in own if form == passes.get(which)]
        choices[which] = (*first, *(form for form in own if form not in first))
    return replace(kernel, choices=choices)
