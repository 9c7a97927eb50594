"""The table of cases that tests (and later benches) share, and the error budget that every kernel is held to."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastrnn import plan, reference
from fastrnn.kernel_plan import GridTooLargeError
from fastrnn.ops import recurrence

CELLS = tuple(reference.STEPS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    T: int
    B: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"T{self.T}-B{self.B}-H{self.H}-D{self.D}"


CASES = (
    Case(T=1, B=1, H=7, D=1),  # everything at its least, H below a tile
    Case(T=1, B=2, H=16, D=2),  # first and last step are one, in both directions
    Case(T=5, B=3, H=24, D=2),  # H between tiles
    Case(T=4, B=17, H=65, D=1),  # a batch of one tile and one row, H of one tile and one unit
    Case(T=9, B=16, H=32, D=2),  # nothing masked
)


class Problem(NamedTuple):
    """Arguments of a recurrence, and the upstream gradients of its outputs."""

    cell: str
    inputs: tuple[Tensor | None, ...]  # x_gates, W_hh, b_hh, h_0, c_0
    upstream: tuple[Tensor | None, ...]  # dy, dh_n, dc_n

    def to(self, dtype: torch.dtype) -> "Problem":
        def convert(tensors):
            return tuple(None if t is None else t.detach().to(dtype) for t in tensors)

        return Problem(self.cell, convert(self.inputs), convert(self.upstream))

    def run(self, recurrence) -> dict[str, Tensor]:
        """Outputs, final states and every gradient, by name."""
        inputs = [None if t is None else t.detach().clone().requires_grad_() for t in self.inputs]
        outputs = recurrence(self.cell, *inputs)
        pairs = [(o, g) for o, g in zip(outputs, self.upstream, strict=True) if o is not None]
        wanted = [t for t in inputs if t is not None]
        gradients = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
        named = dict(zip(("y", "h_n", "c_n"), outputs, strict=True))
        names = ("x_gates", "W_hh", "b_hh", "h_0", "c_0")
        named |= {f"d_{n}": next(gradients) for n, t in zip(names, inputs, strict=True) if t is not None}
        return {name: t.detach() for name, t in named.items() if t is not None}


def make_problem(cell: str, case: Case, dtype: torch.dtype, device: str, bias: bool = True) -> Problem:
    """Random arguments that dtype represents exactly, so that only the computation can err."""
    T, B, H, D = case
    G = reference.GATES[cell]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).to(device)

    has_c = cell == "lstm"
    x_gates, recurrent_scale = random(T, B, D, G, H), 1.0
    if cell == "rnn_relu":  # keep away from the kink, where any rounding flips the derivative between 0 and 1
        x_gates, recurrent_scale = x_gates + 8 * x_gates.sign(), 0.2
    return Problem(
        cell,
        (
            x_gates,
            random(D, G * H, H, scale=recurrent_scale * H**-0.5),
            random(D, G * H, scale=recurrent_scale) if bias else None,
            random(D, B, H),
            random(D, B, H) if has_c else None,
        ),
        (random(T, B, D, H), random(D, B, H), random(D, B, H) if has_c else None),
    )


def require_kernel(cell: str, case: Case, dtype: torch.dtype, device: str, backend: str = "resident") -> None:
    """Skip, with the plan's reason, what a tier does not hold on this GPU; the interpreter holds everything."""
    try:
        plan(cell, hidden_size=case.H, batch_size=case.B, dtype=dtype, device=device, backend=backend)
    except (NotImplementedError, GridTooLargeError) as missing:
        pytest.skip(str(missing))


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: (found[name].double() - truth[name]).abs().max().item() for name in truth}


def over_budget(problem: Problem, run=recurrence, times: float = 2) -> dict[str, str]:
    return beyond_budget(problem, problem.run(run), times)


def beyond_budget(problem: Problem, found: dict[str, Tensor], times: float = 2) -> dict[str, str]:
    """What errs more than twice the same-dtype reference does and one unit in the last place of the largest element."""
    dtype = problem.inputs[0].dtype  # type: ignore[union-attr]
    truth = problem.to(torch.float64).run(reference.recurrence)
    allowed = errors(problem.run(reference.recurrence), truth)
    assert all(t.dtype == dtype for t in found.values())
    faults = {}
    for name, error in errors(found, truth).items():
        budget = times * allowed[name] + torch.finfo(dtype).eps * truth[name].abs().max().item()
        if not error <= budget:  # a NaN is over any budget
            faults[name] = f"{error:.2e} > {budget:.2e}"
    return faults
