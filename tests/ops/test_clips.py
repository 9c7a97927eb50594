"""What is clipped at each step: the gradient that comes back through W_hh, and what a step sees of c or h."""

import functools

import pytest
import torch

import fastrnn
from fastrnn import reference

from ..support.cases import ON_CPU, Case, errors, excess, times_allowed
from ..support.heads import HEADS, arguments, kernel, results

# Limits that some of what they clip exceeds.
CLIPS = {"gradient": {"clip_gradient": 0.1}, "cut": {"clip_gradient": 0.0}, "state": {"clip_state": 0.5}}
KINDS = ("plain", "lengths", "ragged", "lengths, resets by step", "resets to a state")


def faults(cell: str, backend: str, kind: str, clip: str, device: str) -> dict[str, str]:
    """What a kernel errs beyond the budget of the reference in float32; a clip that does nothing is an error too."""
    tensors, of_sequences = arguments(cell, kind, Case(T=5, B=3, H=36, D=2), device, torch.float32)
    exact = {name: t.double() for name, t in tensors.items()}
    specification = functools.partial(reference.run, cell, heads=HEADS, **CLIPS[clip])
    truth = results(specification, exact, of_sequences)
    plain = results(functools.partial(reference.run, cell, heads=HEADS), exact, of_sequences)
    assert not torch.allclose(plain["W_hh"], truth["W_hh"], rtol=1e-2)
    allowed = errors(results(specification, tensors, of_sequences), truth)
    run = functools.partial(kernel, cell, backend, **CLIPS[clip])
    return excess(
        results(run, tensors, of_sequences), truth, allowed, torch.float32,
        times_allowed(torch.float32, torch.device(device)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh", "slstm"))
@pytest.mark.one_in(3)
def test_kernels_clip_as_the_reference(cell, backend, clip, kind, device):
    assert not faults(cell, backend, kind, clip, device)


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN", "SLSTM"))
def test_a_cut_gradient_is_that_of_single_steps(name):
    """By the definition: no gradient of h goes from a step to the one before through W_hh."""
    layer = getattr(fastrnn, name)(3, 8, clip_grad_state=0, backend="reference").double()
    plain = getattr(fastrnn, name)(3, 8, backend="reference").double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    found = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_ih_l0)[0]
    loss, state, cell = 0.0, None, plain._stack().of_cell
    state = tuple(torch.zeros(2, 8, dtype=torch.float64) for _ in cell.states)
    for x_t in x:
        gates = torch.nn.functional.linear(x_t, plain.weight_ih_l0, plain.bias_ih_l0).view(2, cell.gates, 8)
        rec = torch.nn.functional.linear(state[0].detach(), plain.weight_hh_l0, plain.bias_hh_l0).view_as(gates)
        state = cell.step(gates, rec, state)
        loss = loss + state[0].square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, plain.weight_ih_l0)[0])


def test_a_clipped_state_is_what_the_next_step_sees():
    """h of a ReLU that would double at every step stays where it is clipped; output is what a step made of it."""
    layer = fastrnn.RNN(1, 2, nonlinearity="relu", bias=False, clip_state=3.0)
    torch.nn.init.zeros_(layer.weight_ih_l0)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(2 * torch.eye(2))
    output, h_n = layer(torch.zeros(5, 1, 1), torch.ones(1, 1, 2))
    assert output[:, 0, 0].tolist() == [2.0, 4.0, 6.0, 6.0, 6.0] and h_n.flatten().tolist() == [3.0, 3.0]


def test_gradients_that_explode_stay_within():
    """d h_0 grows by W_hh = 3 at each of 40 steps, and not at all with a clip."""
    found = []
    for clip in (None, 1.0):
        layer = fastrnn.RNN(1, 4, nonlinearity="relu", bias=False, clip_grad_state=clip, backend="reference")
        with torch.no_grad():
            layer.weight_hh_l0.copy_(3 * torch.eye(4))
        h_0 = torch.full((1, 1, 4), 1e-20, requires_grad=True)
        found.append(torch.autograd.grad(layer(torch.zeros(40, 1, 1), h_0)[0][-1].sum(), h_0)[0])
    assert found[0].min() > 1e18 and found[1].tolist() == [[[1.0] * 4]]


