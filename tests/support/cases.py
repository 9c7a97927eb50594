"""The table of cases that tests (and later benches) share, and the error budget that every kernel is held to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrnn import cells, plan, reference
from fastrnn.ops import recurrence
from fastrnn.planning import cpu
from fastrnn.planning.kernel_plan import GridTooLargeError
from fastrnn.sequences import Sequences

CELLS = tuple(cells.CELLS)
OF_TORCH = tuple(name for name, cell in cells.CELLS.items() if cell.of_torch)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What "auto" takes on CPU tensors for what torch's kernels lack.
ON_CPU = "reference" if cpu.MISSING else cpu.NAME


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
    inputs: tuple[Tensor | None, ...]  # x_gates, W_hh, b_hh, h_0, c_0: what a cell has beside h
    upstream: tuple[Tensor | None, ...]  # dy, dh_n, dc_n; with cell_states dc
    starts: tuple[Tensor, ...] = ()  # reset_h, and reset_c if there is a c
    options: dict[str, Any] = {}  # sequences, by_step, cell_states  # noqa: RUF012

    def to(self, dtype: torch.dtype) -> "Problem":
        def convert(tensors):
            return tuple(None if t is None else t.detach().to(dtype) for t in tensors)

        return self._replace(inputs=convert(self.inputs), upstream=convert(self.upstream), starts=convert(self.starts))

    def run(self, recurrence) -> dict[str, Tensor]:
        """Outputs, final states and every gradient, by name."""
        given = [None if t is None else t.detach().clone().requires_grad_() for t in (*self.inputs, *self.starts)]
        starts = dict(zip(("reset_h", "reset_c"), given[5:]))  # noqa: B905 - only the LSTM has a c
        outputs = recurrence(self.cell, *given[:5], **starts, **self.options)
        pairs = [(o, g) for o, g in zip(outputs, self.upstream, strict=True) if o is not None]
        wanted = [t for t in given if t is not None]
        gradients = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))
        named = dict(zip(("y", "h_n", "c_n", "c"), outputs))  # noqa: B905 - c if it is asked for
        names = ("x_gates", "W_hh", "b_hh", "h_0", "c_0", *starts)
        named |= {f"d_{n}": next(gradients) for n, t in zip(names, given, strict=True) if t is not None}
        return {name: t.detach() for name, t in named.items() if t is not None}


def make_problem(cell: str, case: Case, dtype: torch.dtype, device: str, bias: bool = True) -> Problem:
    """Random arguments that dtype represents exactly, so that only the computation can err."""
    T, B, H, D = case
    G = cells.CELLS[cell].gates

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).to(device)

    states = functools.partial(beside_h, cell, random)
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
            possible(cell, states(D, B, H)),
        ),
        (random(T, B, D, H), random(D, B, H), states(D, B, H)),
    )


def beside_h(cell: str, random: Callable[..., Tensor], *shape: int) -> Tensor | None:
    """What random makes in the shape of the states beside h of a cell, where there is one or more."""
    others = len(cells.CELLS[cell].states) - 1
    return random(*((others,) if others > 1 else ()), *shape) if others else None


def possible(cell: str, states: Tensor | None) -> Tensor | None:
    """States beside h that a cell may have: n of the sLSTM is a sum of what is positive."""
    if states is not None and cell == "slstm":
        states[1] = states[1].abs() + 0.5
    return states


SEQUENCES = ("lengths", "resets", "resets to a state", "lengths, resets by step", "ragged", "ragged, resets by step")


def make_sequences(cell: str, case: Case, dtype: torch.dtype, device: str, kind: str) -> Problem:
    """A problem whose sequences have their own lengths or resets inside, as one of SEQUENCES says, and every c."""
    problem = make_problem(cell, case, dtype, device)
    T, B, H, D = case
    lengths = torch.randint(1, T + 1, (B,))
    lengths[-1] = T
    reset = torch.rand(T, B) < 0.4
    by_step, ragged = "by step" in kind, kind.startswith("ragged")
    slots = (T, B)
    if ragged:
        slots, live = (int(lengths.sum()),), torch.arange(T)[:, None] < lengths

        def gathered(t):  # sequence by sequence
            return t.transpose(0, 1)[live.T]
    else:
        gathered = torch.Tensor.contiguous
    x_gates, *rest = problem.inputs
    dy, *finals = problem.upstream
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    given: dict[str, Tensor] = (
        {"cu_seqlens": cu_seqlens} if ragged else {"lengths": lengths} if "lengths" in kind else {}
    )
    if "resets" in kind:
        given["reset"] = gathered(reset)
    sequences = Sequences.of(*((0, B) if ragged else (T, B)), **{name: t.to(device) for name, t in given.items()})
    start = (*slots, D, H) if by_step else (D, B, H)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(device)

    d_steps = beside_h(cell, random, *slots, D, H)
    starts: tuple[Tensor | None, ...] = ()
    if kind not in ("lengths", "resets", "ragged"):
        starts = random(*start), possible(cell, beside_h(cell, random, *start))
    return Problem(
        cell,
        (gathered(x_gates), *rest),
        (gathered(dy), *finals, *([] if d_steps is None else [d_steps])),
        tuple(s for s in starts if s is not None),
        {"sequences": sequences, "by_step": by_step} | ({} if d_steps is None else {"cell_states": True}),
    )


# How many times the error of the reference in the same dtype a kernel may make. Of 16 bits one rounding hides the rest.
# In float32 a CPU's one product of d_W_hh needed 2.3 (AMD EPYC, MKL: other sums than the loop's), and kernels executed
# from PTX less than 3: a GPU's exp is exp2 of a rounded product. On a GPU division is approximate too: the worst needed
# 4.8 (H100, Triton 3.9.0: d_h_0 of a GRU on ragged sequences).
TIMES, TIMES_FLOAT32, TIMES_NATIVE = 2, 3, 6


def times_allowed(dtype: torch.dtype, device: torch.device) -> float:
    return TIMES if dtype != torch.float32 else TIMES_NATIVE if device.type == "cuda" else TIMES_FLOAT32


def require_kernel(cell: str, case: Case, dtype: torch.dtype, device: str, backend: str = "resident") -> None:
    """Skip, with the plan's reason, what a tier does not hold on this GPU; the interpreter holds everything."""
    sizes = {"hidden_size": case.H, "batch_size": case.B, "seq_len": case.T, "directions": case.D}
    try:
        plan(cell, **sizes, dtype=dtype, device=device, backend=backend)
    except (NotImplementedError, GridTooLargeError) as missing:
        pytest.skip(str(missing))


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: (found[name].double() - truth[name]).abs().max().item() for name in truth}


