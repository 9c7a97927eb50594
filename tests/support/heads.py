"""Problems with W_hh in heads, which the modules do not have yet: the ops and the reference, by their own arguments.

python -m tests.support.heads sm_90 resident    every cell on what is compiled, its PTX executed: a JSON object a line
python -m tests.support.heads sm_90 resident zoneout    with zoneout
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.cells import CELLS
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import launches
from fastrnn.inspect.execute import execute
from fastrnn.ops import library
from fastrnn.ops.schema import Args

from .cases import Case, errors, excess, make_problem, make_sequences, times_allowed

HEADS = 3
SMALL = Case(T=4, B=3, H=36, D=2)
# Units of all heads, of which a tier holds those of one.
SIZES = {
    "resident": Case(T=3, B=3, H=60, D=2),
    "cluster": Case(T=3, B=3, H=300, D=2),
    "cooperative": Case(T=3, B=3, H=105, D=2),
}


def arguments(cell: str, kind: str, case: Case, device: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """Tensors by name, of HEADS heads, and what is said of sequences."""
    make = make_problem if kind == "plain" else functools.partial(make_sequences, kind=kind)
    problem = make(cell, case, dtype, device)
    x_gates, _, b_hh, *states = problem.inputs
    D, G, H = x_gates.shape[-3:]
    K = H // HEADS

    def by_head(gates: Tensor) -> Tensor:
        """(..., D, G, N*K) as (..., D*N, G, K)."""
        return gates.unflatten(-1, (HEADS, K)).transpose(-3, -2).flatten(-4, -3).contiguous()

    tensors = {
        "x_gates": by_head(x_gates),
        "W_hh": ((2 * torch.rand(D * HEADS, G * K, K) - 1) / K**0.5).to(device, dtype),
        "b_hh": by_head(b_hh.unflatten(-1, (G, H))).flatten(-2),
        "state_0": reference.stacked(*states),
    }
    of_sequences: dict[str, Any] = {"sequences": problem.options.get("sequences")}
    if problem.starts:
        tensors["starts"] = reference.stacked(problem.starts[0], *problem.starts[1:] or (None,))
        of_sequences["by_step"] = problem.options["by_step"]
    return tensors, of_sequences


def results(run: Callable, tensors: dict[str, Tensor], of_sequences: dict) -> dict[str, Tensor]:
    """y, final states and gradients of everything, by name."""
    given = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, finals = run(**given, **of_sequences)[:2]
    upstream = [torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape).to(t.dtype) for t in (y, finals)]
    gradients = torch.autograd.grad([y, finals], list(given.values()), upstream)
    return {"y": y.detach(), "finals": finals.detach()} | dict(zip(given, gradients, strict=True))


def kernel(cell: str, backend: str, *, sequences: Any = None, by_step: bool = False, **given: Any) -> tuple:
    rows, reset = sequences or (None, None)
    args = Args(**given, cell=cell, save=False, backend=backend, rows=rows, reset=reset, by_step=by_step, heads=HEADS)
    found = library.run(args)
    return found.y.unflatten(-2, (-1, HEADS)).flatten(-2), found.finals


def faults(
    cell: str, backend: str, kind: str, device: str, dtype: torch.dtype, case: Case = SMALL, **changes: Any
) -> dict[str, str]:
    """What a kernel errs beyond the budget of the reference in the same dtype, with zoneout and the like."""
    tensors, of_sequences = arguments(cell, kind, case, device, dtype)
    exact = {name: t.double() for name, t in tensors.items()}
    specification = functools.partial(reference.run, cell, heads=HEADS, **changes)
    truth = results(specification, exact, of_sequences)
    allowed = errors(results(specification, tensors, of_sequences), truth)
    found = results(functools.partial(kernel, cell, backend, **changes), tensors, of_sequences)
    return excess(found, truth, allowed, dtype, times_allowed(dtype, torch.device(device)))


# The seed, and slots before each direction's, some of which do not fit 32 bits.
ZONEOUT: dict[str, Any] = {"zoneout": 0.3, "noise": torch.tensor([0x1234567890ABCDEF, 7, (1 << 32) - 5])}


def main(arch: str, backend: str, change: str = "") -> None:
    changes = ZONEOUT if change == "zoneout" else {}
    for seed, cell in enumerate(CELLS):
        torch.manual_seed(seed)
        with launches(DeviceSpec.named(arch), run=functools.partial(execute, seed=seed)):
            found = faults(cell, backend, "plain", "cpu", torch.bfloat16, SIZES[backend], **changes)
        print(json.dumps({"cell": cell, "faults": found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
