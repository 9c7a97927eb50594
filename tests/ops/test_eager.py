"""Calls that nothing looks into skip the op: bit by bit the same results, gradients and graph as by the op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.nn import calls
from fastrnn.ops import layer, library, sums

NAMES = ("LSTM", "GRU", "RNN")


@pytest.fixture(params=("eager", "op"))
def way(request, monkeypatch):
    if request.param == "op":
        monkeypatch.setattr(library, "observed", lambda tensors: True)
    return request.param


def made(name: str, device: str, **kwargs):
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(3, 4, backend="resident", device=device, **kwargs)
    return module, torch.randn(5, 2, 3, device=device, requires_grad=True)


def both(run, monkeypatch) -> tuple:
    """A run's results by either way."""
    eager = run()
    with monkeypatch.context() as patch:
        patch.setattr(library, "observed", lambda tensors: True)
        return eager, run()


def same(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("frozen", ((), ("weight_hh_l0",), ("bias_hh_l0", "bias_ih_l0"), ("weight_ih_l0",)), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_same(name, frozen, device, monkeypatch):
    def run():
        module, x = made(name, device)
        for parameter in frozen:
            getattr(module, parameter).requires_grad_(False)
        output, final = module(x)
        (output.sin().sum() + sum(s.cos().sum() for s in (final if name == "LSTM" else (final,)))).backward()
        return [output, x.grad, *(p.grad for p in module.parameters())]

    same(*both(run, monkeypatch))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients_are_the_same(name, device, monkeypatch):
    def run():
        module, x = made(name, device)
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad(module(x)[0].sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)

    same(*both(run, monkeypatch))


def test_sequences_and_states_are_the_same(device, monkeypatch):
    def run():
        module, x = made("LSTM", device, num_layers=2, bidirectional=True)
        hx = tuple(torch.randn(4, 2, 4, device=device, requires_grad=True) for _ in range(2))
        reset = torch.zeros(5, 2, dtype=torch.bool, device=device)
        reset[2, 1] = True
        start = tuple(torch.randn(4, 2, 4, device=device, requires_grad=True) for _ in range(2))
        options = {"lengths": [5, 3], "reset": reset, "reset_state": start, "return_cell_states": True}
        output, (h_n, c_n), c = module(x, hx, **options)
        (output.sum() + h_n.sin().sum() + c_n.cos().sum() + c.sum()).backward()
        return [output, h_n, c_n, c, x.grad, *(t.grad for t in (*hx, *start, *module.parameters()))]

    same(*both(run, monkeypatch))


def test_autocast_is_the_same(device, monkeypatch):
    def run():
        module, x = made("GRU", device)
        with torch.autocast(device, torch.bfloat16):
            output, _ = module(x)
        output.float().sum().backward()
        assert output.dtype == torch.bfloat16
        return [output, x.grad, *(p.grad for p in module.parameters())]

    same(*both(run, monkeypatch))


def test_hooks_see_the_same(device, monkeypatch):
    def run():
        module, x = made("LSTM", device)
        packed, seen = {}, []

        def pack(tensor):
            packed[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = module(x)
        output.register_hook(lambda g: seen.append(g.clone()))
        module.weight_hh_l0.register_hook(lambda g: seen.append(g.clone()))
        output.sum().backward()
        return seen, sorted(packed.values())  # of storages: each way has views of its own

    (seen, packed), (of_op, kept) = both(run, monkeypatch)
    same(seen, of_op)
    assert packed == kept


@pytest.mark.usefixtures("way")
def test_backward_twice_needs_retain_graph(device):
    module, x = made("GRU", device)
    output, _ = module(x)
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.usefixtures("way")
def test_a_parameter_changed_before_backward_is_noticed(device):
    module, x = made("GRU", device)
    output, _ = module(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", NAMES)
def test_final_states_may_be_changed_in_place(name, device):
    """As torch.nn's: each state is its own, and backward goes on."""
    module, x = made(name, device)
    output, final = module(x)
    first, *others = final if name == "LSTM" else (final,)
    kept = [output.clone(), *(state.clone() for state in others)]
    first.mul_(0.5)
    for found, expected in zip((output, *others), kept, strict=True):
        assert torch.equal(found, expected)
    first.sum().backward()
    assert x.grad.abs().sum() > 0


def test_who_looks_sees_the_op(device):
    """Modes, which flop counters and exporters are, and compilers."""
    module, x = made("GRU", device)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        module(x)[0].sum().backward()
    assert {"fastrnn::recurrence", "fastrnn::recurrence_backward"} <= set(seen)


def test_another_gradient_is_noticed(device, monkeypatch):
    """The checks above fail where one way gives something else."""
    bias_gradient = sums.bias_gradient

    def run():
        module, x = made("GRU", device)
        module(x)[0].sum().backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    monkeypatch.setattr(sums, "bias_gradient", lambda *args: 2 * bias_gradient(*args))  # launch.py has its own name
    with pytest.raises(AssertionError):
        same(*both(run, monkeypatch))


def test_a_large_layer_gives_back_what_it_saved_before_the_gradient_of_x(device, monkeypatch):
    """In two nodes: the peak of a backward pass has no dx beside what forward saved."""
    module, x = made("LSTM", device)
    assert type(module(x)[0].grad_fn).__name__ == "_NodeBackward"
    monkeypatch.setattr(layer, "LARGE", 5 * 2 * 16 * 4 - 1)  # bytes of x_gates
    calls._routes.clear()
    assert type(module(x)[0].grad_fn).__name__ != "_NodeBackward"
    monkeypatch.setattr(layer, "LARGE", 5 * 2 * 16 * 4)
    calls._routes.clear()
    assert type(module(x)[0].grad_fn).__name__ == "_NodeBackward"


class Own(torch.Tensor):
    """A subclass of somebody's, who may look at operators."""


def test_a_subclass_among_the_options_is_given_to_the_op(device, monkeypatch):
    module, x = made("GRU", device)
    reset, start = torch.zeros(5, 2, dtype=torch.bool, device=device), torch.zeros(1, 2, 4, device=device)
    called, run = [], library.run
    monkeypatch.setattr(library, "run", lambda args: called.append(args.cell) or run(args))
    module(x, reset=reset, reset_state=start)
    assert not called
    module(x, reset=reset, reset_state=start.as_subclass(Own))
    assert called == ["gru"]
