"""A call like an earlier one goes straight to the launches. It gives the same bits, and sees what has changed."""

import pytest
import torch

import fastrnn
from fastrnn.compat.driver import LaunchRefusedError
from fastrnn.nn import calls, paths

T, B, I, H = 5, 3, 4, 16
OPTIONS = (
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    {"bidirectional": True, "tie_directions": True},
    {"num_heads": 2},
    {"checkpoint_every": 2},
    {"clip_state": 0.1, "clip_grad_state": 0.1},
)


@pytest.fixture
def roads(monkeypatch):
    """Which road each call took."""
    calls._routes.clear()
    taken, run, again = [], paths.run, paths.again

    def long(*args):
        taken.append("long")
        return run(*args)

    def short(*args):
        found = again(*args)
        if found is not None:
            taken.append("short")
        return found

    monkeypatch.setattr(paths, "run", long)
    monkeypatch.setattr(paths, "again", short)
    return taken


def made(device, name="GRU", **options):
    torch.manual_seed(0)
    return getattr(fastrnn, name)(I, H, backend="resident", **options).to(device), torch.randn(B, T, I, device=device)


def results(module, x):
    """Output, states and all gradients."""
    x = x.clone().requires_grad_()
    output, state = module(x)
    states = state if isinstance(state, tuple) else (state,)
    parameters = list(module.parameters())
    loss = output.sum() + sum(s.sin().sum() for s in states)
    return [output, *states, *torch.autograd.grad(loss, [x, *parameters])]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ("LSTM", "GRU", "SLSTM"))
def test_the_second_call_takes_the_short_road_to_the_same_bits(device, roads, name, options):
    module, x = made(device, name, **options)
    first, second = results(module, x), results(module, x)
    assert roads == ["long", "short"] and same(second, first)
    with torch.no_grad():
        first, second = module(x)[0], module(x)[0]
    assert roads[2:] == ["long", "short"] and torch.equal(first, second)


@pytest.mark.parametrize("option", ({"drop_connect": 0.5}, {"zoneout": 0.5}), ids=str)
def test_a_call_that_draws_random_numbers_takes_the_long_road(device, roads, option):
    module, x = made(device, **option)
    assert not torch.equal(module(x)[0], module(x)[0]) and roads == ["long", "long"]
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0]) and roads[2:] == ["long", "short"]


def of_evaluation(module):
    module.eval()


def in_double(module):
    for parameter in module.parameters():
        parameter.data = parameter.data.double()


def with_a_clip(module):
    module.clip_state = 0.01


def batch_first(module):
    module.batch_first = True


def of_the_reference(module):
    module.backend = "reference"


CHANGES = (of_evaluation, in_double, with_a_clip, batch_first, of_the_reference)


def outcome(module, x):
    """The output, or the error."""
    torch.manual_seed(1)
    try:
        return module(x)[0]
    except (ValueError, RuntimeError) as error:
        return str(error)


def seen(device, change) -> bool:
    """Whether a change after two calls does what it does to a call that nothing came before."""
    module, x = made(device, num_layers=2, dropout=0.5)
    module(x), module(x)
    change(module)
    found = outcome(module, x)
    calls._routes.clear()
    expected = outcome(module, x)
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_module_is_seen(device, change):
    assert seen(device, change)


def test_what_the_key_forgets_is_noticed(device, monkeypatch):
    """Settings of the module; sizes and dtypes of its tensors."""
    key = calls._key
    monkeypatch.setattr(calls, "_key", lambda stack, *rest: key(calls.Stack("gru"), *rest))
    assert [change.__name__ for change in CHANGES if not seen(device, change)] != []
    monkeypatch.setattr(calls, "_key", lambda stack, tensors, *rest: key(stack, tensors[:1], *rest))
    assert not seen(device, in_double)


def test_a_refused_launch_takes_the_long_road_of_auto_only(device, roads, monkeypatch):
    module, x = made(device)
    expected, plain = module(x), paths._plain

    def refused(call, each):
        raise LaunchRefusedError("refused")

    monkeypatch.setattr(paths, "_plain", refused)
    with pytest.raises(LaunchRefusedError, match="refused"):
        module(x)
    stack, params = module._stack(), module._params()
    assert paths.again(stack._replace(backend="auto"), x, params) is None  # no call of "auto" came before
    known = calls.known(stack, x, params)
    monkeypatch.setattr(paths, "known", lambda *args: known)
    assert paths.again(stack._replace(backend="auto"), x, params) is None
    monkeypatch.setattr(paths, "_plain", plain)
    assert same(paths.again(stack, x, params), expected)