@pytest.mark.parametrize("options", ({"clip_grad_state": 0.1}, {"clip_state": 0.4}), ids=str)
@pytest.mark.parametrize("name", ("LSTM", "GRU"))
@pytest.mark.parametrize("both", (False, True))
def test_layers_of_kernels(name, options, both, device):
    """By every way that a layer has: chunks, second derivatives, lengths, resets; none of torch's kernels clips."""
    layer = getattr(fastrnn, name)(3, 8, 2, bidirectional=both, **options).to(device)
    x, found, second = torch.randn(6, 2, 3, device=device), {}, {}
    reset = torch.rand(6, 2, device=device) < 0.3
    assert layer.plan(x).backend == ON_CPU or device == "cuda"
    runs = {"reference": ("reference", None), "kernel": ("resident", None)}
    runs |= {} if both else {"chunks": ("resident", 2)}  # which take lengths in one direction
    for run, (layer.backend, layer.checkpoint_every) in runs.items():
        input = x.clone().requires_grad_()
        loss = layer(input, lengths=[6, 3], **({} if both else {"reset": reset}))[0].square().sum()
        first = torch.autograd.grad(loss, [input, *layer.parameters()], create_graph=run != "chunks")
        found[run] = [t.detach() for t in first]
        if run != "chunks" and "clip_state" in options:
            second[run] = torch.autograd.grad(first[0].square().sum(), input)
        elif run == "kernel":
            with pytest.raises(NotImplementedError, match="second derivatives with clip_grad_state are missing"):
                torch.autograd.grad(first[0].square().sum(), input)
    for run in runs.keys() - {"reference"}:
        torch.testing.assert_close(found[run], found["reference"], rtol=1e-3, atol=1e-5)
    if second:
        torch.testing.assert_close(second["kernel"], second["reference"], rtol=1e-3, atol=1e-5)
    with pytest.raises(NotImplementedError, match="backend='torch': torch has no kernel that clips"):
        layer.backend = "torch"
        layer(x)


@pytest.mark.parametrize("wrong", (-1, float("nan"), float("inf"), True, "1"))
@pytest.mark.parametrize("name", ("clip_grad_state", "clip_state"))
def test_what_is_no_limit_is_refused(name, wrong):
    with pytest.raises(ValueError, match=f"{name}: expected a number from 0 on, or None; got "):
        fastrnn.GRU(3, 8, **{name: wrong})
    with pytest.raises(ValueError, match=f"{name}: expected a number from 0 on, or None; got "):
        fastrnn.gru(torch.zeros(1, 1, 3), None, list(fastrnn.GRU(3, 8).parameters()), **{name: wrong})


# What is broken: in which function, which text, by what, and the cell, clip and kind that show it.
MUTATIONS = {
    "the whole gradient clipped": (
        "kernels.loop.backward", "dh = d_state[0] + clip(through, K.clip_gradient)",
        "dh = clip(d_state[0] + through, K.clip_gradient)", "gru", "gradient", "plain"),
    "clipped on one side": ("kernels.clips.clip", "tl.where(x < -LIMIT, -LIMIT, x)", "x", "lstm", "gradient", "plain"),
    "another limit": (
        "kernels.loop.backward", "clip(through, K.clip_gradient)", "clip(through, 0.2)", "gru", "gradient", "plain"),
    "h clipped of a cell with c": (
        "kernels.clips.clipped", "(states[0], clip(", "(clip(states[0], 0.5), clip(", "lstm", "state", "plain"),
    "gradients of what is clipped": (
        "kernels.loop.differentiate", "where_not_clipped(K, d_state, kept)", "d_state", "lstm", "state", "plain"),
    "gradients of frozen rows": (
        "kernels.loop.differentiate", "keep(alive, where", "keep(alive | True, where", "gru", "state", "lengths"),
    "the first state not clipped": (
        "kernels.tiles.first_state", "return clipped(K, state)", "return state", "gru", "state", "plain"),
    "gradient of the first state": (
        "kernels.loop.backward", "where_not_clipped(K, d_state, kept)", "d_state", "rnn_tanh", "state", "plain"),
    "the state before not as it was seen": (
        "kernels.clips.clipped_before", "with_first(clip(before[0], K.clip_state), before)", "before", "lstm", "state",
        "plain"),
    "gradients of starts": (
        "kernels.loop.cut", "where_not_clipped(K, d_state, tiles.starts)", "d_state", "gru", "state",
        "resets to a state"),
    "h of dW_hh not clipped": (
        "fastrnn.ops.sums._clipped", "y=steps.y.clamp(-limit, limit)", "y=steps.y", "gru", "state", "plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device):
    function, old, new, cell, clip, kind = MUTATIONS[name]
    assert not faults(cell, "resident", kind, clip, device)
    mutate({function: (old, new)})
    assert faults(cell, "resident", kind, clip, device)
