"""step: a sequence that arrives step by step gives what forward gives of all of it, and torch's cells' errors."""

import pytest
import torch

import fastrnn

from .test_modules import BACKENDS, NAMES, flat


def layer(name: str, device: str, backend: str, **kwargs):
    kwargs = {"num_layers": 2, "backend": backend, "device": device} | kwargs
    return getattr(fastrnn, name)(3, 5, **kwargs)


def unrolled(module, xs, hx=None):
    """Outputs and the last state of step after step."""
    outputs = []
    for x in xs:
        output, hx = module.step(x, hx)
        outputs.append(output)
    return flat(torch.stack(outputs), hx)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", ({}, {"batch_first": True, "bias": False}), ids=("plain", "batch_first-no-bias"))
def test_equals_forward(name, backend, kwargs, device):
    """Outputs, states and gradients, batched and not, with and without a state."""
    module = layer(name, device, backend, **kwargs)
    for batch in ((2,), ()):  # the batch from zeros, the single sequence from a state
        x = torch.randn(3, *batch, 3, device=device, requires_grad=True)
        h, c = (torch.randn(2, 5, device=device, requires_grad=True) for _ in range(2))
        hx = None if batch else (h, c) if name == "LSTM" else h
        leaves = [x, *([] if batch else [h, c] if name == "LSTM" else [h]), *module.parameters()]
        output, final = module(x.transpose(0, 1) if batch and kwargs else x, hx)
        truth = flat(output.transpose(0, 1) if batch and kwargs else output, final)
        found = unrolled(module, x, hx)
        upstream = [torch.randn_like(o) for o in truth]
        truth += torch.autograd.grad(truth, leaves, upstream)
        found += torch.autograd.grad(found, leaves, upstream)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_forward(name, backend, device):
    """Where the input's product is exact, so that it does not matter how many rows it has."""
    module = layer(name, device, backend)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.startswith("weight_ih"):  # each row takes one element of the input
                rows = torch.arange(len(parameter))
                parameter.zero_()[rows, rows % parameter.shape[1]] = 1
        x = torch.randn(4, 2, 3, device=device)
        for found, truth in zip(unrolled(module, x), flat(*module(x)), strict=True):
            assert torch.equal(found, truth)


def test_the_state_is_not_rounded_on_the_way(device, monkeypatch):
    """A mutant of the test above: it must see one bit of the state lost between steps."""
    module = layer("GRU", device, "resident")
    x = torch.randn(4, 2, 3, device=device)
    truth, whole = module(x)[0], fastrnn.GRU.step
    monkeypatch.setattr(
        fastrnn.GRU, "step", lambda self, x, hx: whole(self, x, None if hx is None else hx.half().float())
    )
    assert (unrolled(module, x)[0] - truth).abs().max() > 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projection(backend, device):
    module = fastrnn.LSTM(3, 5, num_layers=2, proj_size=2, backend=backend, device=device)
    x = torch.randn(4, 2, 3, device=device)
    for found, truth in zip(unrolled(module, x), flat(*module(x)), strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_dropout_only_in_training(backend, device):
    module = layer("LSTM", device, backend, dropout=1.0)
    x = torch.randn(2, 3, device=device)
    assert torch.equal(module.step(x)[0], module.step(-x)[0])  # nothing of the input reaches the second layer
    module.eval()
    assert not torch.equal(module.step(x)[0], module.step(-x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_calls(name, backend, device):
    module = layer(name, device, backend)
    zeros = torch.zeros

    def state(*shape):
        h = zeros(shape, device=device)
        return (h, h) if name == "LSTM" else h

    for shape, hx, error, text in (
        ((2, 1, 3), None, ValueError, f"{name}.step: Expected input to be 1D or 2D, got 3D instead"),
        ((), None, ValueError, "got 0D instead"),
        ((2, 7), None, RuntimeError, "must be equal to input_size. Expected 3, got 7"),
        ((2, 3), state(2, 9, 5), RuntimeError, r"size \(2, 2, 5\), got \[2, 9, 5\]"),
        ((2, 3), state(1, 2, 5), RuntimeError, r"size \(2, 2, 5\), got \[1, 2, 5\]"),
        ((2, 3), state(2, 5), RuntimeError, "hx (and cx )?should also be 3-D but got"),
        ((3,), state(2, 1, 5), RuntimeError, "hx (and cx )?should also be 2-D but got"),
    ):
        with pytest.raises(error, match=text):
            module.step(zeros(shape, device=device), hx)
    with pytest.raises(ValueError, match="RNN input dtype .* does not match weight dtype"):
        module.step(zeros(2, 3, device=device, dtype=torch.float64))
    both = layer(name, device, backend, bidirectional=True)
    with pytest.raises(ValueError, match=f"{name}.step: expected a layer of one direction; got a bidirectional one"):
        both.step(zeros(2, 3, device=device))


@pytest.mark.parametrize(
    ("forgotten", "put"),
    (
        ("x.shape[1] != module.input_size", "False"),
        ("x.dtype != dtype", "False"),
        ("states[0].shape == sizes", "True"),
        (" and states[-1].shape == sizes", ""),
    ),
)
def test_a_check_that_is_skipped_is_noticed(forgotten, put, device, mutate):
    """What fits is not looked at twice: h or c alone may be wrong, too."""

    def one_is_wrong():
        module, h = layer("LSTM", device, "auto"), torch.zeros(2, 2, 5, device=device)
        for number, state in enumerate(((h[:, :1], h), (h, h[:, :1]))):
            with pytest.raises(RuntimeError, match=rf"Expected hidden\[{number}\] size \(2, 2, 5\)"):
                module.step(torch.zeros(2, 3, device=device), state)

    one_is_wrong()
    mutate({"fastrnn.nn.streaming._fit": (forgotten, put)})
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        one_is_wrong()
        test_wrong_calls("GRU", "auto", device)
