"""Lengths, packed and ragged input, resets and cell states of the modules, on every backend, against torch.nn's."""

import re

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

from .test_modules import NAMES, flat, functional_map, pair

BACKENDS = ("auto", "reference", "resident", "cooperative")
KWARGS = {"num_layers": 2, "bidirectional": True, "batch_first": True}
LENGTHS = torch.tensor([2, 5, 3])


def make(name: str, device: str):
    """Input (B, T, I) and state of a stack of KWARGS."""
    h = torch.randn(4, 3, 6, device=device)
    return torch.randn(3, 5, 4, device=device), (h, torch.randn_like(h)) if name == "LSTM" else h


def run(module, dtype, tensors, call):
    """Results of call(module, *tensors), and gradients of the tensors and parameters, in a dtype."""
    given = [functional_map(lambda t: t.detach().to(dtype).requires_grad_(), t) for t in tensors]
    leaves = [leaf for t in given for leaf in (t if isinstance(t, tuple) else (t,))]
    results = call(module, *given)
    torch.manual_seed(1)
    loss = sum((r * torch.randn(r.shape, dtype=torch.float64, device=r.device)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def assert_equal(found, truth):
    for a, b in zip(found, truth, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_what_packing_does(name, backend, device):
    """And NaN in the padding is not seen, forward or backward."""
    ours, theirs = pair(name, device, backend, 4, 6, **KWARGS)

    def by_packing(module, x, hx):
        output, final = module(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False), hx)
        return flat(pad_packed_sequence(output, batch_first=True)[0], final)

    def by_lengths(module, x, hx):
        padding = torch.arange(5, device=device) >= LENGTHS.to(device)[:, None]
        x = torch.where(padding[..., None], torch.nan, x)
        return flat(*module(x, hx, lengths=LENGTHS))

    tensors = make(name, device)
    assert_equal(run(ours, torch.float32, tensors, by_lengths), run(theirs, torch.float64, tensors, by_packing))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enforce_sorted", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_packed_in_packed_out(name, enforce_sorted, backend, device):
    ours, theirs = pair(name, device, backend, 4, 6, **KWARGS)
    lengths = LENGTHS.sort(descending=True)[0] if enforce_sorted else LENGTHS

    def packed(module, x, hx):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
        output, final = module(packed, hx)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        assert (output.sorted_indices is None) == (packed.sorted_indices is None) == enforce_sorted
        return flat(output.data, final)

    tensors = make(name, device)
    assert_equal(run(ours, torch.float32, tensors, packed), run(theirs, torch.float64, tensors, packed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_ragged_input_is_each_sequence_alone(name, backend, device):
    ours, theirs = pair(name, device, backend, 4, 6, **KWARGS)
    bounds = [0, 2, 7, 10]

    def ragged(module, x, hx):
        return flat(*module(x.flatten(0, 1)[:10], hx, cu_seqlens=torch.tensor(bounds)))

    def alone(module, x, hx):
        x, found = x.flatten(0, 1)[:10], []
        for n in range(3):
            state = functional_map(lambda s: s[:, n : n + 1], hx)  # noqa: B023
            output, final = module(x[bounds[n] : bounds[n + 1]][None], state)
            found.append(flat(output[0], final))
        output, *finals = zip(*found, strict=True)
        return [torch.cat(output), *(torch.cat(final, 1) for final in finals)]

    tensors = make(name, device)
    assert_equal(run(ours, torch.float32, tensors, ragged), run(theirs, torch.float64, tensors, alone))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", ("zeros", "learned", "by step"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_resets_with_lengths(name, backend, how, device):
    """Against the path in torch, which tests/torch_path/test_segments.py holds to runs of each segment alone."""
    ours, _ = pair(name, device, backend, 4, 6, **KWARGS)
    theirs = getattr(fastrnn, name)(4, 6, backend="torch", device=device, dtype=torch.float64, **KWARGS)
    theirs.load_state_dict(ours.state_dict())
    reset = torch.rand(3, 5, device=device) < 0.4

    def call(module, x, hx, *start):
        given = {"lengths": LENGTHS, "reset": reset, **({"reset_state": start[0]} if start else {})}
        if name == "LSTM":
            output, final, cells = module(x, hx, **given, return_cell_states=True)
            return [*flat(output, final), cells]
        return flat(*module(x, hx, **given))

    shape = {"zeros": None, "learned": (4, 1, 6), "by step": (5, 4, 3, 6)}[how]
    x, hx = make(name, device)
    start = [functional_map(lambda _: torch.randn(shape, device=device), hx)] if shape else []
    assert_equal(run(ours, torch.float32, (x, hx, *start), call), run(theirs, torch.float64, (x, hx, *start), call))


@pytest.mark.parametrize("backend", ("reference", "resident"))
def test_projected_states_start_anew_too(backend, device):
    ours = fastrnn.LSTM(4, 6, proj_size=3, backend=backend, device=device, **KWARGS)
    theirs = fastrnn.LSTM(4, 6, proj_size=3, backend="torch", device=device, dtype=torch.float64, **KWARGS)
    theirs.load_state_dict(ours.state_dict())
    reset = torch.rand(3, 5, device=device) < 0.4

    def call(module, x, hx, start):
        output, final, cells = module(x, hx, lengths=LENGTHS, reset=reset, reset_state=start, return_cell_states=True)
        return [*flat(output, final), cells]

    hx = (torch.randn(4, 3, 3, device=device), torch.randn(4, 3, 6, device=device))
    start = (torch.randn(4, 1, 3, device=device), torch.randn(4, 1, 6, device=device))
    tensors = (torch.randn(3, 5, 4, device=device), hx, start)
    assert_equal(run(ours, torch.float32, tensors, call), run(theirs, torch.float64, tensors, call))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_states_are_those_of_each_step(backend, device):
    ours, theirs = pair("LSTM", device, backend, 4, 6)
    x = torch.randn(5, 3, 4, device=device)
    output, (_, c_n), cells = ours(x, return_cell_states=True)
    state, c = None, []
    for t in range(5):
        _, state = theirs(x[t : t + 1].double(), state)
        c.append(state[1][0])
    torch.testing.assert_close(cells.double(), torch.stack(c), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cells[-1], c_n[0])
    assert cells.shape == output.shape


@pytest.mark.parametrize("backend", ("reference", "resident"))
def test_checkpointed_in_chunks_as_at_once(backend, device):
    plain = fastrnn.LSTM(4, 6, num_layers=2, backend=backend, device=device)
    chunked = fastrnn.LSTM(4, 6, num_layers=2, backend=backend, checkpoint_every=2, device=device)
    chunked.load_state_dict(plain.state_dict())
    reset = torch.rand(5, 3, device=device) < 0.4

    def call(module, x, *start):
        output, final, cells = module(x, lengths=LENGTHS, reset=reset, reset_state=start[0], return_cell_states=True)
        return [*flat(output, final), cells]

    start = (torch.randn(5, 2, 3, 6, device=device), torch.randn(5, 2, 3, 6, device=device))
    tensors = (torch.randn(5, 3, 4, device=device), start)
    assert_equal(run(chunked, torch.float32, tensors, call), run(plain, torch.float32, tensors, call))


R = torch.zeros(5, 3, dtype=torch.bool)
BAD = {
    "length below 0": ({"lengths": [-1, 5, 3]}, "lengths: expected 0 to T=5; got [-1, 5, 3]"),
    "length past T": ({"lengths": [6, 5, 3]}, "lengths: expected 0 to T=5; got [6, 5, 3]"),
    "too few lengths": ({"lengths": [5, 3]}, "lengths: expected (3,), one for each sequence; got (2,)"),
    "float lengths": (
        {"lengths": [5.0, 3, 2]}, "the CPU; got torch.float32"),
    "lengths elsewhere": (
        {"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, "the CPU; got torch.int64 on meta"),
    "lengths and cu_seqlens": (
        {"lengths": [1, 2, 3], "cu_seqlens": torch.tensor([0, 5])}, "lengths: expected None beside cu_seqlens"),
    "cu_seqlens of a dense batch": (
        {"cu_seqlens": torch.tensor([0, 5])}, "input: expected (total, input_size) beside cu_seqlens, got (5, 3, 4)"),
    "reset of another shape": ({"reset": R.T}, "reset: expected (5, 3) of torch.bool on cpu; got (3, 5) of torch.bool"),
    "reset of another dtype": ({"reset": R.long()}, "got (5, 3) of torch.int64"),
    "reset_state without reset": ({"reset_state": torch.zeros(1, 3, 6)}, "reset_state: expected None without reset"),
    "reset_state of another size": (
        {"reset": R, "reset_state": torch.zeros(1, 3, 5)},
        "reset_state: expected (1, 3, 6), or (5, 1, 3, 6) for one a step, where 3 may be 1; got"),
    "a pair of reset states": (
        {"reset": R, "reset_state": (torch.zeros(1, 3, 6),) * 2}, "reset_state: expected a tensor, as hx"),
    "cell states of a GRU": ({"return_cell_states": True}, "return_cell_states: expected False for 'gru'"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("torch", "auto", "reference", "resident"))
@pytest.mark.parametrize("what", BAD)
def test_bad_input_says_what_was_expected(what, backend, device):
    given, text = BAD[what]
    x, gru = torch.randn(5, 3, 4, device=device), fastrnn.GRU(4, 6, backend=backend, device=device)
    here = {name: t.to(device) for name, t in given.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    given, before = given | here, x.clone()
    with pytest.raises(ValueError, match=re.escape(text.replace("on cpu", f"on {x.device}"))):
        gru(x, **given)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bounds", ([0, 4, 3, 10], [0, 5, 9], [1, 10], [0, 12]))
def test_cu_seqlens_that_decrease_or_miss_the_total(bounds):
    with pytest.raises(ValueError, match=re.escape(f"not to decrease, from 0 to total=10; got {bounds}")):
        fastrnn.GRU(4, 6)(torch.randn(10, 4), cu_seqlens=torch.tensor(bounds))


def test_packed_unbatched_and_checkpointed_input_take_not_all():
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 4), torch.randn(2, 4)])
    with pytest.raises(ValueError, match="expected None beside a PackedSequence"):
        fastrnn.GRU(4, 6)(packed, lengths=[4, 2])
    with pytest.raises(ValueError, match="expected None beside unbatched input"):
        fastrnn.GRU(4, 6)(torch.randn(5, 4), lengths=[5])
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):  # torch's own
        torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([2, 5]))
    for kwargs in ({"bidirectional": True}, {"backend": "torch"}):
        with pytest.raises(NotImplementedError, match="checkpoint_every with lengths"):
            fastrnn.GRU(4, 6, checkpoint_every=2, **kwargs)(torch.randn(5, 3, 4), lengths=[5, 3, 2])
    with pytest.raises(NotImplementedError, match="checkpoint_every with packed or ragged sequences is missing"):
        fastrnn.GRU(4, 6, checkpoint_every=2, backend="reference")(packed)
