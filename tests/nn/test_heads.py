"""Layers whose W_hh is block-diagonal, in heads: as dense layers with zeros between the blocks."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.nn import calls
from fastrnn.planning.kernel_plan import GridTooLargeError

from ..support.cases import ON_CPU
from ..support.versions import HAS_CLUSTERS

N = 3
MODULES = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN, "SLSTM": fastrnn.SLSTM}
KERNELS = ("resident", "cooperative")


def dense(layer: torch.nn.Module) -> torch.nn.Module:
    """The same layer without heads, by the reference: unit n*K + k of each gate sees head n's h only."""
    H, K = layer.hidden_size, layer.hidden_size // layer.num_heads
    same = type(layer)(
        layer.input_size, H, layer.num_layers, bidirectional=layer.bidirectional, batch_first=layer.batch_first,
        backend="reference",
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            whole = getattr(same, name)
            if not name.startswith("weight_hh"):
                whole.copy_(parameter)
                continue
            whole.zero_()
            for row in range(len(whole)):
                head = row % H // K
                whole[row, head * K : (head + 1) * K] = parameter[row]
    return same.to(layer.weight_ih_l0)


def compare(layer: torch.nn.Module, x: Tensor, other: torch.nn.Module | None = None, **options) -> None:
    """Outputs, states and gradients of a layer in heads and of the dense one; or of another in heads."""
    other = dense(layer) if other is None else other
    results = []
    for each in (layer, other):
        input = x.clone().requires_grad_()
        outputs = [t for t in torch.utils._pytree.tree_leaves(each(input, **options)) if isinstance(t, Tensor)]
        loss = sum((o * torch.linspace(-1, 1, o.numel(), device=x.device).view(o.shape)).sum() for o in outputs)
        gradients = torch.autograd.grad(loss, [input, *each.parameters()])
        results.append((outputs, gradients))
    (outputs, gradients), (others, of_other) = results
    for found, expected in zip(outputs, others, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    names = ["input", *dict(layer.named_parameters())]
    for name, found, expected in zip(names, gradients, of_other, strict=True):
        if found.shape != expected.shape:  # of the blocks
            H, K = layer.hidden_size, found.shape[1]
            expected = torch.stack([expected[row].view(-1, K)[row % H // K] for row in range(len(found))])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def states(layer: torch.nn.Module, B: int, device: str) -> Tensor | tuple[Tensor, ...]:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    made = tuple(torch.rand(rows, B, layer.hidden_size, device=device) + 0.5 for _ in range(layer._stack().states))
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
@pytest.mark.parametrize("name", MODULES)
def test_as_a_dense_layer(name, backend, device):
    layer = MODULES[name](4, 12, 2, bidirectional=True, num_heads=N, backend=backend).to(device)
    x = torch.randn(5, 3, 4, device=device)
    compare(layer, x)
    compare(layer, x, hx=states(layer, 3, device))


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
@pytest.mark.parametrize("name", ("GRU", "SLSTM"))
def test_lengths_and_resets(name, backend, device):
    layer = MODULES[name](4, 12, 2, bidirectional=True, batch_first=True, num_heads=N, backend=backend).to(device)
    x, reset = torch.randn(3, 6, 4, device=device), torch.rand(3, 6, device=device) < 0.4
    compare(layer, x, lengths=[6, 2, 4], reset=reset, reset_state=states(layer, 1, device))
    ragged = torch.randn(11, 4, device=device)
    compare(layer, ragged, cu_seqlens=[0, 4, 4, 11])


@pytest.mark.parametrize("backend", ("reference", "resident"))
@pytest.mark.parametrize("name", ("LSTM", "SLSTM"))
def test_every_state_of_all_steps(name, backend, device):
    layer = MODULES[name](4, 12, num_heads=N, backend=backend).to(device)
    x = torch.randn(6, 3, 4, device=device)
    asked = {"return_states" if name == "SLSTM" else "return_cell_states": True}
    compare(layer, x, **asked)
    chunked = copy.deepcopy(layer)
    chunked.checkpoint_every = 2
    compare(chunked, x, layer, **asked)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bidirectional", (False, True))
def test_checkpoint_every(name, bidirectional, device):
    layer = MODULES[name](4, 12, 2, bidirectional=bidirectional, num_heads=N, backend="resident").to(device)
    chunked = copy.deepcopy(layer)
    chunked.checkpoint_every = 2
    compare(chunked, torch.randn(5, 3, 4, device=device), layer)


def test_one_head_is_todays_layer_bit_for_bit(device):
    torch.manual_seed(1)
    plain = fastrnn.LSTM(4, 12, backend="resident").to(device)
    torch.manual_seed(1)
    one = fastrnn.LSTM(4, 12, backend="resident", num_heads=1).to(device)
    x = torch.randn(5, 3, 4, device=device)
    for found, expected in zip(one(x)[1], plain(x)[1], strict=True):
        assert torch.equal(found, expected)
    assert one.state_dict().keys() == torch.nn.LSTM(4, 12).state_dict().keys()


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
def test_heads_of_one_unit_are_an_independently_recurrent_network(backend, device):
    """IndRNN (Li et al. 2018), which haste has: h' = tanh(W x + u h + b), unit by unit."""
    layer = fastrnn.RNN(4, 6, num_heads=6, backend=backend).to(device)
    x, h, ys = torch.randn(5, 3, 4, device=device), torch.zeros(3, 6, device=device), []
    for x_t in x:
        h = torch.tanh(x_t @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.weight_hh_l0[:, 0] * h + layer.bias_hh_l0)
        ys.append(h)
    found, expected = layer(x)[0], torch.stack(ys)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (found, expected))
    for of_layer, of_loop in zip(*gradients, strict=True):
        torch.testing.assert_close(of_layer, of_loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_parameters_have_torchs_names(name):
    layer = MODULES[name](4, 12, 2, num_heads=N)
    G = layer._stack().of_cell.gates
    assert list(layer.state_dict()) == list(torch.nn.LSTM(4, 12, 2).state_dict())
    assert layer.weight_hh_l1.shape == (G * 12, 4) and layer.weight_ih_l1.shape == (G * 12, 12)
    assert all(p is q for p, q in zip(layer.parameters(), layer._flat_weights, strict=True))
    other = copy.deepcopy(layer)
    torch.nn.init.zeros_(other.weight_hh_l0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight_hh_l0, layer.weight_hh_l0) and "num_heads=3" in repr(layer)
    assert layer.half().weight_hh_l0.dtype == torch.float16


@pytest.mark.parametrize("name", ("LSTM", "SLSTM"))
def test_steps_are_forward(name, device):
    layer, state = MODULES[name](4, 12, 2, num_heads=N).to(device), None
    x = torch.randn(5, 3, 4, device=device)
    output, final = layer(x)
    steps = []
    for x_t in x:
        y, state = layer.step(x_t, state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps), output)
    for found, expected in zip(state, final, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ("GRU", "SLSTM"))
def test_second_derivatives(name, device):
    x = torch.randn(3, 2, 4, device=device)
    layer = MODULES[name](4, 6, num_heads=N, backend="resident").to(device)
    found = []
    for each in (layer, dense(layer)):
        input = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(input)[0].square().sum(), input, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), input)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ("GRU", "SLSTM"))
def test_vmap_and_grad(name, device):
    layer, xs = MODULES[name](4, 6, num_heads=N, backend="resident").to(device), torch.randn(2, 3, 5, 4, device=device)

    def loss(x):
        return layer(x)[0].square().sum()

    found = torch.vmap(torch.func.grad(loss))(xs)
    expected = [torch.autograd.grad(loss(x := each.requires_grad_()), x)[0] for each in xs.clone().unbind()]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", ("LSTM", "SLSTM"))
def test_compiles_whole(name, device):
    layer = MODULES[name](4, 6, num_heads=N, backend="resident").to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 4, device=device)
    compare(layer, x, compiled)


