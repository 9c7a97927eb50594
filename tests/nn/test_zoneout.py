"""Zoneout of layers: by its definition, and the same of one seed in whatever way a call runs."""

import copy
import pickle
import warnings

import pytest
import torch

import fastrnn
from fastrnn import noise
from fastrnn.nn import dropout, paths

from .test_wavefront import as_wavefront

P = 0.4
BACKENDS = ("reference", "resident", "cooperative")
LAYERS = {
    "rnn": ("RNN", {}),
    "gru": ("GRU", {"bidirectional": True}),
    "lstm": ("LSTM", {"dropout": 0.5}),
    "heads": ("GRU", {"num_heads": 2, "drop_connect": 0.3}),
    "slstm": ("SLSTM", {"num_heads": 2, "bidirectional": True}),
    "tied": ("LSTM", {"bidirectional": True, "tie_directions": True}),
}
WAYS = {
    "whole": {},
    "chunks": {},
    "wavefront": {},
    "lengths": {"lengths": [5, 3]},
    "resets": {"reset": [[False, False], [True, False], [False, False], [False, True], [True, True]]},
    "ragged": {"cu_seqlens": [0, 5, 8]},
}


def layer_of(kind: str, device: str, **options) -> torch.nn.Module:
    torch.manual_seed(3)
    name, own = LAYERS[kind]
    return getattr(fastrnn, name)(3, 8, 2, **({"zoneout": P} | own | options)).to(device)


def found(layer: torch.nn.Module, x: torch.Tensor, **options) -> list[torch.Tensor]:
    """Output, final states and gradients of a call with a seed."""
    input = x.clone().requires_grad_()
    torch.manual_seed(7)
    output, final = layer(input, **options)
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    gradients = torch.autograd.grad(sum(result.square().sum() for result in results), [input, *layer.parameters()])
    return [*(result.detach() for result in results), *gradients]


def check(kind: str, backend: str, way: str, training: bool, monkeypatch, device: str) -> None:
    x = torch.randn(*((8,) if way == "ragged" else (5, 2)), 3, device=device)
    expected = found(layer_of(kind, device, backend="reference").train(training), x, **WAYS[way])
    if way == "wavefront":
        as_wavefront(monkeypatch, 2)
    layer = layer_of(kind, device, backend=backend, checkpoint_every=2 if way == "chunks" else None).train(training)
    torch.testing.assert_close(found(layer, x, **WAYS[way]), expected, rtol=1e-4, atol=1e-5)


# A wavefront is of layers of one direction.
RUNS = [(kind, way) for kind in LAYERS for way in WAYS if way != "wavefront" or "bidirectional" not in LAYERS[kind][1]]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "way"), RUNS)
def test_every_way_keeps_the_same(kind, way, backend, training, monkeypatch, device):
    check(kind, backend, way, training, monkeypatch, device)


def by_definition(layer: torch.nn.Module, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """y of a layer of one direction, step by step."""
    cell, B, y = layer._stack().of_cell, x.shape[1], []
    state = tuple(x.new_zeros(B, 8) for _ in cell.states)
    for t, x_t in enumerate(x):
        gates = torch.nn.functional.linear(x_t, layer.weight_ih_l0, layer.bias_ih_l0).view(B, cell.gates, 8)
        rec = torch.nn.functional.linear(state[0], layer.weight_hh_l0, layer.bias_hh_l0).view_as(gates)
        after = cell.step(gates, rec, state)
        if layer.training:
            slots, units = t * B + torch.arange(B, device=x.device), torch.arange(8, device=x.device)
            mask = ~noise.stays(numbers, P, slots[:, None], units[None])[:, 0]
        else:
            mask = 1 - P
        state = state[0] + mask * (after[0] - state[0]), *after[1:]
        y.append(state[0])
    return torch.stack(y)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("backend", ("reference", "resident"))
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN", "SLSTM"))
def test_by_its_definition(name, backend, training, device):
    layer = getattr(fastrnn, name)(3, 8, zoneout=P, backend=backend).to(device).train(training)
    x = torch.randn(6, 2, 3, device=device)
    torch.manual_seed(1)
    (numbers,) = noise.draw(1, 1, x.device)
    torch.manual_seed(1)
    results = layer(x)[0], by_definition(layer, x, numbers)
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in results]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ("auto", *BACKENDS))
def test_seeds_and_what_draws_none(backend, device):
    layer, x = layer_of("gru", device, backend=backend), torch.randn(5, 2, 3, device=device)
    first = found(layer, x)[0]
    assert torch.equal(found(layer, x)[0], first) and not torch.allclose(layer(x)[0], first)
    for quiet in (layer.eval(), layer_of("gru", device, backend=backend, zoneout=0.0)):
        before = torch.get_rng_state()
        assert not torch.allclose(quiet(x)[0], first) and torch.equal(torch.get_rng_state(), before)
    whole, h_0 = layer_of("gru", device, backend=backend, zoneout=1.0), torch.randn(4, 2, 8, device=device)
    for training in (True, False):
        output, h_n = whole.train(training)(x, h_0)
        torch.testing.assert_close(h_n, h_0)
        torch.testing.assert_close(output, h_0[2:].transpose(0, 1).flatten(1).expand(5, -1, -1))


