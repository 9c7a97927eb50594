"""proj_size against torch.nn.LSTM's: on every backend, bidirectional, stacked, in chunks, as a wavefront."""

import functools

import pytest
import torch

import fastrnn
from fastrnn.nn import projection

from .test_modules import compare, flat, pair
from .test_wavefront import as_wavefront

KERNELS = ("resident", "cooperative")
ALL = ("auto", "torch", "reference", *KERNELS)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def state(layers: int, *batch: int, device: str):
    return torch.randn(layers, *batch, 3, device=device), torch.randn(layers, *batch, 8, device=device)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("checkpoint_every", (None, 2))
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "kwargs",
    ({}, {"bidirectional": True, "num_layers": 2, "batch_first": True, "bias": False}),
    ids=("plain", "bidirectional-stacked-batch_first-no-bias"),
)
def test_equals_torch_nn(kwargs, backend, checkpoint_every, device):
    """Outputs, states and gradients, from zeros and from a state."""
    ours, theirs = pair("LSTM", device, backend, 5, 8, proj_size=3, **kwargs)
    ours.checkpoint_every = checkpoint_every
    x = torch.randn((2, 5, 5) if kwargs else (5, 2, 5), device=device)
    compare(ours, theirs, x)
    compare(ours, theirs, x, state(4 if kwargs else 1, 2, device=device))


@pytest.mark.parametrize("backend", ("reference", "resident"))
def test_unbatched_input_and_empty_batch(backend, device):
    ours, theirs = pair("LSTM", device, backend, 5, 8, proj_size=3)
    compare(ours, theirs, torch.randn(4, 5, device=device), state(1, device=device))
    compare(ours, theirs, torch.randn(4, 0, 5, device=device), state(1, 0, device=device))


def gradients(module, x, hx):
    """Outputs, states, and gradients of input, states and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *hx)]
    outputs = flat(*module(leaves[0], tuple(leaves[1:])))
    torch.manual_seed(1)
    upstream = [torch.randn_like(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], upstream)]


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bits(backend, dtype, device):
    """Inside twice the error that torch's own kernel makes against fp64, and a few ulps of the largest element."""
    kwargs = {"proj_size": 3, "bidirectional": True, "dtype": dtype, "device": device}
    torch.manual_seed(0)
    ours, theirs = fastrnn.LSTM(5, 8, backend=backend, **kwargs), torch.nn.LSTM(5, 8, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    exact = torch.nn.LSTM(5, 8, **(kwargs | {"dtype": torch.float64}))
    exact.load_state_dict(ours.state_dict())
    x, hx = torch.randn(6, 2, 5).to(device, dtype), tuple(s.to(dtype) for s in state(2, 2, device=device))
    truth = gradients(exact, x.double(), tuple(s.double() for s in hx))
    for found, same, true in zip(gradients(ours, x, hx), gradients(theirs, x, hx), truth, strict=True):
        assert found.dtype == dtype
        allowed = 2 * (same - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (found - true).abs().max() <= allowed


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("hx", (True, False))
def test_chunks_have_the_bits_of_the_plain_run(hx, dtype, device):
    """Where the input's product is exact: between chunks goes m, in fp32, and not the h that is made of it."""
    module = fastrnn.LSTM(4, 8, proj_size=3, bidirectional=True, backend="resident", dtype=dtype, device=device)
    with torch.no_grad():
        for weight in (module.weight_ih_l0, module.weight_ih_l0_reverse):
            weight.copy_(torch.eye(4).repeat(8, 1))
    x = torch.randn(7, 2, 4).to(device, dtype)
    h = torch.nn.functional.one_hot(torch.tensor([[0, 1], [2, 0]], device=device), 3)  # W_hh h is exact too
    c = torch.randn(2, 2, 8, device=device)
    given = (h.to(dtype), c.to(dtype)) if hx else None
    plain = flat(*module(x, given))
    module.checkpoint_every = 3
    for found, truth in zip(flat(*module(x, given)), plain, strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("hx", (True, False))
def test_as_a_wavefront(hx, monkeypatch, device):
    module = fastrnn.LSTM(4, 8, 3, proj_size=3, backend="resident", checkpoint_every=3, device=device)
    x, given = torch.randn(7, 2, 4, device=device), state(3, 2, device=device)
    run = functools.partial(gradients, module, x, given) if hx else lambda: flat(*module(x))
    chunked = run()
    as_wavefront(monkeypatch, 3)
    for found, truth in zip(run(), chunked, strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("backend", ALL)
def test_functional_equals_the_module(backend, device):
    module = fastrnn.LSTM(5, 8, 2, proj_size=3, bidirectional=True, bias=False, backend=backend, device=device)
    x, hx = torch.randn(4, 2, 5, device=device), state(4, 2, device=device)
    kwargs = {"num_layers": 2, "bidirectional": True, "bias": False, "backend": backend}
    for given in (None, hx):
        found = flat(*fastrnn.lstm(x, given, list(module.parameters()), **kwargs))
        for a, b in zip(found, flat(*module(x, given)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ALL)
def test_wrong_states_fail_as_in_torch_nn(backend, device):
    ours, theirs = pair("LSTM", device, backend, 5, 8, proj_size=3, dtype=torch.float32)
    zeros = functools.partial(torch.zeros, device=device)
    x = zeros(4, 2, 5)
    for hx in ((zeros(1, 2, 8), zeros(1, 2, 8)), (zeros(1, 2, 3), zeros(1, 2, 3))):
        with pytest.raises(RuntimeError) as error:
            theirs(x, hx)
        with pytest.raises(RuntimeError) as found:
            ours(x, hx)
        assert str(found.value) == str(error.value)
    params = list(ours.parameters())[:-1]
    with pytest.raises(ValueError, match=r"params\[4\] \(weight_hr_l0\): expected \(3, 7\), got \(4, 7\)"):
        fastrnn.lstm(x, None, [*(p[:28] for p in params), zeros(4, 7)], backend=backend)


@pytest.mark.parametrize("how", ("zeros", "state", "resets"))
def test_gradients_of_gradients(how, device):
    """By the kernels as by the reference, of the gradients of everything, with respect to everything."""
    found = []
    for backend in ("reference", "resident"):
        torch.manual_seed(0)
        module = fastrnn.LSTM(5, 8, proj_size=3, bidirectional=True, backend=backend, device=device)
        x, hx = torch.randn(4, 2, 5, device=device), state(2, 2, device=device)
        leaves = [x.requires_grad_(), *(s.requires_grad_() for s in hx if how != "zeros"), *module.parameters()]
        options = {"reset": torch.rand(4, 2, device=device) < 0.5, "reset_state": hx} if how == "resets" else {}
        outputs = flat(*module(x, hx if how == "state" else None, **options))
        first = torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


MUTATIONS = {
    "the state before the first step is left out": lambda h: torch.zeros_like(h),
    "it is added at the wrong end": lambda h: h.flip(0),
    "it is added at every step": lambda h: h.sum(0).expand_as(h),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_start_is_noticed(name, monkeypatch, device):
    ours, theirs = pair("LSTM", device, "resident", 5, 8, proj_size=3, bidirectional=True)
    x, hx = torch.randn(4, 2, 5, device=device), state(2, 2, device=device)
    compare(ours, theirs, x, hx)
    right = projection.h_start
    monkeypatch.setattr(projection, "h_start", lambda *args: MUTATIONS[name](right(*args)))
    with pytest.raises(AssertionError):
        compare(ours, theirs, x, hx)
