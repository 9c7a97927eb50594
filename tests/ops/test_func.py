"""torch.func over the kernels: grad, vjp, vmap, jacrev and what they make of each other, against plain torch's."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

import fastrnn
from fastrnn.ops import launch

NAMES = ("RNN", "GRU", "LSTM")
N = 3


def loss(module, parameters, x, hx=None):
    output, final = functional_call(module, parameters, (x, hx))
    return output.square().sum() + sum(f.sin().sum() for f in (final if isinstance(final, tuple) else (final,)))


def state(name: str, h: torch.Tensor):
    return (h, h.cos()) if name == "LSTM" else h


def ensemble(parameters: dict) -> dict:
    return {key: torch.stack([p * n for n in range(1, N + 1)]) for key, p in parameters.items()}


# What is asked of a module m, its parameters p (plain tensors), N batches xs (N, T, B, I) and their states hs.
TRANSFORMS = {
    "grad of parameters": lambda m, p, xs, hs: grad(lambda p: loss(m, p, xs[0]))(p),
    "grad of input and state": lambda m, p, xs, hs: grad(lambda x, h: loss(m, p, x, state(m.mode, h)), argnums=(0, 1))(
        xs[0], hs[0]
    ),
    "vjp": lambda m, p, xs, hs: vjp(lambda x: functional_call(m, p, (x,))[1], xs[0])[1](state(m.mode, hs[0])),
    "vmap of input": lambda m, p, xs, hs: vmap(m)(xs),
    "vmap of input, in another dimension": lambda m, p, xs, hs: vmap(m, in_dims=2)(xs.movedim(0, 2)),
    "vmap of state only": lambda m, p, xs, hs: vmap(lambda h: m(xs[0], state(m.mode, h)))(hs),
    "vmap of vmap": lambda m, p, xs, hs: vmap(vmap(m))(torch.stack([xs, -xs])),
    "grad of vmap": lambda m, p, xs, hs: grad(
        lambda p, xs: vmap(lambda x, h: loss(m, p, x, state(m.mode, h)))(xs, hs).sum(), argnums=(0, 1)
    )(p, xs),
    "per-sample gradients": lambda m, p, xs, hs: vmap(
        grad(lambda p, x, h: loss(m, p, x, state(m.mode, h))), in_dims=(None, 0, 0)
    )(p, xs, hs),
    "per-sample gradients of input": lambda m, p, xs, hs: vmap(
        grad(lambda p, x: loss(m, p, x), argnums=1), in_dims=(None, 0)
    )(p, xs),
    "an ensemble": lambda m, p, xs, hs: vmap(lambda p, x: functional_call(m, p, (x,)), in_dims=(0, None))(
        ensemble(p), xs[0]
    ),
    "gradients of an ensemble": lambda m, p, xs, hs: vmap(grad(lambda p, x: loss(m, p, x)))(ensemble(p), xs),
    "jacrev": lambda m, p, xs, hs: jacrev(lambda x: functional_call(m, p, (x,))[1], argnums=0)(xs[0]),
    "grad of grad": lambda m, p, xs, hs: grad(lambda p, x: grad(lambda x: loss(m, p, x))(x).square().sum())(p, xs[0]),
    "vmap of grad of grad": lambda m, p, xs, hs: vmap(grad(lambda x: grad(lambda x: loss(m, p, x))(x).square().sum()))(
        xs
    ),
}


def made(name: str, backend: str, device: str, **kwargs):
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(2, 3, backend=backend, device=device, **kwargs)
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    D = 2 if module.bidirectional else 1
    xs = torch.randn(N, 3, 2, 2, device=device)
    return module, parameters, xs, torch.randn(N, module.num_layers * D, 2, 3, device=device)


@pytest.mark.parametrize("what", TRANSFORMS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_plain_torch(name, what, device):
    found, truth = (
        TRANSFORMS[what](*made(name, backend, device, bidirectional=True)) for backend in ("resident", "reference")
    )
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_are_torch_nns(name, device):
    """One by one, by torch.nn in fp64; by the cooperative kernels, two layers."""
    module, parameters, xs, _ = made(name, "cooperative", device, num_layers=2)
    found = vmap(grad(lambda p, x: loss(module, p, x)), in_dims=(None, 0))(parameters, xs)
    theirs = getattr(torch.nn, name)(2, 3, num_layers=2, dtype=torch.float64, device=device)
    theirs.load_state_dict(module.state_dict())
    for n, x in enumerate(xs.double()):
        theirs.zero_grad()
        loss(theirs, {}, x).backward()
        for key, parameter in theirs.named_parameters():
            torch.testing.assert_close(found[key][n].double(), parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_backward_through_vmap(name, device):
    """Of what no transform sees: autograd outside, for parameters and for input with frozen parameters."""
    for frozen in (False, True):
        results = []
        for backend in ("resident", "reference"):
            module, _, xs, _ = made(name, backend, device)
            module.requires_grad_(not frozen)
            xs.requires_grad_()
            vmap(module)(xs)[0].square().sum().backward()
            results.append([xs.grad, *(p.grad for p in module.parameters() if not frozen)])
        torch.testing.assert_close(*results)


def test_calls_with_the_same_weights_are_one_launch(device, monkeypatch):
    launches = []

    def counting(which: str):
        plain = getattr(launch, which)
        monkeypatch.setattr(launch, which, lambda *args, **named: launches.append(which) or plain(*args, **named))

    counting("forward")
    counting("backward")
    module, p, xs, _ = made("LSTM", "resident", device)
    vmap(grad(lambda x: loss(module, p, x)))(xs)
    assert launches == ["forward", "backward"]
    launches.clear()
    vmap(grad(lambda p, x: loss(module, p, x)), in_dims=(None, 0))(p, xs)
    assert launches == ["forward"] + N * ["backward"]
    launches.clear()
    vmap(grad(lambda p, x: loss(module, p, x)))(ensemble(p), xs)
    assert launches == N * ["forward"] + N * ["backward"]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_no_sequence(name, device):
    module, p, xs, _ = made(name, "resident", device)
    found = vmap(grad(lambda x: loss(module, p, x)))(xs[:, :, :0])
    assert found.shape == (N, 3, 0, 2)


def test_forward_mode_is_missing_and_says_so(device):
    """torch.library's own autograd would take it, and return tangents of 0."""
    module, _, xs, _ = made("GRU", "resident", device)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation of fastrnn's kernels is missing"):
        torch.func.jvp(module, (xs[0],), (xs[0],))
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(xs[0], xs[0])
        with pytest.raises(NotImplementedError, match="forward-mode differentiation of fastrnn's kernels is missing"):
            module(x)
    module.backend = "reference"
    torch.func.jvp(module, (xs[0],), (xs[0],))