@pytest.mark.parametrize("training", (True, False))
def test_second_derivatives(training, device):
    results, x = [], torch.randn(4, 2, 3, device=device)
    for backend in ("reference", "resident"):
        layer = layer_of("gru", device, backend=backend).train(training)
        input = x.clone().requires_grad_()
        torch.manual_seed(7)
        (first,) = torch.autograd.grad(layer(input)[0].square().sum(), input, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [input, *layer.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_gradients_of_each_sample(device):
    """Of calls that torch.vmap makes at once: their places are those of their own batches."""
    x, results = torch.randn(3, 4, 2, 3, device=device), []
    for backend in ("reference", "resident"):
        layer = layer_of("rnn", device, backend=backend)
        params = dict(layer.named_parameters())

        def loss(params, x, layer=layer):
            return torch.func.functional_call(layer, params, (x,))[0].square().sum()

        torch.manual_seed(7)
        results.append(torch.vmap(torch.func.grad(loss), (None, 0), randomness="same")(params, x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_compiled_whole(device):
    torch._dynamo.reset()
    layer, x = layer_of("gru", device, backend="resident"), torch.randn(4, 2, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it looks through functools.cache
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        results = [found(run, x) for run in (compiled, layer)]
    torch.testing.assert_close(*results)


def test_copies_and_what_torch_has_not(device):
    layer = layer_of("gru", device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.zoneout == P and f"zoneout={P}" in repr(other)
    with pytest.warns(UserWarning, match="left as they are"):
        assert type(fastrnn.revert(torch.nn.Sequential(layer))[0]) is fastrnn.GRU
    older = fastrnn.GRU(3, 8)
    del older.zoneout  # of one that was pickled before there was any
    assert older(torch.zeros(2, 1, 3))[0].shape == (2, 1, 8) and "zoneout" not in repr(older)
    layer.backend = "torch"
    with pytest.raises(NotImplementedError, match="backend='torch': torch has no kernel with zoneout"):
        layer(torch.zeros(2, 1, 3, device=device))
    with pytest.raises(NotImplementedError, match=r"zoneout with a projection \(proj_size\) is missing"):
        fastrnn.LSTM(3, 8, proj_size=2, zoneout=P)
    params = list(fastrnn.LSTM(3, 8, proj_size=2).parameters())
    with pytest.raises(NotImplementedError, match=r"zoneout with a projection \(proj_size\) is missing"):
        fastrnn.lstm(torch.zeros(2, 1, 3), None, params, zoneout=P)


@pytest.mark.parametrize("kind", ("rnn", "gru", "slstm"))
def test_functions_and_steps_do_as_modules(kind, device):
    layer, x = layer_of(kind, device), torch.randn(5, 2, 3, device=device)
    torch.manual_seed(7)
    run, params = getattr(fastrnn, LAYERS[kind][0].lower()), list(layer.parameters())
    output = run(x, None, params, num_layers=2, training=True, zoneout=P, **LAYERS[kind][1])[0]
    assert torch.equal(output, found(layer, x)[0])
    if not layer.bidirectional:
        torch.manual_seed(7)
        assert torch.equal(layer.step(x[0])[0], found(layer, x[:1])[0][0])


@pytest.mark.parametrize("wrong", (-0.1, 1.5, float("nan"), True, "1", None))
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(ValueError, match="zoneout: expected a number from 0 to 1, got "):
        fastrnn.GRU(3, 8, zoneout=wrong)
    with pytest.raises(ValueError, match="zoneout: expected a number from 0 to 1, got "):
        fastrnn.gru(torch.zeros(1, 1, 3), None, list(fastrnn.GRU(3, 8).parameters()), zoneout=wrong)
    layer, before = fastrnn.GRU(3, 8, zoneout=P), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.zeros(2, 1, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ("rnn", "gru"))
def test_chunks_that_begin_at_the_first_slot_are_noticed(kind, monkeypatch, device):
    monkeypatch.setattr(dropout, "of_times", lambda noise, starts: noise)
    with pytest.raises(AssertionError):
        check(kind, "reference", "chunks", True, monkeypatch, device)


def test_layers_of_one_seed_are_noticed(monkeypatch, device):
    layer, x = layer_of("rnn", device, backend="reference"), torch.randn(5, 2, 3, device=device)
    right = found(layer, x)[0]
    draw = paths.draw
    monkeypatch.setattr(paths, "draw", lambda layers, *others: draw(1, *others) * layers)
    assert not torch.allclose(found(layer, x)[0], right)
