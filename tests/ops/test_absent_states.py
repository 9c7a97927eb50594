"""First states that are not given are zeros, in every bit: no zeros are written to memory for them."""

import pytest
import torch

import fastrnn
from fastrnn.compat import interpreter

LAYERS = {
    "lstm": (fastrnn.LSTM, 2),
    "gru": (fastrnn.GRU, 1),
    "rnn": (fastrnn.RNN, 1),
    "slstm": (fastrnn.SLSTM, 4),
    "gru in heads, clipped": (lambda *sizes, **given: fastrnn.GRU(*sizes, num_heads=2, clip_state=0.2, **given), 1),
}
T, B, I, H = 5, 3, 4, 6
SEQUENCES = {
    "plain": {},
    "lengths": {"lengths": [2, 0, 5]},
    "reset": {"reset": torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.4},
    "ragged": {"cu_seqlens": [0, 4, 4, 15]},
}


def found(layer, x, hx, options):
    """Outputs, final states and gradients of x and parameters."""
    x = x.clone().requires_grad_()
    output, state = layer(x, hx, **options)
    finals = state if isinstance(state, tuple) else (state,)
    total = output.sin().sum() + sum(final.cos().sum() for final in finals)
    return output, *finals, *torch.autograd.grad(total, [x, *layer.parameters()])


def both(name, kind, backend, device):
    make, states = LAYERS[name]
    torch.manual_seed(0)
    layer = make(I, H, bidirectional=True, backend=backend).to(device)
    options = {key: value.to(device) if key == "reset" else value for key, value in SEQUENCES[kind].items()}
    x = torch.randn(*((T * B,) if kind == "ragged" else (T, B)), I, device=device)
    zeros = x.new_zeros(2, B, H)
    hx = zeros if states == 1 else (zeros,) * states
    return found(layer, x, None, options), found(layer, x, hx, options)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("name", LAYERS)
def test_absent_states_are_zeros(name, kind, backend, device):
    for absent, given in zip(*both(name, kind, backend, device), strict=True):
        assert torch.equal(absent, given)


@pytest.mark.skipif(not interpreter.ENABLED, reason="broken kernels run in the interpreter: set TRITON_INTERPRET=1")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "kind, old, new",
    [
        ("plain", "tl.where(step > 0, mask, False)", "mask"),
        ("ragged", "tl.where(exists[:, None], mask, False)", "mask"),
    ],
)
def test_what_lies_before_the_first_step_is_noticed(kind, old, new, mutate, device):
    mutate({"kernels.loop.load_saved": (old, new)})
    absent, given = both("gru", kind, "resident", device)
    assert not all(torch.equal(*pair) for pair in zip(absent, given, strict=True))
