"""fastrnn.convert and revert: what is swapped, what is kept, what is left and said, and what is refused."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastrnn

LAYERS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
SWAPPED = ("cooperative", "resident", "reference", "torch", "auto")


class Tagger(nn.Module):
    """A layer in a list, one behind two names, and one with a projection."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleList([nn.GRU(4, 6), nn.Sequential(nn.RNN(6, 6, nonlinearity="relu"))])
        self.shared = nn.LSTM(6, 6)
        self.also_shared = self.shared
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x, _ = self.encoders[0](x)
        x, _ = self.encoders[1](x)
        x, state = self.shared(x)
        x, _ = self.also_shared(x, state)
        return self.head(x)


@pytest.mark.parametrize("subclass", (True, False))
@pytest.mark.parametrize("backend", SWAPPED)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone(name, backend, subclass, device):
    """The model may be the layer: the same object comes back, which computes the same with the kernel asked for."""
    kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True, "device": device}
    layer = LAYERS[name](3, 5, **kwargs)
    x = torch.randn(2, 4, 3, device=device)
    before, _ = layer(x)
    before.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    shown = repr(layer)
    layer.zero_grad()
    assert fastrnn.convert(layer, backend=backend, subclass=subclass) is layer
    assert isinstance(layer, getattr(fastrnn, name)) and layer.backend == backend
    assert repr(layer).startswith(f"fastrnn.{name}(3, 5")
    assert isinstance(layer, LAYERS[name]) == subclass and type(layer).__name__ == name
    after, _ = layer(x)
    after.square().sum().backward()
    torch.testing.assert_close(after, before)
    torch.testing.assert_close([p.grad for p in layer.parameters()], gradients)
    assert fastrnn.revert(layer) is layer and type(layer) is LAYERS[name]
    assert not hasattr(layer, "backend") and repr(layer) == shown
    assert torch.equal(layer(x)[0], before)


def test_kernels_run_after_convert(device, monkeypatch):
    """Nothing else shows that the outputs of a converted model come from a kernel of ours."""
    calls = []
    forward = fastrnn.ops.launch.launch_forward
    monkeypatch.setattr(
        "fastrnn.ops.launch.launch_forward", lambda run, *args: calls.append(run.cell.name) or forward(run, *args)
    )
    model, x = Tagger().to(device), torch.randn(4, 2, 4, device=device)
    before = model(x)
    assert not calls
    fastrnn.convert(model, backend="resident")
    torch.testing.assert_close(model(x), before)
    assert calls == ["gru", "rnn_relu", "lstm", "lstm"]
    fastrnn.revert(model)
    assert torch.equal(model(x), before) and len(calls) == 4


def test_the_objects_are_kept(device):
    """Layers, Parameters, the optimizer's, sharing, mode, state_dict, and gradients that wait to be applied."""
    model = Tagger().to(device).eval()
    model.shared.weight_hh_l0.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers, parameters, state = list(model.modules()), dict(model.named_parameters()), model.state_dict()
    assert fastrnn.convert(model, backend="reference") is model
    for _ in range(2):  # idempotent: the second time meets layers of fastrnn's, which keep their backend
        assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
        assert all(parameters[name] is p for name, p in model.named_parameters())
        assert not any(module.training for module in model.modules())
        assert model.shared is model.also_shared and model.shared.backend == "reference"
        assert list(state) == list(model.state_dict())
        fastrnn.convert(model)
    before = parameters["encoders.0.weight_hh_l0"].detach().clone()
    model(torch.randn(4, 2, 4, device=device)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.encoders[0].weight_hh_l0, before)
    for _ in range(2):
        assert fastrnn.revert(model) is model
        assert [type(m) for m in model.modules() if isinstance(m, nn.RNNBase)] == [nn.GRU, nn.RNN, nn.LSTM]
        assert all(parameters[name] is p for name, p in model.named_parameters())
    model.load_state_dict(state)


