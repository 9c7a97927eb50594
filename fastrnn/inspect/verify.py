"""Does compiled code compute what the reference does? Each pass is executed on the CPU and compared in fp64.

The budget of an output is twice the error of the reference in the kernel's own dtype, and one unit in the last place of
its largest element. tf32 keeps float16's 11 bits: float16's reference sets its budget.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cells import CELLS
from ..ops.schema import OF_STATES
from .compile import Launch, Problem, compile_problem
from .execute import execute

# Inputs, and what the launcher calls their gradients.
WANTED = {"x_gates": "d_x_gates", "W_hh": "dW_hh", "b_hh": "db_hh", "state_0": "d_state_0"}
OUTPUTS = {"forward": ("y", "finals"), "backward": tuple(WANTED.values())}  # of the launcher, by pass


@dataclass(frozen=True)
class Agreement:
    """How far a pass is off: the largest error of an element, and the largest part of its budget an output took."""

    max_error: float
    budget_used: float  # above 1: wrong
    instructions_by_block: dict[str, float]  # of the step loop: what the warps of a program ran a step, on average


def agreement(problem: Problem, passes: tuple[str, ...]) -> dict[str, Agreement]:
    """Execute a problem's compiled passes and compare; raises as `execute` does."""
    executed: dict[str, dict[str, float]] = {}

    def run(launch: Launch) -> None:
        found = execute(launch, problem.seed)
        programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
        # A block of the step loop is one that every warp ran at each step; with a single step that says nothing.
        least = problem.seq_len * programs * launch.warps if problem.seq_len > 1 else float("inf")
        executed[launch.name] = {
            label: times * size / (problem.seq_len * programs)
            for label, (times, size) in found.blocks.items()
            if times >= least
        }

    compiled = compile_problem(problem, passes, run)
    truth = _reference(problem, compiled.tensors, torch.float64)
    rounded = torch.float16 if problem.dtype == torch.float32 and problem.precision == "tf32" else problem.dtype
    plain = _reference(problem, compiled.tensors, rounded)
    result = {}
    for which in passes:
        errors, used = [0.0], [0.0]
        for name in OUTPUTS[which]:
            scale = truth[name].abs().max().item()
            allowed = 2 * (plain[name].double() - truth[name]).abs().max().item() + torch.finfo(rounded).eps * scale
            error = (compiled.outputs[name].double().view_as(truth[name]) - truth[name]).abs().max().item()
            errors.append(error)
            used.append(error / max(allowed, torch.finfo(rounded).tiny))
        # NaN is larger than anything; max() would drop it.
        largest, most = (torch.tensor(values).max().item() for values in (errors, used))
        result[which] = Agreement(largest, most, executed[which])
    return result


def _reference(problem: Problem, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of the reference, by the launcher's names."""
    of_states = CELLS[problem.cell].state_dtype(dtype)
    converted = {name: t.to(of_states if name in OF_STATES else dtype) for name, t in tensors.items()}
    inputs: dict[str, Any] = {name: converted[name].requires_grad_() for name in WANTED}
    y, finals, _ = reference.run(problem.cell, **inputs, heads=problem.num_heads)
    upstream = [converted["dy"].view_as(y), converted["d_finals"]]
    gradients = torch.autograd.grad([y, finals], list(inputs.values()), upstream)
    found = {"y": y, "finals": finals} | dict(zip(WANTED.values(), gradients, strict=True))
    return {name: t.detach() for name, t in found.items()}