def test_sixteen_bits_keep_the_states_in_float32(device):
    layer = fastrnn.SLSTM(4, 12, num_heads=N, backend="resident", dtype=torch.bfloat16).to(device)
    x = torch.randn(6, 2, 4, device=device, dtype=torch.bfloat16)
    output, final, steps = layer(x, return_states=True)
    assert output.dtype == torch.bfloat16 and {state.dtype for state in (*final, *steps[1:])} == {torch.float32}
    _, middle = layer(x[:3])
    rest, again = layer(x[3:], middle)
    assert torch.equal(rest, output[3:])
    for found, expected in zip(again, final, strict=True):
        assert torch.equal(found, expected)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    torch.testing.assert_close(output.double(), exact(x.double())[0], rtol=0, atol=0.02)


def test_plans_of_heads():
    """12 heads of 64 are a program each and batch tile, which never meet; whichever fits one launch is taken."""
    sizes = {"hidden_size": 768, "batch_size": 16, "dtype": torch.bfloat16, "device": "sm_90"}
    plan = fastrnn.plan("slstm", **sizes, num_heads=12)
    assert plan.backend == "resident" and plan.kernel.programs == 12 * 2
    assert "H=768 in 12 heads" in str(plan) and "1 direction(s) x 12 heads" in str(plan)
    for heads, cell in itertools.product((1, 2, 3, 6, 24), ("slstm", "lstm", "gru")):
        kernel = fastrnn.plan(cell, **sizes, num_heads=heads).kernel
        assert kernel.grid[-1] == heads and kernel.programs <= 132
    assert fastrnn.plan("lstm", hidden_size=768, batch_size=16, num_heads=3, device="cpu").backend == ON_CPU


