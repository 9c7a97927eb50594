"""The custom ops as torch sees them: schema, fake, autograd, and what they keep."""

import pytest
import torch

from fastrnn import ops, reference
from fastrnn.ops import launch, library
from fastrnn.ops.schema import Args, BackwardArgs

from ..support.cases import CELLS, Case, Problem, make_problem


def args_of(problem: Problem, save: bool, backend: str) -> Args:
    x_gates, W_hh, b_hh, *states = problem.inputs
    state_0 = reference.stacked(*states).detach()
    return Args(x_gates, W_hh, b_hh, state_0.requires_grad_(x_gates.requires_grad), problem.cell, save, backend)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # copies by torch 2.14
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("save", (True, False))
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_forward(cell, save, backend, device):
    problem = make_problem(cell, Case(T=2, B=3, H=5, D=2), torch.float32, device)
    for tensor in problem.inputs:
        if save and tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(library._recurrence, args_of(problem, save, backend))


@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_backward(cell, backend, device):
    problem = make_problem(cell, Case(T=2, B=3, H=5, D=2), torch.float32, device)
    args = args_of(problem, True, backend)
    y, finals, saved, steps = library._recurrence(*args)
    upstream = torch.randn_like(y), torch.randn_like(finals), None
    given = BackwardArgs(*upstream, args.W_hh, args.state_0, y, saved, steps, cell, True, True, backend)
    torch.library.opcheck(library._recurrence_backward, given)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_kept_without_gradients(cell, device):
    inputs = make_problem(cell, Case(T=2, B=3, H=5, D=1), torch.float32, device).inputs
    kept = []
    original = launch.forward

    def spy(*args, **named):
        outputs = original(*args, **named)
        kept.append(outputs.saved.numel() + outputs.steps.numel())
        return outputs

    launch.forward = spy
    try:
        ops.recurrence(cell, *inputs)
        with torch.no_grad():
            ops.recurrence(cell, *(None if t is None else t.requires_grad_() for t in inputs))
        assert kept == [0, 0]
        y, _, _ = ops.recurrence(cell, *inputs)
        assert y.requires_grad and (kept[2] > 0) == (not cell.startswith("rnn"))  # the RNN needs nothing but y
    finally:
        launch.forward = original


def test_frozen_weights_get_no_gradient(device):
    inputs = [t for t in make_problem("lstm", Case(T=2, B=3, H=5, D=1), torch.float32, device).inputs]
    inputs[0].requires_grad_()
    calls = []
    original = launch.weight_gradient
    launch.weight_gradient = lambda *args: calls.append(args) or original(*args)
    try:
        ops.recurrence("lstm", *inputs)[0].sum().backward()
        assert inputs[0].grad is not None and not calls
    finally:
        launch.weight_gradient = original


@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice_needs_retain_graph(cell, device):
    inputs = make_problem(cell, Case(T=2, B=3, H=5, D=1), torch.float32, device).inputs
    x_gates = inputs[0].requires_grad_()
    y, _, _ = ops.recurrence(cell, *inputs)
    y.sum().backward(retain_graph=True)
    first = x_gates.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(x_gates.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_backward_without_saving_says_so(device):
    problem = make_problem("gru", Case(T=2, B=3, H=5, D=1), torch.float32, device)
    problem.inputs[0].requires_grad_()
    y, *_ = library._recurrence(*args_of(problem, False, "resident"))
    with pytest.raises(RuntimeError, match="ran with save=False"):
        y.sum().backward()


def test_direction_1_walks_time_from_its_end(device):
    """Bidirectional is two unidirectional runs, the second over reversed time."""
    problem = make_problem("gru", Case(T=5, B=2, H=6, D=2), torch.float32, device)
    x_gates, W_hh, b_hh, h_0, _ = problem.inputs
    y, h_n, _ = ops.recurrence("gru", x_gates, W_hh, b_hh, h_0, None)
    for d in (0, 1):
        x = x_gates[:, :, d : d + 1] if d == 0 else x_gates[:, :, d : d + 1].flip(0)
        alone, last, _ = reference.recurrence("gru", x, W_hh[d : d + 1], b_hh[d : d + 1], h_0[d : d + 1], None)
        alone = alone if d == 0 else alone.flip(0)
        torch.testing.assert_close(y[:, :, d], alone[:, :, 0])
        torch.testing.assert_close(h_n[d], last[0])
