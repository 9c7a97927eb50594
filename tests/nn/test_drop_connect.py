"""DropConnect: elements of W_hh dropped in training, the same of one seed in whatever way a call runs."""

import copy
import pickle
import warnings

import pytest
import torch

import fastrnn
from fastrnn.nn import dropout, layers, paths
from fastrnn.stack import Stack

from .test_wavefront import as_wavefront

P = 0.4
BACKENDS = ("auto", "reference", "resident", "cooperative", "torch")
# What a layer is, and the ways it may run in.
LAYERS = {
    "rnn": ("RNN", {}),
    "gru": ("GRU", {"bidirectional": True}),
    "lstm": ("LSTM", {"dropout": 0.5}),
    "heads": ("GRU", {"num_heads": 2}),
    "slstm": ("SLSTM", {"num_heads": 2, "bidirectional": True}),
    "tied": ("LSTM", {"bidirectional": True, "tie_directions": True}),
    "projected": ("LSTM", {"proj_size": 3}),
}
WAYS = ("whole", "chunks", "lengths", "wavefront")


def layer_of(kind: str, device: str, **options) -> torch.nn.Module:
    torch.manual_seed(3)
    name, own = LAYERS[kind]
    return getattr(fastrnn, name)(3, 8, 2, **own, **options).to(device)


def found(run, x: torch.Tensor, params: list, **options) -> list[torch.Tensor]:
    """Output, final states and gradients of what is run with a seed."""
    input = x.clone().requires_grad_()
    torch.manual_seed(7)
    output, final = run(input, **options)
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    gradients = torch.autograd.grad(sum(result.square().sum() for result in results), [input, *params])
    return [*(result.detach() for result in results), *gradients]


def truth(kind: str, x: torch.Tensor, **options) -> list[torch.Tensor]:
    """By the reference, with weights that are dropped here: a layer of two directions, where they are tied."""
    layer, own = layer_of(kind, x.device.type), dict(LAYERS[kind][1])
    tied = own.pop("tie_directions", False)
    plain = getattr(fastrnn, LAYERS[kind][0])(3, 8, 2, backend="reference", **own).to(x.device)
    params = {name: layer.get_parameter(name.removesuffix("_reverse") if tied else name)
              for name, _ in plain.named_parameters()}  # fmt: skip

    def run(input, **options):
        dropped = dict(params)
        for name, W in params.items():
            if name.startswith("weight_hh"):
                kept = torch.empty(W.shape, dtype=torch.bool, device=W.device).bernoulli_(1 - P)
                dropped[name] = torch.where(kept, W / (1 - P), 0)
        return torch.func.functional_call(plain, dropped, (input,), options)

    return found(run, x, list(layer.parameters()), **options)


def check(kind: str, backend: str, way: str, monkeypatch, device: str) -> None:
    chunk = 2 if way == "chunks" else None
    layer = layer_of(kind, device, backend=backend, checkpoint_every=chunk, drop_connect=P)
    if way == "wavefront":
        as_wavefront(monkeypatch, 2)
    x, options = torch.randn(5, 2, 3, device=device), {"lengths": [5, 3]} if way == "lengths" else {}
    result = found(layer, x, list(layer.parameters()), **options)
    torch.testing.assert_close(result, truth(kind, x, **options), rtol=1e-4, atol=1e-5)


def has(kind: str, backend: str, way: str) -> bool:
    """Whether there is such a way. torch's kernels draw dropout between layers by themselves, in another order."""
    name, own = LAYERS[kind]
    by_torch = backend == "torch" or (backend == "auto" and not own.keys() & {"num_heads"})
    if backend == "torch" and (name == "SLSTM" or "num_heads" in own):
        return False
    if way == "wavefront" and ("bidirectional" in own or backend in ("auto", "torch")):
        return False
    return not (by_torch and "dropout" in own)


RUNS = [run for run in ((k, b, w) for k in LAYERS for b in BACKENDS for w in WAYS) if has(*run)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "backend", "way"), RUNS)
def test_every_way_drops_the_same(kind, backend, way, monkeypatch, device):
    check(kind, backend, way, monkeypatch, device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_dtypes_drop_the_same(dtype, device):
    """A mask does not depend on the dtype of what it drops."""
    layer = layer_of("gru", device, backend="reference", drop_connect=P)
    x = torch.randn(5, 2, 3, device=device)
    torch.manual_seed(7)
    expected = layer(x)[0]
    torch.manual_seed(7)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype))[0].float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", (0.25, 0.8, 1.0))
