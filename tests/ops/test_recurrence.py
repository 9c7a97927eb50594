"""The persistent kernels against the fp64 reference: outputs, final states and every gradient, inside the budget."""

import functools
import unittest.mock

import pytest
import torch

from fastrnn import reference
from fastrnn.compat import interpreter
from fastrnn.kernels.arguments import Inputs, Outputs, Sequences, Sizes
from fastrnn.kernels.cells import rnn_tanh_forward
from fastrnn.kernels.tile import resident
from fastrnn.ops import recurrence
from fastrnn.planning.tiers import KERNELS

from ..support.cases import CASES, CELLS, DTYPES, Case, make_problem, over_budget, require_kernel


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference(cell, case, dtype, backend, device):
    require_kernel(cell, case, dtype, device, backend)
    assert not over_budget(make_problem(cell, case, dtype, device), functools.partial(recurrence, backend=backend))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "case", (Case(T=3, B=17, H=130, D=2), Case(T=2, B=3, H=384, D=2), Case(T=2, B=5, H=650, D=2)), ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_large_hidden_sizes_match_reference(cell, case, device):
    require_kernel(cell, case, torch.float32, device, "cooperative")
    problem = make_problem(cell, case, torch.float32, device)
    assert not over_budget(problem, functools.partial(recurrence, backend="cooperative"))


@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference_without_bias(cell, device):
    assert not over_budget(make_problem(cell, Case(3, 2, 9, 2), torch.float32, device, bias=False))


@pytest.mark.parametrize("cell", CELLS)
def test_two_windows_with_carried_state_equal_one_run(cell, device):
    problem = make_problem(cell, Case(T=6, B=3, H=24, D=1), torch.float32, device)
    x_gates, *rest, h_0, c_0 = problem.inputs
    y, h_n, c_n = recurrence(cell, x_gates, *rest, h_0, c_0)
    y_1, h_1, c_1 = recurrence(cell, x_gates[:2], *rest, h_0, c_0)
    y_2, h_2, c_2 = recurrence(cell, x_gates[2:], *rest, h_1, c_1)
    assert torch.equal(torch.cat((y_1, y_2)), y)
    assert torch.equal(h_2, h_n)
    assert c_n is None or torch.equal(c_2, c_n)


def carried_state_error(cell: str, device: str, T: int = 128) -> float:
    """The error, in units of 2^-11, of a float16 state that moves by less than it could if it were float16."""
    large = 60.0
    gates = {
        "lstm": [large, large, 2.0**-12, large],  # i = f = o = 1: c' = c + tanh(2^-12)
        "gru": [0.0, 9.7, -large],  # z = 1 - 2^-14 and n = -1: h' = h - 2^-14 (h + 1)
    }[cell]
    x_gates = torch.tensor(gates)[:, None].expand(T, 1, 1, len(gates), 16)
    ones = torch.ones(1, 1, 16)
    tensors = (x_gates, torch.zeros(1, len(gates) * 16, 16), None, ones, ones if cell == "lstm" else None)
    rounded = [None if t is None else t.half() for t in tensors]
    *_, truth = filter(
        torch.is_tensor, reference.recurrence(cell, *(None if t is None else t.double() for t in rounded))
    )
    *_, found = filter(torch.is_tensor, recurrence(cell, *(None if t is None else t.to(device) for t in rounded)))
    assert (truth - 1).abs().min() > 2**-7  # it did move
    return (found.double().cpu() - truth).abs().max().item() / 2**-11


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_carried_state_is_fp32(cell, device):
    """Rounded at every step, it would stay where it started, 16 to 32 units off; at the end only, half a unit."""
    assert carried_state_error(cell, device) <= 1