def test_what_is_no_division_into_heads_is_refused(device):
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size, which is 10; got 4"):
        fastrnn.GRU(3, 10, num_heads=4)
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size, which is 10"):
            fastrnn.SLSTM(3, 10, num_heads=wrong)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size, which is 10; got 3"):
        fastrnn.plan("gru", hidden_size=10, batch_size=1, num_heads=3, device="cpu")
    with pytest.raises(NotImplementedError, match="num_heads with a projection"):
        fastrnn.LSTM(3, 10, num_heads=2, proj_size=5)
    with pytest.raises(NotImplementedError, match="backend='torch': torch has no kernel with heads"):
        fastrnn.GRU(3, 10, num_heads=2, backend="torch").to(device)(torch.randn(2, 1, 3, device=device))
    for wrong, named in (((), {"proj_size": 4}), ((1, True, False, 0.0, False, 4), {})):
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not SLSTM"):
            fastrnn.SLSTM(5, 6, *wrong, **named)
    params = list(fastrnn.GRU(3, 10, num_heads=2).parameters())
    x = torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match=r"\(weight_hh_l0\): expected \(30, 2\), got \(30, 5\)"):
        fastrnn.gru(x, None, params, num_heads=5)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size, which is 10; got 3"):
        fastrnn.gru(x, None, params, num_heads=3)
    with pytest.warns(UserWarning, match="torch has no sLSTM, and no layer with heads"):
        fastrnn.revert(fastrnn.GRU(3, 10, num_heads=2))


def test_states_of_another_shape_are_refused():
    slstm, x, h = fastrnn.SLSTM(3, 10, num_heads=2), torch.randn(2, 1, 3), torch.zeros(1, 1, 10)
    for wrong in ((h, h), h, (h, h, h, None)):
        with pytest.raises(ValueError, match="hx: expected a tuple of 4 tensors"):
            slstm(x, wrong)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[3\] size \(1, 1, 10\), got \[1, 2, 10\]"):
        slstm(x, (h, h, h, torch.zeros(1, 2, 10)))
    with pytest.raises(ValueError, match="reset_state: expected a tuple of 4 tensors, as hx"):
        slstm(x, reset=torch.zeros(2, 1, dtype=torch.bool), reset_state=(h, h))


def test_a_loop_on_a_gpu_is_warned_of():
    planned = fastrnn.plan("gru", hidden_size=6, batch_size=1, num_heads=N, device="cpu")
    on_gpu = dataclasses.replace(planned, backend="reference", device="cuda:0", why="no tier holds these heads")
    with pytest.warns(fastrnn.FallbackWarning, match="runs a loop over time in torch: no tier holds these heads"):
        assert calls.backend_of(on_gpu) == "reference"


def test_a_head_that_no_tier_holds():
    with pytest.raises((NotImplementedError, GridTooLargeError), match="backend='resident': W_hh does not fit") as one:
        fastrnn.plan("lstm", hidden_size=2048, batch_size=16, num_heads=2, device="sm_90", backend="resident")
    assert str(one.value).endswith("heads of 64 units would fit: num_heads=32")  # of float32, in this tier
    plan = fastrnn.plan("lstm", hidden_size=40960, batch_size=16, num_heads=2, dtype=torch.bfloat16, device="sm_90")
    fits = "512 units would fit: num_heads=80" if HAS_CLUSTERS else "128 units would fit: num_heads=320"
    assert plan.backend == "reference" and plan.why.endswith(f"heads of {fits}")


@pytest.mark.parametrize(
    ("function", "old", "new"),
    (
        ("fastrnn.nn.layers.by_head", ".transpose(0, 1)", ".transpose(0, 1).flip(0)"),
        ("fastrnn.nn.layers._step", "(by_head(stack, role) for role in (W_ih, W_hh, *b))", "(W_ih, W_hh, *b)"),
        ("fastrnn.reference._product", "rec + b_hh", "rec + b_hh.flip(0)"),
    ),
)
def test_heads_in_another_order_are_noticed(function, old, new, mutate, device):
    layer = fastrnn.LSTM(4, 12, num_heads=N, backend="reference").to(device)
    x = torch.randn(5, 3, 4, device=device)
    compare(layer, x)
    mutate({function: (old, new)})
    with pytest.raises(AssertionError):
        compare(layer, x)
