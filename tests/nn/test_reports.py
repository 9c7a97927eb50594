"""Kinds of input that people reported of recurrent layers elsewhere: under autocast, traced, batched, and with NaN."""

import re

import pytest
import torch
from torch.func import functional_call, grad, vmap

import fastrnn

from .test_modules import NAMES, flat

BACKENDS = ("auto", "reference", "resident", "cooperative")
NAN = float("nan")


def made(name: str, backend: str, device: str, **kwargs) -> torch.nn.Module:
    return getattr(fastrnn, name)(3, 6, backend=backend, device=device, **kwargs)


def state(module: torch.nn.Module, B: int, dtype: torch.dtype = torch.float32):
    """Random first states that take gradients, as hx."""
    D = 2 if module.bidirectional else 1
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)[: 2 if module.mode == "LSTM" else 1]
    device = module.weight_hh_l0.device
    given = [torch.randn(module.num_layers * D, B, H, dtype=dtype, device=device).requires_grad_() for H in sizes]
    return tuple(given) if len(given) == 2 else given[0]


# Autocast


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_after_another_layer(name, backend, dtype, device):
    """The input has autocast's dtype already, which results then have; gradients of parameters are fp32."""
    module, x = made(name, backend, device, num_layers=2), torch.randn(5, 2, 3, device=device).to(dtype)
    for options in ({}, {"lengths": [5, 2]}, {"reset": [[False, True]] * 5}):
        with torch.autocast(device, dtype):
            output, final = module(x, **options)
        assert output.dtype == dtype
        for found, exact in zip(flat(output, final), flat(*module(x.float(), **options)), strict=True):
            torch.testing.assert_close(found.float(), exact, rtol=0.03, atol=0.03)
        output.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_and_what_is_no_float(backend, device):
    module = made("GRU", backend, device)
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(ValueError, match="RNN input dtype"):
                module(torch.ones(5, 2, 3, dtype=dtype, device=device), lengths=[5, 2])


# Values that are not known yet