def test_offsets_beyond_2_31_elements(device):
    """The second of two time steps starts at element 2^31; only the first batch tile of 2^23 is run."""
    B, H = 2**27, 16
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x_gates, y = (torch.empty(2, B, 1, 1, H, dtype=torch.float16, device=device) for _ in range(2))
    small = torch.zeros(1, 16, H, dtype=torch.float16, device=device)
    x_gates[:, :16] = torch.tensor([0.5, -0.5], device=device)[:, None, None, None, None]
    sizes = Sizes(1, 1, 1, 0, 1, 1, H, False, False, False, "exact", "ieee")
    # The interpreter would copy all 16 GiB back; on the CPU kernels write in place, and untouched pages cost nothing.
    with interpreter.corrected(), unittest.mock.patch("triton.runtime.interpreter.GridExecutor._restore_args_dev"):
        groups = Inputs(x_gates, small, None, None), Outputs(y, None, None, None), Sequences(None, None, None)
        resident.forward[(1, 1)](*groups, 2, B, rnn_tanh_forward, sizes, resident.Form(16, H))
    expected = torch.tensor([0.5, -0.5]).tanh().half().tolist()
    assert y[:, 0, 0, 0, 0].tolist() == expected
    assert y[:, 15, 0, 0, 15].tolist() == expected


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_writes_every_element(cell, dtype, backend, device):
    require_kernel(cell, Case(T=3, B=17, H=20, D=2), dtype, device, backend)
    problem = make_problem(cell, Case(T=3, B=17, H=20, D=2), dtype, device)
    assert not over_budget(problem, functools.partial(recurrence, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
def test_saturated_input_gives_no_nan(cell, dtype, device):
    problem = make_problem(cell, Case(T=3, B=4, H=16, D=1), dtype, device)
    problem.inputs[0].copy_(torch.randn_like(problem.inputs[0]).sign() * 1e4)
    assert not over_budget(problem)


def test_saturated_relu_gives_no_nan(device):
    problem = make_problem("rnn_relu", Case(T=3, B=4, H=16, D=1), torch.float32, device)
    problem.inputs[0].copy_(torch.randn_like(problem.inputs[0]).sign() * 1e4)
    assert not over_budget(problem)


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
def test_small_activations_keep_relative_precision(cell, device):
    """1 - 2 / (1 + exp(2x)) would cancel here: tanh must be accurate near 0 too."""
    problem = make_problem(cell, Case(T=3, B=4, H=16, D=1), torch.float32, device, bias=False)
    for tensor in problem.inputs:
        if tensor is not None:
            tensor.mul_(1e-4)
    assert not over_budget(problem)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("unused", ("y", "h_n", "c_n"))
def test_outputs_without_upstream_gradient(cell, unused, device):
    """Autograd passes None for an output that the loss does not use; None must act as zero."""
    problem = make_problem(cell, Case(T=3, B=2, H=8, D=2), torch.float32, device)
    index = ("y", "h_n", "c_n").index(unused)
    if problem.upstream[index] is None:
        return
    problem.upstream[index].zero_()

    def without(*args):
        outputs = list(recurrence(*args))
        outputs[index] = outputs[index].detach().requires_grad_()
        return tuple(outputs)

    assert not over_budget(problem, without)


@pytest.mark.parametrize("cell", CELLS)
def test_runs_are_bitwise_repeatable(cell, device):
    problem = make_problem(cell, Case(T=5, B=19, H=24, D=2), torch.float32, device)
    first, second = problem.run(recurrence), problem.run(recurrence)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_the_reference(cell):
    """The specification itself, in fp64, first and second order, against finite differences.

    Of the sLSTM only what m does not rescale: y and h, and the states but m.
    """
    problem = make_problem(cell, Case(T=3, B=2, H=3, D=2), torch.float64, "cpu")
    inputs = [None if t is None else t.requires_grad_() for t in problem.inputs]
    present = [t for t in inputs if t is not None]

    scale = present.pop()[2] if cell == "slstm" else None
    if scale is not None:
        present.append(problem.inputs[-1][:2].detach().requires_grad_())

    def run(*tensors):
        given = list(tensors)
        if scale is not None:
            given[-1] = torch.cat((given[-1], scale.detach()[None]))
        given = iter(given)
        outputs = reference.recurrence(cell, *(None if t is None else next(given) for t in inputs))
        return tuple(o for o in outputs[: 2 if scale is not None else None] if o is not None)

    assert torch.autograd.gradcheck(run, present)
    assert torch.autograd.gradgradcheck(run, present)
