"""Bidirectional layers whose directions have one set of parameters."""

import copy
import pickle

import pytest
import torch

import fastrnn
from fastrnn.ops import launch
from fastrnn.stack import Stack


@pytest.mark.parametrize("backend", ("auto", "reference", "resident"))
@pytest.mark.parametrize("options", ({}, {"num_heads": 2}, {"checkpoint_every": 2}), ids=str)
@pytest.mark.parametrize("name", ("LSTM", "GRU", "SLSTM"))
def test_as_two_directions_with_equal_parameters(name, options, backend, device):
    """Outputs, and gradients, which are sums of both directions'."""
    cls = getattr(fastrnn, name)
    layer = cls(3, 8, 2, bidirectional=True, tie_directions=True, backend=backend, **options).to(device)
    plain = cls(3, 8, 2, bidirectional=True, backend=backend, **options).to(device)
    assert list(layer.state_dict()) == [key for key in plain.state_dict() if not key.endswith("_reverse")]
    plain.load_state_dict({key: layer.state_dict()[key.removesuffix("_reverse")] for key in plain.state_dict()})
    x, found = torch.randn(5, 2, 3, device=device), []
    for each in (layer, plain):
        input = x.clone().requires_grad_()
        output = each(input)[0]
        gradients = torch.autograd.grad(output.square().sum(), [input, *each.parameters()])
        found.append((output, dict(zip(["input", *dict(each.named_parameters())], gradients, strict=True))))
    (output, gradients), (expected, of_both) = found
    torch.testing.assert_close(output, expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_both[key] + of_both.get(f"{key}_reverse", 0), rtol=1e-4, atol=1e-5)


def test_both_directions_run_in_one_launch(monkeypatch, device):
    launched, run = [], launch.launch_forward
    monkeypatch.setattr(launch, "launch_forward", lambda ready, *args: launched.append(ready.D) or run(ready, *args))
    layer = fastrnn.GRU(3, 8, bidirectional=True, tie_directions=True, backend="resident").to(device)
    with torch.no_grad():
        layer(torch.randn(5, 2, 3, device=device))
    assert launched == [2]


def test_copies_and_lists(device):
    layer = fastrnn.LSTM(3, 8, bidirectional=True, tie_directions=True).to(device)
    x = torch.randn(5, 2, 3, device=device)
    output, (h_n, _) = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], output) and other.tie_directions and "tie_directions=True" in repr(other)
    found, _ = fastrnn.lstm(x, None, list(layer.parameters()), bidirectional=True, tie_directions=True)
    assert torch.equal(found, output) and h_n.shape == (2, 2, 8)
    reversed_, _ = layer(x.flip(0))
    torch.testing.assert_close(reversed_.flip(0).roll(8, -1), output)


def test_what_cannot_be_tied_is_refused():
    with pytest.raises(ValueError, match="tie_directions: expected False for a layer of one direction, got True"):
        fastrnn.GRU(3, 8, tie_directions=True)
    params = list(fastrnn.GRU(3, 8, bidirectional=True).parameters())
    with pytest.raises(ValueError, match="expected 1 layers x 1 directions x 4 tensors, 4 in all; got 8"):
        fastrnn.gru(torch.zeros(2, 1, 3), None, params, bidirectional=True, tie_directions=True)
    with pytest.raises(ValueError, match="tie_directions: expected False for a layer of one direction, got True"):
        fastrnn.gru(torch.zeros(2, 1, 3), None, params[:4], tie_directions=True)


def test_a_direction_of_other_parameters_is_noticed(monkeypatch, device):
    right = Stack.of_each_direction
    doubled = lambda self, params: [p * (1 + self.tie_directions) for p in right(self, params)]  # noqa: E731
    monkeypatch.setattr(Stack, "of_each_direction", doubled)
    with pytest.raises(AssertionError):
        test_as_two_directions_with_equal_parameters("GRU", {}, "reference", device)
