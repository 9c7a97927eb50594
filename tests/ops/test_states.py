"""A cell with three states, of which backward keeps two: the loops, the op and the reference take any number."""

import functools
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from fastrnn import cells, reference
from fastrnn.kernels.activations import d_sigmoid, d_tanh, sigmoid, tanh, zeros_like
from fastrnn.ops import library
from fastrnn.ops.schema import Args
from fastrnn.sequences import Sequences

from ..support.cases import errors, excess, times_allowed


# f, i = sigmoid(x + rec), g = tanh(x + rec);  a' = f a + i;  b' = f b + g;  h' = tanh(a') b'
def step(x, rec, state):
    f, i, g = (x + rec).unbind(-2)
    f, i, g = f.sigmoid(), i.sigmoid(), g.tanh()
    a, b = f * state[1] + i, f * state[2] + g
    return a.tanh() * b, a, b


@triton.jit
def forward(x, rec, state, HOW: tl.constexpr):
    f = sigmoid(x[0] + rec[0], HOW)
    i = sigmoid(x[1] + rec[1], HOW)
    g = tanh(x[2] + rec[2], HOW)
    a, b = f * state[1] + i, f * state[2] + g
    return (tanh(a, HOW) * b, a, b), (f, i, g)


@triton.jit
def backward(d_state, saved, kept, kept_prev, HOW: tl.constexpr):
    f, i, g = saved
    a, b = kept
    dh, da, db = d_state
    tanh_a = tanh(a, HOW)
    da += dh * b * d_tanh(tanh_a)
    db += dh * tanh_a
    d_f = (da * kept_prev[0] + db * kept_prev[1]) * d_sigmoid(f)
    d_gates = (d_f, da * d_sigmoid(i), db * d_tanh(g))
    return d_gates, d_gates, (zeros_like(dh), da * f, db * f)


@pytest.fixture(autouse=True)
def _three():
    cell = cells.Cell("three", 3, step, 3, ("h", "a", "b"), ("a", "b"), kernels=(forward, backward))
    with mock.patch.dict(cells.CELLS, {"three": cell}):
        yield


def arguments(kind: str, device: str) -> tuple[dict, dict]:
    T, B, D, H = 4, 3, 2, 20

    def random(*shape):
        return torch.randn(shape).to(device)

    tensors = {"x_gates": random(T, B, D, 3, H), "W_hh": random(D, 3 * H, H) / H**0.5, "b_hh": random(D, 3 * H)}
    tensors["state_0"] = random(3, D, B, H)
    if kind == "plain":
        return tensors, {}
    reset = torch.zeros(T, B, dtype=torch.bool, device=device)
    reset[2, 0] = reset[1, 1] = True
    tensors["starts"] = random(3, D, B, H)
    return tensors, {"sequences": Sequences.of(T, B, lengths=torch.tensor([4, 2, 3], device=device), reset=reset)}


def results(run, tensors: dict, options: dict) -> dict:
    given = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = run(**given, **options)
    upstream = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(given.values()), upstream)
    return dict(zip(("y", "finals", "steps"), (o.detach() for o in outputs), strict=True)) | dict(
        zip(given, gradients, strict=True)
    )


def by_kernel(backend: str, sequences=None, **tensors) -> tuple:
    rows, reset = sequences or (None, None)
    args = Args(**tensors, cell="three", save=False, backend=backend, rows=rows, reset=reset, all_steps=True)
    y, finals, _, steps = library.run(args)
    return y, finals, steps


def faults(backend: str, kind: str, device: str) -> dict:
    tensors, options = arguments(kind, device)
    specification = functools.partial(reference.run, "three")
    truth = results(specification, {name: t.double() for name, t in tensors.items()}, options)
    allowed = errors(results(specification, tensors, options), truth)
    found = results(functools.partial(by_kernel, backend), tensors, options)
    return excess(found, truth, allowed, torch.float32, times_allowed(torch.float32, torch.device(device)))


@pytest.mark.parametrize("kind", ("plain", "lengths, resets to a state"))
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_three_states_match_the_reference(backend, kind, device):
    assert not faults(backend, kind, device)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    (
        ("kernels.loop.load_saved", "read.before[n]", "read.before[0]"),
        ("kernels.loop.load_saved", "read.kept[n]", "read.kept[0]"),
        ("kernels.tiles.store_state", "state[n]", "state[1]"),
        ("kernels.loop.differentiate", "tiles.d_steps[n - 1]", "tiles.d_steps[0]"),
    ),
)
def test_another_state_is_noticed(function, old, new, mutate, device):
    mutate({function: (old, new)})
    assert faults("resident", "plain", device)
