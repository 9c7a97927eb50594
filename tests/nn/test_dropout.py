"""Dropout between layers: the same masks from the same seed, in whatever order layers and chunks run."""

import warnings

import pytest
import torch

import fastrnn
from fastrnn.nn import paths

from .test_wavefront import as_wavefront, results

NAMES = ("RNN", "GRU", "LSTM")
OURS = ("reference", "resident", "cooperative")


@pytest.fixture
def masks(monkeypatch) -> list[torch.Tensor]:
    """What is kept of the input of each layer but the first, over all of time, as it is drawn."""
    drawn, mask = [], paths.drop_mask
    monkeypatch.setattr(paths, "drop_mask", lambda *args: drawn.append(mask(*args)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("backend", ("reference", "resident"))
@pytest.mark.parametrize("name", NAMES)
def test_every_order_drops_the_same(name, backend, masks, monkeypatch, device):
    """Plain, in chunks, as a wavefront and as one that computes again: outputs, states and gradients."""
    run = {"backend": backend, "dropout": 0.5}
    found = [results(name, device, **run), results(name, device, checkpoint_every=3, **run)]
    as_wavefront(monkeypatch, 3)
    found += [results(name, device, **run), results(name, device, checkpoint_every=3, **run)]
    plain, chunked, wave, wave_again = found
    for a, b, c, d in zip(plain, chunked, wave, wave_again, strict=True):
        assert torch.equal(b, c) and torch.equal(b, d)  # the same chunks
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(masks) == 4 * 2  # once a layer, also where backward runs the layer again
    assert all(torch.equal(mask, masks[i % 2]) for i, mask in enumerate(masks))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(wave[0], results(name, device, backend=backend)[0])


def test_masks_drawn_chunk_by_chunk_are_noticed(monkeypatch, device):
    """A mutant: in the wavefront's order layers take turns."""
    run = {"backend": "resident", "dropout": 0.5}
    chunked = results("GRU", device, checkpoint_every=3, **run)
    dropping, mask = paths.dropping, paths.drop_mask

    def by_chunk(step, masks, p):
        return dropping(step, (mask(m, p) for m in masks), p)

    as_wavefront(monkeypatch, 3)
    monkeypatch.setattr(paths, "dropping", by_chunk)
    assert not torch.equal(results("GRU", device, **run)[0], chunked[0])


@pytest.mark.parametrize("p", (0.25, 0.8, 1.0))
def test_rate_and_scale(p, device):
    x = torch.ones(100, 30, 20, device=device, requires_grad=True)
    mask = paths.drop_mask(x, p)
    dropped = paths.drop(x, mask, p)
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-9  # five sigma
    torch.testing.assert_close(dropped, mask / (1 - p) if p < 1 else torch.zeros_like(x))
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)  # of ones: the gradient has the same mask and scale


@pytest.mark.parametrize("backend", OURS)
def test_seeds(backend, device):
    module = fastrnn.LSTM(3, 8, num_layers=2, dropout=0.5, bidirectional=True, backend=backend, device=device)
    x = torch.randn(4, 2, 3, device=device)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(x)[0])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_backward_keeps_a_byte_an_element(device):
    x = torch.randn(50, 4, 8, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        paths.drop(x, paths.drop_mask(x, 0.5), 0.5)
    assert sum(kept) == x.numel()


def test_compiled_whole(device):
    torch._dynamo.reset()
    module = fastrnn.GRU(3, 8, num_layers=2, dropout=0.5, backend="resident", device=device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it looks through functools.cache
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        found = []
        for run in (compiled, module):
            torch.manual_seed(3)
            output = run(x)[0]
            found.append([output, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*found)
