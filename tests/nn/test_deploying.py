"""A model on its way out of Python: traced, exported, symbolically traced, scripted and quantized, as torch.nn's is."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import fastrnn

NAMES = ("LSTM", "GRU", "RNN")
BACKENDS = ("auto", "torch", "reference", "resident", "cooperative")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:torch.quantize_per_tensor"
)


class Tagger(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self, layer):
        super().__init__()
        self.below, self.layer, self.above = nn.Linear(4, 4), layer, nn.Linear(6, 2)

    def forward(self, x):
        return self.above(self.layer(self.below(x))[0])


def made(name: str, how: str = "ours", **options) -> nn.Module:
    """A model with our layer, made or converted, or with torch.nn's."""
    if how == "ours":
        return Tagger(getattr(fastrnn, name)(4, 6, **options)).eval()
    model = Tagger(getattr(nn, name)(4, 6)).eval()
    return fastrnn.convert(model, subclass=how == "subclass", **options) if how != "torch" else model


@pytest.mark.parametrize("kind", ("plain", "lengths", "reset", "cell states", "checkpoints"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_jit_trace(name, backend, kind, device):
    """Traced for one batch it runs another; by kernels another length too."""
    if kind == "cell states" and name != "LSTM":
        pytest.skip("has no cell states")
    layer = getattr(fastrnn, name)(4, 6, backend=backend, checkpoint_every=2 if kind == "checkpoints" else None)
    layer = layer.to(device).requires_grad_(False)

    def call(x):
        lengths = torch.full((x.shape[1],), 3, device=device) if kind == "lengths" else None
        reset = x[..., 0] > 0 if kind == "reset" else None
        y, state, *c = layer(x, lengths=lengths, reset=reset, return_cell_states=kind == "cell states")
        return y, *(state if name == "LSTM" else (state,)), *c

    traced = torch.jit.trace(call, torch.randn(5, 3, 4, device=device), check_trace=False)
    same_batch = backend in ("auto", "torch") and kind in ("lengths", "reset", "cell states")  # cut by values
    same_time = kind == "checkpoints" or backend not in ("resident", "cooperative") or kind != "plain"
    x = torch.randn(5 if same_time else 7, 3 if same_batch else 2, 4, device=device)
    if same_batch and kind == "reset":
        torch.manual_seed(1)
        traced = torch.jit.trace(call, x, check_trace=False)
    for found, expected in zip(traced(x), call(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_jit_trace_of_what_trains(name, backend, device):
    """With the check that torch.jit.trace makes of itself by default, saved, loaded, and then trained."""
    layer, x = getattr(fastrnn, name)(4, 6, backend=backend, device=device), torch.randn(5, 3, 4, device=device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for module in (loaded, layer):
        module(x)[0].square().sum().backward()
    for own, expected in zip(loaded.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x)[0], layer(x)[0])


def test_onnx_of_a_kernel_says_what_to_do(tmp_path):
    """The exporter itself would print the whole graph and name an op."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    model, x = made("GRU", backend="resident"), torch.randn(5, 3, 4)
    with pytest.raises(NotImplementedError, match=r"^ONNX has no operator .*: export fastrnn.revert\(model\)$"):
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)


def test_fx_of_a_layer_alone_says_what_to_do():
    with pytest.raises(NotImplementedError, match="^torch.fx cannot trace .* itself: trace the module that has it$"):
        torch.fx.symbolic_trace(fastrnn.GRU(4, 6))


@pytest.mark.parametrize("name", NAMES)
def test_options_may_be_given_by_place(name, device):
    """torch.onnx.export gives all that a signature has, with their defaults."""
    layer, x = getattr(fastrnn, name)(4, 6).to(device), torch.randn(5, 3, 4, device=device)
    assert torch.equal(layer(x, None, None, None, None, None, torch.tensor(False))[0], layer(x)[0])


@pytest.fixture
def default_precision(monkeypatch):
    """torch 2.13's export fails where fp32_precision of RNNs is not the default, as conftest.py sets it."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("dynamo", (False, True))
@pytest.mark.parametrize("how", ("ours", "subclass", "layer"))
@pytest.mark.parametrize("name", NAMES)
def test_onnx(name, how, dynamo, tmp_path):
    """Both exporters write what they write of torch.nn's layer, alone or inside a model."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, x = made(name, "ours" if how == "layer" else how), torch.randn(5, 3, 4)
    model = model.layer if how == "layer" else model
    theirs = fastrnn.revert(copy.deepcopy(model))
    written = []
    for one in (model, theirs):
        file = tmp_path / f"{len(written)}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(one, (x,), file, dynamo=dynamo, **({"verbose": False} if dynamo else {}))
        written.append([node.op_type for node in onnx.load(file).graph.node])
    assert written[0] == written[1] and (dynamo or name in written[0])


@pytest.mark.parametrize("how", ("ours", "subclass", "converted"))
@pytest.mark.parametrize("name", NAMES)
def test_fx_takes_a_layer_as_a_leaf(name, how, device):
    model, x = made(name, how, backend="reference").to(device), torch.randn(5, 3, 4, device=device)
    traced = torch.fx.symbolic_trace(model)
    nodes = [node for node in traced.graph.nodes if node.target == "layer"]
    assert [node.op for node in nodes] == ["call_module"] and traced.layer is not None
    assert isinstance(traced.layer, getattr(fastrnn, name))
    torch.testing.assert_close(traced(x), model(x))
    again = torch.fx.symbolic_trace(traced)  # what comes of it is traced again by some tools
    torch.testing.assert_close(again(x[:3]), model(x[:3]))


@pytest.mark.parametrize("name", NAMES)
def test_fx_keeps_the_options_of_a_call(name, device):
    layer = getattr(fastrnn, name)(4, 6).to(device)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, state, lengths):
            return self.layer(x, state, lengths=lengths)[0]

    x, h = torch.randn(5, 2, 4, device=device), torch.randn(1, 2, 6, device=device)
    given = (x, (h, h) if name == "LSTM" else h, torch.tensor([5, 3]))
    torch.testing.assert_close(torch.fx.symbolic_trace(Model())(*given), Model()(*given))


@pytest.mark.parametrize("name", ("lstm", "gru", "rnn"))
def test_fx_takes_a_function_as_a_leaf(name, device):
    function, layer = getattr(fastrnn, name), getattr(nn, name.upper())(4, 6).to(device)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return function(x * 2, None, [getattr(self.layer, n) for n, _ in layer.named_parameters()], training=False)[
                0
            ]

    traced, x = torch.fx.symbolic_trace(Model()), torch.randn(5, 2, 4, device=device)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"][1] is function
    torch.testing.assert_close(traced(x), layer(x * 2)[0])


@pytest.mark.parametrize("how", ("ours", "subclass", "converted"))
@pytest.mark.parametrize("name", NAMES)
def test_jit_script_says_what_to_do(name, how):
    model, x = made(name, how), torch.randn(5, 3, 4)
    before = model(x)
    with pytest.raises(NotImplementedError, match=rf"^torch.jit.script cannot .*fastrnn.{name}: .*revert\(model\).*$"):
        torch.jit.script(model)
    assert isinstance(model.layer, getattr(fastrnn, name))
    torch.testing.assert_close(torch.jit.script(fastrnn.revert(model))(x), before)


def quantized(model: nn.Module, spec: object) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, spec)


@pytest.mark.skipif(
    not {"fbgemm", "qnnpack", "x86", "onednn"} & {*torch.backends.quantized.supported_engines},
    reason="torch has no quantized products here",
)
@pytest.mark.parametrize("spec", ("class", "name", "default", "others"))
@pytest.mark.parametrize("how", ("ours", "subclass", "converted"))
@pytest.mark.parametrize("name", NAMES)
def test_dynamic_quantization(name, how, spec):
    """What becomes of torch.nn's layer becomes of ours; the model that was given keeps its own."""
    wanted = {
        "class": {getattr(nn, name)},
        "name": {"layer": torch.ao.quantization.default_dynamic_qconfig},
        "default": None,
        "others": {nn.Linear},
    }[spec]
    model, x = made(name, how), torch.randn(5, 3, 4)
    ours, theirs = (quantized(m, wanted) for m in (model, fastrnn.revert(copy.deepcopy(model))))
    assert isinstance(model.layer, getattr(fastrnn, name)) and not hasattr(model.layer, "qconfig")
    if type(theirs.layer) is getattr(nn, name):  # torch.nn.RNN, and what was not asked for
        assert name == "RNN" or spec == "others"
    else:
        assert type(ours.layer) is type(theirs.layer)
        assert type(ours.layer).__module__ == "torch.ao.nn.quantized.dynamic.modules.rnn"
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_converted_layers_class_makes_layers():
    """Some libraries make a layer like another by its class."""
    layer = fastrnn.convert(nn.LSTM(4, 6), backend="reference")
    twin = type(layer)(4, 6, num_layers=2)
    assert isinstance(twin, nn.LSTM) and twin.backend == "auto" and twin(torch.randn(5, 2, 4))[0].shape == (5, 2, 6)
