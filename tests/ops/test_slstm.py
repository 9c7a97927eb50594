"""The sLSTM beside what it is without its stabilizer, and where exp would overflow: the reference and each tier."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.ops import recurrence

from ..support.cases import Case, make_problem, over_budget

RUNS = {
    "reference": reference.recurrence,
    "resident": functools.partial(recurrence, backend="resident"),
    "cooperative": functools.partial(recurrence, backend="cooperative"),
}
NAMES = ("y", "h_n", "d_x_gates", "d_W_hh", "d_b_hh", "d_h_0", "d_c_0", "d_n_0")


def without_stabilizer(x_gates: Tensor, W_hh: Tensor, b_hh: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """y (T, B, H) of one direction: exp as it is, and no m."""
    h, c, n = state
    ys = []
    for x in x_gates[:, :, 0]:
        i, f, z, o = (x + torch.nn.functional.linear(h, W_hh[0], b_hh[0]).unflatten(-1, (4, -1))).unbind(-2)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        ys.append(h)
    return torch.stack(ys)


def problem(T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x_gates, W_hh, b_hh, h_0, c_0, n_0; m_0 is zero."""
    x_gates, W_hh, b_hh, h_0, others = make_problem("slstm", Case(T, 3, 8, 1), dtype, device).inputs
    x_gates[..., 1, :] += 2  # so that many steps are remembered
    return [x_gates, W_hh, b_hh, h_0, *others[:2]]


def truth(given: list[Tensor], loss: Callable) -> dict[str, Tensor]:
    exact = [t.double().requires_grad_() for t in given]
    y = without_stabilizer(*exact[:3], tuple(t[0] for t in exact[3:]))
    return named(y, y[-1], torch.autograd.grad(loss(y), exact))


def found(run, given: list[Tensor], loss: Callable) -> dict[str, Tensor]:
    given = [t.clone().requires_grad_() for t in given]
    *tensors, c_0, n_0 = given
    y, h_n, _ = run("slstm", *tensors, torch.stack((c_0, n_0, torch.zeros_like(n_0))))
    return named(y[:, :, 0], h_n[0], torch.autograd.grad(loss(y[:, :, 0]), given))


def loss(y: Tensor) -> Tensor:
    return (y.double() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).double()).sum()


def named(y: Tensor, h_n: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(NAMES, (y.detach(), h_n.detach(), *gradients), strict=True))


def distances(run, given: list[Tensor], last_only: bool = False) -> dict[str, float]:
    """How far each result is from the truth, as a share of its largest element."""
    of = (lambda y: y[-1].double().sum()) if last_only else loss
    exact, results = truth(given, of), found(run, given, of)
    return {
        name: ((results[name] - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-30)).item()
        for name in NAMES
    }


def test_the_reference_is_the_step_without_its_stabilizer():
    """In fp64, outputs and every gradient: m rescales, and no gradient need go through it, nor is one lost at a tie."""
    assert max(distances(reference.recurrence, problem(12, torch.float64, "cpu")).values()) < 1e-13


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)),
    ids=str,
)
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_kernels_give_its_gradients(backend, dtype, allowed, device):
    errors = distances(RUNS[backend], problem(40, dtype, device))
    assert max(errors.values()) < allowed, errors


def forgotten(device: str) -> float:
    """The error of a gradient that f' = 0.9985 carries back through 100 steps, as a share, in bfloat16."""
    x_gates, W_hh, b_hh, *states = problem(100, torch.bfloat16, device)
    x_gates[..., 0, :], x_gates[..., 1, :] = 0.0, 6.5
    given = [x_gates, 0 * W_hh, 0 * b_hh, *states]
    return distances(RUNS["resident"], given, last_only=True)["d_c_0"]


def test_a_gradient_is_carried_far_in_16_bits(device):
    """f' is kept by its distance to 1, which is not rounded away, and c and n in fp32."""
    assert forgotten(device) < 0.01


def test_a_forget_gate_rounded_near_1_is_caught(mutate, device):
    mutate({"kernels.cells.slstm_forward": ("from_either_end(f)", "f")})
    assert forgotten(device) > 0.1


@pytest.mark.parametrize("run", RUNS)
def test_first_steps_are_by_element(run, device):
    """Where n is 0, m starts at the input gate, whatever n of other elements is."""
    given = make_problem("slstm", Case(T=3, B=4, H=16, D=1), torch.float32, device)
    others = given.inputs[-1]
    others[0, :, ::2] = others[1, :, ::2] = 0.0
    others[2, :, ::2] = 50.0  # what is left of another sequence must not matter
    if run != "reference":
        assert not over_budget(given, RUNS[run])
    fresh = others.clone()
    fresh[2, :, ::2] = 0.0
    y, y_fresh = (RUNS[run]("slstm", *given.inputs[:4], each)[0] for each in (others, fresh))
    torch.testing.assert_close(y, y_fresh)