@pytest.mark.parametrize("kind", ("lengths", "cu_seqlens"))
def test_one_graph_serves_every_length(kind, device):
    """No text, and no branch, may hold T: a graph would serve it alone, and torch.compile make one for each."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(made("GRU", "resident", device), backend=graphs, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for T in range(5, 15):
            if kind == "lengths":
                compiled(torch.randn(T, 2, 3, device=device), lengths=torch.tensor([T, 2], device=device))
            else:
                compiled(torch.randn(T, 3, device=device), cu_seqlens=torch.tensor([0, 2, T], device=device))
    assert graphs.frame_count == 1


class Shorter(torch.nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.layer = made("GRU", "resident", device).requires_grad_(False)

    def forward(self, x, lengths):
        return self.layer(x, lengths=lengths)[0]


@pytest.mark.parametrize("strict", (False, True))
def test_export_of_dynamic_time_with_lengths(strict, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")  # torch 2.13's export wants its default
    model, lengths = Shorter(device), torch.tensor([6, 0], device=device)
    times = {0: torch.export.Dim("T", min=2, max=64)}
    exported = torch.export.export(
        model, (torch.randn(6, 2, 3, device=device), lengths), dynamic_shapes=(times, None), strict=strict
    ).module()
    x = torch.randn(9, 2, 3, device=device)
    torch.testing.assert_close(exported(x, lengths + 3), model(x, lengths + 3))
    if device == "cpu":  # on a GPU a failed assertion takes the device's context with it
        with pytest.raises(RuntimeError, match="lengths: expected 0 to T"):
            exported(x, lengths + 4)


@pytest.mark.parametrize("backend", ("reference", "resident"))
@pytest.mark.parametrize("kind", ("lengths", "cu_seqlens", "reset"))
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_grad_where_each_call_has_its_own(kind, backend, device):
    module = made("LSTM", backend, device, proj_size=2, bidirectional=True)
    params = dict(module.named_parameters())
    x = torch.randn(2, *((6,) if kind == "cu_seqlens" else (5, 2)), 3, device=device)
    given = {
        "lengths": torch.tensor([[5, 3], [0, 2]]),
        "cu_seqlens": torch.tensor([[0, 2, 6], [0, 0, 6]]),
        "reset": torch.rand(2, 5, 2) < 0.4,
    }[kind].to(device)

    def loss(params, x, given):
        return functional_call(module, params, (x,), {kind: given})[0].sin().sum()

    found = vmap(grad(loss), (None, 0, 0))(params, x, given)
    truth = [grad(loss)(params, x[n], given[n]) for n in range(2)]
    for name in params:
        torch.testing.assert_close(found[name], torch.stack([of_one[name] for of_one in truth]))
    if kind == "lengths" and device == "cpu":
        with pytest.raises(ValueError, match=re.escape("lengths: expected 0 to T=5; got [[6, 4], [1, 3]]")):
            vmap(grad(loss), (None, 0, 0))(params, x, given + 1)


# NaN


def gradients(module, x, hx, dy=None, **options):
    """Output, final states and all gradients by name; upstream gradients are ones, or dy for the output."""
    x = x.clone().requires_grad_()
    output, final = module(x, hx, **options)
    outputs = flat(output, final)
    upstream = [torch.ones_like(o) for o in outputs]
    upstream[0] = upstream[0] if dy is None else dy
    named = {"x": x, **dict(module.named_parameters())}
    named |= {f"hx[{i}]": h for i, h in enumerate(hx if isinstance(hx, tuple) else (hx,))}
    found = torch.autograd.grad(outputs, list(named.values()), upstream)
    outputs = {f"output[{i}]": o.detach() for i, o in enumerate(outputs)}
    return outputs | {f"d_{n}": g for n, g in zip(named, found, strict=True)}


PLACES = ("input", "last step of a short row", "hx of an empty row", "gradient of output", "gradient of padding")


@pytest.mark.parametrize("backend", ("reference", "resident", "cooperative"))
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    (("RNN", {"nonlinearity": "relu", "bidirectional": True}), ("GRU", {}), ("LSTM", {"proj_size": 2})),
    ids=("relu", "gru", "projected lstm"),
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_nan_goes_where_torchs_kernels_take_it(name, kwargs, place, backend, device):
    """Not less far, so that anomaly mode and GradScaler see it, and no further."""
    ours, theirs = made(name, backend, device, **kwargs), made(name, "torch", device, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    x, hx = torch.randn(5, 3, 3, device=device), state(ours, 3)
    dy, options = torch.ones_like(ours(x)[0]), {"lengths": [5, 3, 0]}
    with torch.no_grad():
        if place == "input":
            x[2, 1, 0], options = NAN, {}
        elif place == "last step of a short row":
            x[2, 1, 0] = NAN
        elif place == "hx of an empty row":
            (hx[0] if isinstance(hx, tuple) else hx)[:, 2] = NAN
        elif place == "gradient of output":
            dy[3, 0], options = NAN, {}
        else:
            dy[3, 1] = dy[1, 2] = NAN
    found, truth = gradients(ours, x, hx, dy, **options), gradients(theirs, x, hx, dy, **options)
    assert any(t.isnan().any() for t in truth.values()) == (place != "gradient of padding")
    assert {n: int(t.isnan().sum()) for n, t in found.items()} == {n: int(t.isnan().sum()) for n, t in truth.items()}
    for which in truth:
        torch.testing.assert_close(found[which], truth[which], rtol=1e-3, atol=1e-3, equal_nan=True)


def test_a_report_has_the_slstm_which_torch_lacks():
    """Without it print(report) said that there is no recurrent layer, and revert left it without a word."""
    model = torch.nn.Sequential(fastrnn.SLSTM(8, 16))
    assert str(fastrnn.report(model)) == "0: fastrnn.SLSTM(8, 16)"
    with pytest.warns(fastrnn.FallbackWarning, match="torch has no sLSTM"):
        fastrnn.revert(model)
    assert type(model[0]) is fastrnn.SLSTM