def test_hooks_are_kept(device):
    layer = nn.LSTM(3, 5, device=device)
    called = []

    def note(what):
        return lambda *args: called.append(what)

    layer.register_forward_pre_hook(note("pre"))
    layer.register_forward_hook(note("forward"))
    layer.register_full_backward_hook(note("backward"))
    layer.register_state_dict_pre_hook(note("state_dict"))
    layer.register_load_state_dict_post_hook(note("load"))
    layer.weight_hh_l0.register_hook(note("gradient"))
    fastrnn.convert(layer, backend="resident")
    layer(torch.randn(4, 2, 3, device=device, requires_grad=True))[0].sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert sorted(called) == ["backward", "forward", "gradient", "load", "pre", "state_dict"]


@pytest.mark.parametrize("subclass", (True, False))
@pytest.mark.parametrize("backend", ("resident", "auto"))
def test_parametrizations_are_kept(backend, subclass, device):
    layer = parametrizations.weight_norm(nn.GRU(3, 5, device=device), "weight_hh_l0")
    theirs = copy.deepcopy(layer)
    names = list(layer.state_dict())
    fastrnn.convert(layer, backend=backend, subclass=subclass)
    assert isinstance(layer, fastrnn.GRU) and isinstance(layer, nn.GRU) == subclass
    assert parametrize.is_parametrized(layer, "weight_hh_l0") and list(layer.state_dict()) == names
    assert list(fastrnn.report(layer).converted) == [""]
    x = torch.randn(4, 2, 3, device=device)
    for module in (layer, theirs):
        module(x)[0].square().sum().backward()
    for a, b in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    fastrnn.revert(layer)
    assert isinstance(layer, nn.GRU) and parametrize.is_parametrized(layer, "weight_hh_l0")
    assert torch.equal(layer(x)[0], theirs(x)[0])
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.GRU
    fastrnn.convert(parametrizations.weight_norm(layer, "weight_hh_l0"), backend=backend, subclass=subclass)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert isinstance(layer, fastrnn.GRU) and type(fastrnn.revert(layer)) is nn.GRU
    fastrnn.convert(layer, backend=backend, subclass=subclass)
    torch.testing.assert_close(layer(x)[0], theirs(x)[0])


def test_packed_sequences_run_torchs_kernel(device):
    model = nn.ModuleList([nn.LSTM(3, 6, proj_size=2), nn.GRU(3, 6)]).to(device)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        warnings.filterwarnings("ignore", category=fastrnn.FallbackWarning)
        before = [layer(packed)[0].data for layer in model]
        fastrnn.convert(model, backend="torch")
        assert all(torch.equal(layer(packed)[0].data, b) for layer, b in zip(model, before, strict=True))


class Counting(nn.LSTM):
    calls = 0

    def forward(self, *args):
        self.calls += 1
        return super().forward(*args)


def test_what_has_code_of_its_own_is_left_and_named():
    model = nn.ModuleDict(
        {"own": Counting(3, 4), "patched": nn.GRU(3, 4), "cell": nn.GRUCell(3, 4), "rnn": nn.RNN(3, 4)}
    )
    model["patched"].forward = lambda x: x
    assert set(fastrnn.report(model).left) == {"own", "patched", "cell", "rnn"}
    with pytest.warns(fastrnn.FallbackWarning, match="own: Counting is a subclass of LSTM.*patched: its forward was"):
        fastrnn.convert(model)
    assert type(model["own"]) is Counting and type(model["patched"]) is nn.GRU
    report = fastrnn.report(model)
    assert list(report.converted) == ["rnn"] and report.converted["rnn"] is model["rnn"]
    assert set(report.left) == {"own", "patched", "cell"}
    assert "rnn: fastrnn.RNN(3, 4)\nown: left as it is: Counting is a subclass" in str(report)
    parametrizations.weight_norm(model["own"], "weight_hh_l0")  # a class made from Counting, not from nn.LSTM
    with pytest.warns(fastrnn.FallbackWarning, match="own: "):
        fastrnn.convert(model)
    model["own"](torch.randn(2, 1, 3))
    assert model["own"].calls == 1


class Named(nn.LSTM):
    """Has code of its own, of which none has a part in what it computes."""

    gates = 4

    def __init__(self, features):
        super().__init__(features, 2 * features, batch_first=True)

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forget_gate(self):
        return self.weight_hh_l0.chunk(self.gates)[1]