@pytest.mark.parametrize("gates", ((1e4, 1e4), (1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4)), ids=str)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_extreme_gates_saturate(dtype, run, gates, device):
    """exp(1e4) is infinite, and not taken: outputs are finite, those of the last input, or of the mean of all."""
    x_gates = torch.zeros(4, 2, 1, 4, 16, dtype=dtype, device=device)
    x_gates[..., :2, :] = torch.tensor(gates, dtype=dtype, device=device)[:, None]
    x_gates[..., 2, :] = torch.tensor((-1.0, 0.5, 1.0, 2.0), dtype=dtype, device=device)[:, None, None, None]
    x_gates.requires_grad_()
    h_0 = torch.zeros(1, 2, 16, dtype=dtype, device=device)
    W_hh = torch.zeros(1, 64, 16, dtype=dtype, device=device)
    y, _, others = RUNS[run]("slstm", x_gates, W_hh, None, h_0, h_0.expand(3, 1, 2, 16))
    z = x_gates.detach()[:, :, 0, 2].float().tanh()
    steps = torch.arange(1, 5, device=device)[:, None, None]
    expected = 0.5 * (z.cumsum(0) / steps if gates[1] > 0 else z)
    torch.testing.assert_close(y[:, :, 0].float(), expected, rtol=0, atol=0.01)
    gradient = torch.autograd.grad(y.sum() + others.float().sum(), x_gates)[0]
    assert others.isfinite().all() and gradient.isfinite().all()


def least_n(run: str, dtype: torch.dtype, device: str) -> float:
    """Of all steps, from states of zeros, by gates of any size."""
    x_gates, W_hh, b_hh, *_ = make_problem("slstm", Case(T=30, B=3, H=16, D=1), dtype, device).inputs
    x_gates *= torch.tensor((1.0, 10.0, 1000.0), dtype=dtype, device=device)[:, None, None, None]
    zeros = torch.zeros(3, 1, 3, 16, device=device)
    *_, steps = RUNS[run]("slstm", x_gates, W_hh, b_hh, zeros[0].to(dtype), zeros, cell_states=True)
    return steps[1].min().item()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_n_is_never_below_1(dtype, run, device):
    """So that FlashRNN's n' = max(f' n + i', 1) is this very cell: one of i' and f' is 1 at every step."""
    assert least_n(run, dtype, device) >= 1.0


def test_an_n_below_1_is_caught(mutate, device):
    mutate(
        {
            "kernels.cells.slstm_forward": (
                "tl.where(difference < 0, 1.0, smaller)",
                "tl.where(difference < 0, 0.5, smaller)",
            )
        }
    )
    assert least_n("resident", torch.float32, device) < 1.0


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("run", RUNS)
def test_nan_of_a_gate_goes_on(run, gate, device):
    """max and min must not swallow it, at the first step either."""
    for n_0 in (0.0, 1.0):
        x_gates = torch.zeros(1, 1, 1, 4, 16, device=device)
        x_gates[0, 0, 0, gate, 0] = float("nan")
        h_0 = torch.zeros(1, 1, 16, device=device)
        y, *_ = RUNS[run](
            "slstm", x_gates, torch.zeros(1, 64, 16, device=device), None, h_0, n_0 + h_0.expand(3, -1, -1, -1)
        )
        assert y[0, 0, 0, 0].isnan() and y[..., 1:].isfinite().all()


# What is broken: in which function, which text, and by what.
MUTATIONS = {
    "m of all for the first step": ("slstm_forward", "n == 0.0", "n < -1.0"),
    "input and forget gate swapped": ("slstm_forward", "x[0] + rec[0], m + log_f", "x[1] + rec[1], m + log_f"),
    "n summed of squares": ("slstm_forward", "f * n + i", "f * n + i * i"),
    "gradient through n lost": ("slstm_backward", "dn - dy * y", "dn"),
    "n of the step for that before": ("slstm_backward", "kept_prev[1]) * not_f", "kept[1]) * not_f"),
    "forget gate not derived": ("slstm_backward", "kept_prev[1]) * not_f", "kept_prev[1])"),
    "output gate not derived": ("slstm_backward", "dh * y * d_sigmoid(o)", "dh * y"),
    "dn not carried": ("slstm_backward", "dc * f, dn * f", "dc * f, dn"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device):
    function, old, new = MUTATIONS[name]
    given = make_problem("slstm", Case(T=4, B=3, H=12, D=1), torch.float32, device)
    given.inputs[-1][:2, :, 0] = 0.0
    given.inputs[-1][2, :, 0] = 3.0
    assert not over_budget(given)
    mutate({f"kernels.cells.{function}": (old, new)})
    assert over_budget(given)


def test_a_swallowed_nan_is_caught(mutate, device):
    mutate(
        {
            "kernels.cells.slstm_forward": (
                "tl.where(difference < 0, 1.0, smaller)",
                "tl.where(difference >= 0, smaller, 1.0)",
            )
        }
    )
    with pytest.raises(AssertionError):
        test_nan_of_a_gate_goes_on("resident", 1, device)