def over_budget(problem: Problem, run=recurrence, times: float | None = None) -> dict[str, str]:
    return beyond_budget(problem, problem.run(run), times)


def beyond_budget(problem: Problem, found: dict[str, Tensor], times: float | None = None) -> dict[str, str]:
    """What errs more times than allowed what the same-dtype reference does, and one ulp of the largest element."""
    x_gates = problem.inputs[0]
    assert x_gates is not None
    dtype, times = x_gates.dtype, times or times_allowed(x_gates.dtype, x_gates.device)
    truth = problem.to(torch.float64).run(reference.recurrence)
    allowed = errors(problem.run(reference.recurrence), truth)
    wide = cells.CELLS[problem.cell].state_dtype(dtype)  # of all steps
    assert all(t.dtype == (wide if name == "c" else dtype) for name, t in found.items())
    return excess(found, truth, allowed, dtype, times)


def excess(
    found: dict[str, Tensor], truth: dict[str, Tensor], allowed: dict[str, float], dtype: torch.dtype, times: float
) -> dict[str, str]:
    """What errs more than so many times what is allowed, and one unit in the last place of the largest element."""
    faults = {}
    for name, error in errors(found, truth).items():
        budget = times * allowed[name] + torch.finfo(dtype).eps * truth[name].abs().max().item()
        if not error <= budget:  # a NaN is over any budget
            faults[name] = f"{error:.2e} > {budget:.2e}"
    return faults
