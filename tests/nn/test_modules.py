"""fastrnn.RNN, GRU and LSTM against torch.nn's: the same parameters, outputs, states and gradients on every backend."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch

import fastrnn
from fastrnn.nn import calls

NAMES = ("RNN", "GRU", "LSTM")
BACKENDS = ("auto", "torch", "reference", "resident", "cooperative", "cpu")


def pair(name: str, device: str, backend: str, *args, dtype=torch.float64, **kwargs):
    """torch.nn's module in fp64, and ours with the same state."""
    ours = getattr(fastrnn, name)(*args, backend=backend, device=device, **kwargs)
    theirs = getattr(torch.nn, name)(*args, dtype=dtype, device=device, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(output, final):
    return [output, *(final if isinstance(final, tuple) else (final,))]


def compare(ours, theirs, input, hx=None, tolerance: float = 1e-5):
    """Outputs, states and gradients of all parameters and of the input, fp32 against fp64."""

    def run(module, dtype):
        x = input.detach().to(dtype).requires_grad_()
        h = None if hx is None else functional_map(lambda t: t.to(dtype), hx)
        results = flat(*module(x, h))
        torch.manual_seed(1)
        loss = sum((r * torch.randn(r.shape, dtype=torch.float64, device=r.device)).sum() for r in results)
        return results, torch.autograd.grad(loss, [x, *module.parameters()])

    found, truth = run(ours, torch.float32), run(theirs, torch.float64)
    for a, b in zip((*found[0], *found[1]), (*truth[0], *truth[1]), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def functional_map(f, hx):
    return tuple(map(f, hx)) if isinstance(hx, tuple) else f(hx)


def test_a_large_lstm_trains_as_torch_nn_does(device):
    """H = 650 over many programs: two steps of gradient descent leave the same parameters."""
    ours, theirs = pair("LSTM", device, "cooperative", 650, 650)
    input = torch.randn(2, 3, 650, device=device)
    losses = []
    for module, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
        for _ in range(2):
            optimizer.zero_grad()
            loss = (module(input.to(dtype))[0] - 0.5).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs",
    (
        {},
        {"bidirectional": True, "num_layers": 2, "batch_first": True},
        {"num_layers": 3, "bias": False},
    ),
    ids=("plain", "bidirectional-stacked-batch_first", "stacked-no-bias"),
)
def test_equals_torch_nn(name, backend, kwargs, device):
    compare(*pair(name, device, backend, 5, 12, **kwargs), torch.randn(4, 3, 5, device=device))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_first", (False, True))
def test_given_state_and_unbatched_input(name, backend, batch_first, device):
    kwargs = {"bidirectional": True, "num_layers": 2, "batch_first": batch_first}
    ours, theirs = pair(name, device, backend, 5, 7, **kwargs)
    for batch in ((3,), ()):
        h = torch.randn(4, *batch, 7, device=device)
        hx = (h, torch.randn_like(h)) if name == "LSTM" else h
        shape = (4, *batch, 5) if not (batch_first and batch) else (*batch, 4, 5)
        compare(ours, theirs, torch.randn(shape, device=device), hx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu(backend, device):
    for args in ((5, 7, 1, "relu"), (5, 7)):  # nonlinearity also as the fourth argument
        kwargs = {} if len(args) == 4 else {"nonlinearity": "relu"}
        ours, theirs = pair("RNN", device, backend, *args, **kwargs)
        assert ours.mode == theirs.mode == "RNN_RELU"
        compare(ours, theirs, torch.randn(4, 3, 5, device=device))


@pytest.mark.parametrize("backend", ("reference", "resident"))
def test_non_contiguous_tensors(backend, device):
    ours, theirs = pair("LSTM", device, backend, 5, 8)
    strided = torch.randn(5, 3, 8, device=device).permute(2, 1, 0)[::2]
    h = torch.randn(8, 3, 1, device=device).permute(2, 1, 0)
    assert not strided.is_contiguous() and not h.is_contiguous()
    compare(ours, theirs, strided, (h, h.flip(2)))


@pytest.mark.parametrize("name", NAMES)
def test_construction_is_torch_nns(name, device):
    """The same parameters in the same order with the same values from the same seed, and strict loading both ways."""
    kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True, "device": device}
    torch.manual_seed(3)
    ours = getattr(fastrnn, name)(4, 6, **kwargs)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(4, 6, **kwargs)
    for (key, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert repr(ours) == f"fastrnn.{theirs!r}"
    assert [[p.shape for p in group] for group in ours.all_weights] == [
        [p.shape for p in g] for g in theirs.all_weights
    ]
    ours.flatten_parameters()


def test_extra_repr_names_a_chosen_backend():
    assert repr(fastrnn.GRU(3, 4, backend="resident")) == "fastrnn.GRU(3, 4, backend='resident')"


def test_repr_names_a_subclass_of_yours_alone():
    class Mine(fastrnn.GRU):
        pass

    assert repr(Mine(3, 4)) == "Mine(3, 4)"


@pytest.mark.parametrize("name", NAMES)
def test_pickle_and_deepcopy(name, device):
    module = getattr(fastrnn, name)(3, 4, device=device, backend="resident")
    x = torch.randn(5, 2, 3, device=device)
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert copied.backend == "resident"
        assert torch.equal(copied(x)[0], module(x)[0])
        with torch.no_grad():
            copied.weight_hh_l0.zero_()
        assert not torch.equal(copied(x)[0], module(x)[0])


@pytest.mark.parametrize("backend", ("reference", "resident"))
@pytest.mark.parametrize("name", NAMES)
def test_replaced_parameters_are_used(name, backend, device):
    """As in torch.nn: after `module.weight = ...`, functional_call and .to(dtype)."""
    ours, theirs = pair(name, device, backend, 3, 4, dtype=torch.float32)
    x = torch.randn(5, 2, 3, device=device)
    new = torch.nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    ours.weight_hh_l0 = theirs.weight_hh_l0 = new
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    replaced = {key: torch.randn_like(value) for key, value in ours.state_dict().items()}
    call = torch.func.functional_call
    torch.testing.assert_close(call(ours, replaced, (x,))[0], call(theirs, replaced, (x,))[0])
    assert ours.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


def test_dropout_between_layers_only_in_training(device):
    torch.manual_seed(0)
    module = fastrnn.LSTM(3, 8, num_layers=2, dropout=0.5, backend="resident", device=device)
    plain = fastrnn.LSTM(3, 8, num_layers=2, backend="resident", device=device)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(6, 4, 3, device=device)
    assert not torch.equal(module(x)[0], plain(x)[0])
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    all_dropped = fastrnn.LSTM(3, 8, num_layers=2, dropout=1.0, backend="resident", device=device)
    first, second = all_dropped(x)[0], all_dropped(torch.randn_like(x))[0]
    assert torch.equal(first, second)  # nothing of the input reaches the second layer


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_its_dtype(name, device):
    module = getattr(fastrnn, name)(3, 8, backend="resident", device=device)
    x = torch.randn(5, 2, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        output, _ = module(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), module(x)[0], rtol=0.05, atol=0.02)  # bf16 has 8 bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_equals_the_module(backend, device):
    x = torch.randn(4, 3, 5, device=device)
    kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    for name, call in (("LSTM", fastrnn.lstm), ("GRU", fastrnn.gru), ("RNN", fastrnn.rnn)):
        module = getattr(fastrnn, name)(5, 6, backend=backend, device=device, **kwargs)
        found = flat(*call(x, None, list(module.parameters()), backend=backend, **kwargs))
        for a, b in zip(found, flat(*module(x)), strict=True):
            assert torch.equal(a, b)


def test_fallback_on_a_gpu_warns_once_a_reason():
    """Without a GPU: the Plan that a GPU's tensors would get, and what is made of it."""
    planned = fastrnn.plan("lstm", hidden_size=4096, batch_size=8, dtype=torch.bfloat16, device="sm_90")
    fallback = dataclasses.replace(planned, device="cuda:0")
    calls._warn_fallback.cache_clear()
    with pytest.warns(fastrnn.FallbackWarning, match="does not fit one program: 128.0 MiB at H=4096"):
        assert calls.backend_of(fallback) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls.backend_of(fallback) == "torch"  # the same reason again
        assert calls.backend_of(dataclasses.replace(fallback, device="cpu", why="another")) == "torch"


def test_explain_prints_the_plan_and_the_reason(device, capsys):
    x = torch.randn(6, 20, 3, device=device)
    plan = fastrnn.explain(fastrnn.GRU(3, 24, bidirectional=True, backend="resident", device=device), x)
    printed = capsys.readouterr().out
    assert plan.kernel is not None and plan.kernel.programs == 4
    assert "backend resident" in printed and "4 = 2 batch tile(s) of 16 rows x 2 direction(s)" in printed
    plan = fastrnn.explain(fastrnn.SLSTM(3, 24, num_heads=3, backend="resident", device=device), x)
    assert plan.kernel is not None and plan.kernel.programs == 6
    assert "H=24 in 3 heads" in capsys.readouterr().out
    fastrnn.explain(fastrnn.LSTM(3, 24, proj_size=5), x.cpu())
    assert "backend torch\n  why       CPU tensors" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a fastrnn.RNN, GRU, LSTM or SLSTM; got Linear"):
        fastrnn.explain(torch.nn.Linear(3, 3), x)
