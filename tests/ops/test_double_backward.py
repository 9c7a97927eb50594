"""Gradients of gradients: through the kernels' slow path, against torch.nn's in fp64, and what it costs nobody else."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastrnn
from fastrnn import ops
from fastrnn.ops import double_backward, launch

from ..support.cases import CELLS, Case, make_problem, times_allowed

NAMES = ("RNN", "GRU", "LSTM")
KERNELS = ("resident", "cooperative", "cpu")


def penalty(layer, x, order: int) -> list[torch.Tensor]:
    """Gradients, for the input and all parameters, of a loss of order - 1 fold gradients; h_0 depends on the input."""
    h = x.sum((0, 2)).sin()[None, :, None].expand(layer.num_layers * 2, -1, layer.hidden_size)
    output, final = layer(x, (h, h.cos()) if layer.mode == "LSTM" else h)
    results = (output, *final) if layer.mode == "LSTM" else (output, final)
    loss = sum((t.sin() * t).mean() for t in results)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for _ in range(order - 1):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        loss = sum((g * g.cos()).sum() for g in gradients)
    return list(torch.autograd.grad(loss, leaves))


def worst(found, truth) -> float:
    """The largest error, in units of its tensor's largest element."""
    return max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize(
    ("name", "backend", "order"),
    [*itertools.product(NAMES, KERNELS, (2,)), ("LSTM", "resident", 3)],  # a kernel's slow path is every kernel's
)
def test_equals_torch_nn(name, backend, order, device):
    """As far from the truth as the budget allows of the reference's largest error, over three draws, and one ulp."""
    kwargs = {"num_layers": 2, "bidirectional": True}
    errors = {backend: 0.0, "reference": 0.0}
    for _ in range(3):
        # On the CPU: torch's kernels for GPUs are differentiable once.
        theirs = getattr(torch.nn, name)(3, 5, dtype=torch.float64, **kwargs)
        x = torch.randn(4, 2, 3, device=device, requires_grad=True)
        truth = penalty(theirs, x.detach().cpu().double().requires_grad_(), order)
        for which in errors:
            ours = getattr(fastrnn, name)(3, 5, backend=which, device=device, **kwargs)
            ours.load_state_dict(theirs.state_dict())
            errors[which] = max(errors[which], worst(penalty(ours, x, order), truth))
    times = times_allowed(torch.float32, torch.device(device))
    assert errors[backend] <= times * errors["reference"] + torch.finfo(torch.float32).eps, errors


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("frozen", ("weight_ih", "weight_hh", "bias_hh", "all"))
def test_frozen_parameters(frozen, bias, device):
    layers = []
    for backend in ("resident", "reference"):
        torch.manual_seed(0)
        layer = fastrnn.GRU(3, 5, num_layers=2, bidirectional=True, bias=bias, backend=backend, device=device)
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(frozen not in key and frozen != "all")
        layers.append(layer)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    torch.testing.assert_close(penalty(layers[0], x, 2), penalty(layers[1], x, 2))


@pytest.mark.parametrize("name", NAMES)
def test_only_some_gradients_are_differentiated(name, device):
    """A gradient penalty on the input only, from the last output only: the other upstream gradients are None."""
    found = []
    for backend in ("resident", "reference"):
        torch.manual_seed(0)
        layer = getattr(fastrnn, name)(3, 5, backend=backend, device=device)
        x = torch.randn(4, 2, 3, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x)[0][-1].sum(), x, create_graph=True)
        (gradient.norm() - 1).square().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*found)


def test_the_slow_path_runs_only_for_second_derivatives(device, monkeypatch):
    calls = []
    backward, slow = launch.launch_backward, double_backward.differentiate
    monkeypatch.setattr(launch, "launch_backward", lambda *args: calls.append("kernel") or backward(*args))
    monkeypatch.setattr(double_backward, "differentiate", lambda *args: calls.append("slow") or slow(*args))
    layer = fastrnn.LSTM(3, 5, backend="resident", device=device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    (once,) = torch.autograd.grad(layer(x)[0].sum(), x)
    (again,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    assert calls == ["kernel", "kernel"] and torch.equal(once, again)
    again.sum().backward()
    assert calls == ["kernel", "kernel", "slow"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_more_is_kept_for_it(name, device, monkeypatch):
    """The bytes that the graph keeps alive, parameters apart, are those without double backward."""

    def kept() -> int:
        layer = getattr(fastrnn, name)(6, 8, num_layers=2, backend="resident", device=device)
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept: no address comes twice
            return tensor

        x = torch.randn(7, 4, 6, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(x)
        return sum(s.nbytes() for address, s in storages.items() if address not in own)

    found = kept()
    recurrence = ops.recurrence
    monkeypatch.setattr(ops, "recurrence", lambda *args, backend, source, **named: recurrence(*args, backend))
    assert found == kept() > 0


@pytest.mark.parametrize("cell", CELLS)
def test_the_bare_op_needs_its_source(cell, device):
    inputs = make_problem(cell, Case(T=2, B=3, H=5, D=1), torch.float32, device).inputs
    x_gates = inputs[0].requires_grad_()
    y, _, _ = ops.recurrence(cell, *inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), x_gates, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward .* without its source is missing.*source="):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_reference(name, device):
    """First and second derivatives against finite differences, in fp64."""
    layer = getattr(fastrnn, name)(2, 3, bidirectional=True, backend="reference", dtype=torch.float64, device=device)
    keys = [key for key, _ in layer.named_parameters()]
    h = torch.randn(2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    state = (h, h.detach().flip(0).requires_grad_()) if name == "LSTM" else (h,)

    def call(x, *tensors):
        hx = tensors[: len(state)] if name == "LSTM" else tensors[0]
        parameters = dict(zip(keys, tensors[len(state) :], strict=True))
        output, final = torch.func.functional_call(layer, parameters, (x, hx))
        return output, *(final if name == "LSTM" else (final,))

    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, *state, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)