def test_rate_and_scale(p, device):
    """With weights of one the gradient of each is that of a kept one, scaled, or zero."""
    layer = fastrnn.RNN(1, 64, bias=False, nonlinearity="relu", backend="reference", drop_connect=p, device=device)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(1.0)
    output, _ = layer(torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, 64, device=device))
    (gradient,) = torch.autograd.grad(output.sum(), layer.weight_hh_l0)
    kept = gradient != 0
    share, spread = 1 - p, 5 * (p * (1 - p) / 64**2) ** 0.5  # five sigma
    assert abs(kept.float().mean().item() - share) <= spread
    torch.testing.assert_close(gradient, kept / (share or 1.0))
    torch.testing.assert_close(output[0, 0], gradient.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_evaluation(backend, device):
    """Nor with p = 0: the results of a layer without, and no random number is drawn."""
    x = torch.randn(5, 2, 3, device=device)
    plain = layer_of("gru", device, backend=backend)
    for layer in (layer_of("gru", device, backend=backend, drop_connect=P).eval(),
                  layer_of("gru", device, backend=backend, drop_connect=0.0)):  # fmt: skip
        before = torch.get_rng_state()
        assert torch.equal(layer(x)[0], plain(x)[0]) and torch.equal(torch.get_rng_state(), before)
    layer = layer_of("gru", device, backend=backend, drop_connect=P)
    assert not torch.allclose(layer(x)[0], plain(x)[0]) and not torch.allclose(layer(x)[0], layer(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", ("rnn", "gru", "slstm", "projected"))
def test_functions_do_as_modules(kind, device):
    layer, x = layer_of(kind, device, drop_connect=P), torch.randn(5, 2, 3, device=device)
    options = {key: value for key, value in LAYERS[kind][1].items() if key != "proj_size"}
    run = getattr(fastrnn, LAYERS[kind][0].lower())
    for training in (True, False):
        torch.manual_seed(1)
        expected = layer.train(training)(x)[0]
        torch.manual_seed(1)
        params = list(layer.parameters())
        output = run(x, None, params, num_layers=2, drop_connect=P, training=training, **options)[0]
        assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_a_step_has_a_mask_of_its_own(backend, device):
    layer, x = layer_of("lstm", device, backend=backend, drop_connect=P).train(), torch.randn(2, 3, device=device)
    layer.dropout, state = 0.0, tuple(torch.randn(2, 2, 8, device=device) for _ in range(2))
    torch.manual_seed(1)
    output, _ = layer.step(x, state)
    torch.manual_seed(1)
    assert torch.equal(output, layer(x[None], state)[0][0])
    assert not torch.allclose(output, layer.step(x, state)[0])
    torch.testing.assert_close(layer.eval().step(x, state)[0], layer(x[None], state)[0][0])


def test_compiled_whole(device):
    torch._dynamo.reset()
    layer = layer_of("gru", device, backend="resident", drop_connect=P)
    x = torch.randn(4, 2, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it looks through functools.cache
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        results = [found(run, x, list(layer.parameters())) for run in (compiled, layer)]
    torch.testing.assert_close(*results)


def test_copies_and_what_torch_has_not(device):
    layer = layer_of("gru", device, drop_connect=P)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.drop_connect == P and f"drop_connect={P}" in repr(other)
    model = torch.nn.Sequential(layer)
    with pytest.warns(UserWarning, match="left as they are"):
        assert type(fastrnn.revert(model)[0]) is fastrnn.GRU
    older = fastrnn.GRU(3, 8)
    del older.drop_connect  # of one that was pickled before there was any
    assert older(torch.zeros(2, 1, 3))[0].shape == (2, 1, 8) and "drop_connect" not in repr(older)


@pytest.mark.parametrize("wrong", (-0.1, 1.5, float("nan"), True, "1", None))
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(ValueError, match="drop_connect: expected a number from 0 to 1, got "):
        fastrnn.GRU(3, 8, drop_connect=wrong)
    params = list(fastrnn.GRU(3, 8).parameters())
    for training in (True, False):
        with pytest.raises(ValueError, match="drop_connect: expected a number from 0 to 1, got "):
            fastrnn.gru(torch.zeros(1, 1, 3), None, params, drop_connect=wrong, training=training)


def test_nothing_is_drawn_for_a_call_that_is_refused():
    layer, before = fastrnn.GRU(3, 8, drop_connect=P), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.zeros(2, 1, 4))
    assert torch.equal(torch.get_rng_state(), before)


# What is broken: in which function, which text, by what, and a run that shows it.
MUTATIONS = {
    "not scaled": (
        "dropout.drop_connections", "drop(params[i], drop_mask(params[i], p), p)",
        "params[i] * drop_mask(params[i], p)", "rnn"),
    "of the first layer only": (
        "dropout.drop_connections", "range(1, len(params), count)", "range(1, count, count)", "rnn"),
    "W_ih too": ("dropout.drop_connections", "range(1, len(params), count)", "range(0, len(params), 2)", "rnn"),
    "of the first direction only": (
        "dropout.drop_connections", "stack.num_layers * stack.directions", "stack.num_layers", "tied"),
    "no gradient": ("dropout.drop_connections", "drop(params[i],", "drop(params[i].detach(),", "rnn"),
    "not the first that is drawn": (
        "paths.run", "stack, params = drop", "torch.rand(1); stack, params = drop", "heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_noticed(name, mutate, monkeypatch, device):
    function, old, new, kind = MUTATIONS[name]
    check(kind, "reference", "whole", monkeypatch, device)
    mutate({f"fastrnn.nn.{function}": (old, new)})
    monkeypatch.setattr(paths, "drop_connections", dropout.drop_connections)
    with pytest.raises((AssertionError, RuntimeError)):
        check(kind, "reference", "whole", monkeypatch, device)


def test_masks_drawn_for_each_use_are_noticed(monkeypatch, device):
    """A mutant: chunks that do not share a mask."""
    x, of_all = torch.randn(5, 2, 3, device=device), layers.weights_of
    expected = truth("rnn", x)

    def by_use(params, dtype, chunked):
        weights, own = of_all(params, dtype, chunked), Stack("rnn_tanh", drop_connect=P)
        return lambda: dropout.drop_connections(own, weights())[1]

    monkeypatch.setattr(paths, "drop_connections", lambda stack, params: (stack, params))
    monkeypatch.setattr(layers, "weights_of", by_use)
    outputs = []
    for chunk in (None, 2):
        layer = layer_of("rnn", device, backend="reference", checkpoint_every=chunk, drop_connect=P)
        outputs.append(found(layer, x, list(layer.parameters()))[0])
    torch.testing.assert_close(outputs[0], expected[0])
    assert not torch.allclose(outputs[1], expected[0])


def test_dropping_in_evaluation_is_noticed(monkeypatch, device):
    monkeypatch.setattr(Stack, "drops_connections", property(lambda self: bool(self.drop_connect)))
    with pytest.raises(AssertionError):
        test_nothing_in_evaluation("reference", device)