class Twice(Named):
    pass


@pytest.mark.parametrize("backend", ("resident", "auto"))
@pytest.mark.parametrize("cls", (Named, Twice))
def test_subclasses_that_compute_what_torch_nn_does_are_converted(cls, backend, device):
    """What they add goes on working; code that would be lost or run in vain keeps a layer from being converted."""
    layer, x = cls(3).to(device), torch.randn(2, 4, 3, device=device)
    before = layer(x)[0]
    fastrnn.convert(layer, backend=backend)
    assert isinstance(layer, fastrnn.LSTM) and isinstance(layer, cls) and layer.backend == backend
    torch.testing.assert_close(layer(x)[0], before)
    assert layer.forget_gate().shape == (6, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(x)[0], before)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    assert type(fastrnn.revert(layer)).__bases__ == (cls,)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is cls
    with pytest.warns(fastrnn.FallbackWarning, match=f"{cls.__name__} is a subclass of LSTM, which only subclass=True"):
        fastrnn.convert(layer, subclass=False)
    assert type(layer) is cls


@pytest.mark.parametrize("name", ("forward", "__call__", "flatten_parameters", "permute_hidden", "step", "plan"))
def test_a_subclass_with_code_that_would_be_lost_is_left(name):
    cls = type("Own", (nn.LSTM,), {name: lambda self, *args: None})
    with pytest.warns(fastrnn.FallbackWarning, match=f"Own is a subclass of LSTM with its own {name}"):
        fastrnn.convert(nn.Sequential(cls(3, 4)))


@pytest.mark.parametrize("name", LAYERS)
def test_who_asks_for_torch_nns_class_is_answered(name):
    """As people's functions that initialize do, and TorchRL's modules."""

    def init(module):
        if isinstance(module, LAYERS[name]):
            nn.init.constant_(module.weight_hh_l0, 0.5)

    model = fastrnn.convert(nn.Sequential(LAYERS[name](3, 4)), backend="reference")
    assert (model.apply(init)[0].weight_hh_l0 == 0.5).all()
    model = fastrnn.convert(nn.Sequential(LAYERS[name](3, 4)), backend="reference", subclass=False)
    assert not (model.apply(init)[0].weight_hh_l0 == 0.5).any()


def test_revert_leaves_subclasses_of_ours():
    class Mine(fastrnn.LSTM):
        pass

    with pytest.warns(UserWarning, match="the model itself: Mine is a subclass of LSTM"):
        assert type(fastrnn.revert(Mine(3, 4))) is Mine


def test_models_without_recurrent_layers(device):
    model = nn.Linear(2, 2)
    assert fastrnn.convert(model) is model and fastrnn.revert(model) is model
    assert str(fastrnn.report(model)) == "no recurrent layers"


def test_nothing_is_changed_where_convert_refuses():
    model = nn.ModuleDict({"first": nn.GRU(3, 4), "second": nn.LSTM(3, 4)})
    with pytest.raises(ValueError, match="backend: expected one of 'auto'.*got 'fast'"):
        fastrnn.convert(model, backend="fast")
    own = nn.ModuleList([nn.GRU(3, 4), Counting(3, 4)])
    with warnings.catch_warnings(), pytest.raises(fastrnn.FallbackWarning):
        warnings.simplefilter("error")
        fastrnn.convert(own)
    assert [type(m) for m in (*model.values(), *own)] == [nn.GRU, nn.LSTM, nn.GRU, Counting]
    for call in (fastrnn.convert, fastrnn.revert, fastrnn.report):
        with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got list"):
            call([model])


@pytest.mark.parametrize("subclass", (True, False))
@pytest.mark.parametrize("backend", ("resident", "auto"))
def test_converted_models_are_copied_and_pickled(backend, subclass, device):
    model = fastrnn.convert(Tagger().to(device), backend=backend, subclass=subclass)
    x = torch.randn(4, 2, 4, device=device)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.shared is twin.also_shared and twin.shared.backend == backend
        assert type(twin.shared) is type(model.shared)
        assert type(fastrnn.revert(twin).shared) is nn.LSTM
        torch.testing.assert_close(twin(x), model(x))
