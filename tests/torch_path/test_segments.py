"""Unequal lengths, resets and cell states by torch's kernels, against a plain loop in fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.stack import Stack
from fastrnn.torch_path import packed, segments

from ..support.cases import OF_TORCH
from ..support.segment_cases import RESET_STATES, H, I, faults, gradients, loop, make_batch, run


@pytest.mark.parametrize("reset_state", RESET_STATES)
@pytest.mark.parametrize("ragged", (False, True), ids=("dense", "ragged"))
@pytest.mark.parametrize(("L", "D"), ((1, 1), (1, 2), (2, 1), (2, 2)))
@pytest.mark.parametrize("cell", OF_TORCH)
def test_against_the_loop(cell, L, D, ragged, reset_state):
    assert not faults(make_batch(cell, L, D, L == 1 or D == 1, reset_state, ragged=ragged))


@pytest.mark.parametrize(
    ("lengths", "p"),
    (((5,), 0.4), ((5,), 0.0), ((5, 5), 1.0), ((0, 3, 5, 0), 0.0), ((1, 1, 1), 0.5), ((2, 9, 0, 33), 0.1)),
    ids=str,
)
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_lengths_and_resets(cell, lengths, p):
    for ragged in (False, True):
        assert not faults(make_batch(cell, 2, 2, True, "per row", lengths, ragged, p))


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_packed_sequences_of_torch(cell):
    module = getattr(torch.nn, cell.upper())(I, H, 2, bidirectional=True)
    x, lengths = torch.randn(6, 4, I), torch.tensor([3, 6, 1, 2])
    state = (torch.randn(4, 4, H),) * (2 if cell == "lstm" else 1)
    y, finals, c = segments.run(
        Stack(cell, 2, training=True, bidirectional=True), x, state, list(module.parameters()), lengths=lengths
    )
    of_torch = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, final = module(of_torch, state if cell == "lstm" else state[0])
    torch.testing.assert_close(y, pad_packed_sequence(expected)[0])
    torch.testing.assert_close(finals, final if cell == "lstm" else (final,))
    assert c is None


@pytest.mark.parametrize(
    "shape", ((1, 2, 1, H), (8, 1, 1, 1), (1, 1, 6, H), (8, 2, 1, H), (1, 1, 1), (2, 6, 1)), ids=str
)
def test_reset_state_is_broadcast(shape):
    states = tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2))
    assert not faults(make_batch("lstm", 1, 2)._replace(reset_state=states))


@pytest.mark.parametrize(("L", "D"), ((1, 1), (2, 2)))
@pytest.mark.parametrize("cell", OF_TORCH)
def test_by_torchs_packed_form(cell, L, D):
    """Which autocast selects on a CPU, and leaves fp64 as it is."""
    with torch.autocast("cpu", torch.bfloat16):
        assert not faults(make_batch(cell, L, D, reset_state="per step"))


@pytest.mark.parametrize("lengths", ((9, 9, 1, 9), (5, 4, 3, 2)), ids=("long blocks", "short blocks"))
@pytest.mark.parametrize("cell", OF_TORCH)
def test_without_gradients(cell, lengths, monkeypatch):
    """torch's packed form but for the LSTM's long blocks; nothing that anyone reads is different."""
    batch = make_batch(cell, 2, 2, lengths=lengths, p=0.0)
    of_blocks = []
    monkeypatch.setattr(packed, "_ahead", lambda *args, walk=packed._ahead: [of_blocks.append(1), walk(*args)][1])
    found = run(batch)
    assert bool(of_blocks) == (cell == "lstm" and 1 in lengths)
    torch.testing.assert_close(found, loop(batch))


def test_a_noncontiguous_input():
    batch = make_batch("lstm", 1, 2)
    x = batch.x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(run(batch._replace(x=x)), run(batch), rtol=0, atol=0)


@pytest.mark.parametrize("ragged", (False, True), ids=("dense", "ragged"))
def test_nan_that_no_segment_reads_stays_where_it_is(ragged):
    batch = make_batch("lstm", 2, 2, reset_state="per step", ragged=ragged)
    T = batch.x.shape[0]
    padding = torch.arange(T)[:, None] >= batch.lengths
    unused = ~(batch.reset & ~padding)[:, None, :, None]
    poisoned = batch._replace(
        x=batch.x.masked_fill(padding[..., None], torch.nan),
        reset_state=tuple(s.masked_fill(unused, torch.nan) for s in batch.reset_state),
    )
    found, clean = gradients(run, poisoned), gradients(run, batch)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert not found["d_x"][padding].any()


def test_a_row_of_nan_leaves_other_rows_and_segments_alone():
    """Those whose steps lie next to it in what is scanned too."""
    batch = make_batch("lstm", 1, 2, lengths=(4, 6, 5))
    batch.reset[:, 1] = torch.tensor([0, 0, 1, 0, 1, 0])
    x = batch.x.clone()
    x[2:4, 1] = torch.nan
    leaves = {name: t.detach().clone().requires_grad_() for name, t in batch._replace(x=x).tensors().items()}
    found, clean = run(batch.replaced(leaves)), run(batch)
    spoilt = torch.zeros(6, 3, dtype=torch.bool)
    spoilt[2:4, 1] = True
    for name in ("y", "c"):
        assert found[name][spoilt].isnan().all()
        # Not the same bits: the order of a product's sums may depend on where its operands lie.
        torch.testing.assert_close(found[name][~spoilt], clean[name][~spoilt], rtol=0, atol=1e-15)
    (d_x,) = torch.autograd.grad(found["c"].sum(), leaves["x"])
    assert d_x[~spoilt].isfinite().all() and d_x[spoilt].isnan().all()


@pytest.mark.parametrize("layout", ("lengths", "cu_seqlens"))
@pytest.mark.parametrize("cell", OF_TORCH)
def test_no_steps_at_all(cell, layout):
    batch = make_batch(cell, 2, 2, lengths=(0, 0), ragged=layout == "cu_seqlens", reset_state="per step")
    found = gradients(run, batch)
    assert not found["y"].any() and torch.equal(found["h_n"], batch.state[0])
    assert not any(found[name].any() for name in found if "x" in name or "params" in name)
    assert found["d_state[0]"].all()


def test_gradcheck_twice():
    batch = make_batch("lstm", 1, 2, reset_state="per step", lengths=(3, 2))
    tensors = {name: t.requires_grad_() for name, t in batch.tensors().items()}

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(batch.replaced(dict(zip(tensors, leaves, strict=True)))).values())

    assert torch.autograd.gradcheck(f, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("M", (1, 2, 3, 5, 8, 13, 64))
def test_the_scan(M):
    f, b = torch.rand(M, 2, dtype=torch.float64), torch.randn(M, 2, dtype=torch.float64)
    starts = (torch.rand(M, 1) < 0.3).index_fill(0, torch.tensor([0]), True)
    c = [torch.zeros(2, dtype=torch.float64)]
    for t in range(M):
        c.append(b[t] + (0 if starts[t] else f[t] * c[-1]))
    torch.testing.assert_close(segments._Scan.apply(f, b, starts), torch.stack(c[1:]))
    inputs = f.requires_grad_(), b.requires_grad_(), starts
    assert torch.autograd.gradcheck(segments._Scan.apply, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(segments._Scan.apply, inputs, fast_mode=True)


def test_dropout_between_layers_is_the_same_with_cell_states():
    """Of one seed torch's kernel and the last layer on its own draw the same."""
    module, x = torch.nn.LSTM(I, H, 3, bidirectional=True), torch.randn(5, 3, I)
    state = (torch.zeros(6, 3, H),) * 2
    lengths = torch.tensor([5, 2, 4])

    def outputs(cell_states: bool, dropout: float = 0.5, training: bool = True) -> Tensor:
        torch.manual_seed(3)
        stack = Stack("lstm", 3, dropout=dropout, training=training, bidirectional=True)
        params = list(module.parameters())
        return segments.run(stack, x, state, params, lengths=lengths, cell_states=cell_states)[0]

    torch.testing.assert_close(outputs(True), outputs(False), rtol=0, atol=0)
    assert not torch.allclose(outputs(True), outputs(True, dropout=0.0))
    torch.testing.assert_close(outputs(True, training=False), outputs(True, dropout=0.0), rtol=0, atol=0)


@pytest.mark.parametrize("bias", (True, False))
def test_proj_size(bias):
    T, B, P = 5, 3, 2
    module = torch.nn.LSTM(I, H, 2, bias=bias, proj_size=P, bidirectional=True).double()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), [5, 2, 4]
    state = tuple(torch.randn(4, B, n, dtype=torch.float64) for n in (P, H))
    args = Stack("lstm", 2, bias, training=True, bidirectional=True), x, state, list(module.parameters())
    y, (h_n, c_n), c = segments.run(*args, lengths=torch.tensor(lengths), cell_states=True)
    for b, length in enumerate(lengths):
        row, finals = module(x[:length, b], tuple(s[:, b] for s in state))
        torch.testing.assert_close(y[:length, b], row)
        torch.testing.assert_close((h_n[:, b], c_n[:, b]), finals)
        torch.testing.assert_close(c[length - 1, b, :H], finals[1][2])
        torch.testing.assert_close(c[0, b, H:], finals[1][3])
        assert c[:length, b].all() and not c[length:, b].any()


def test_cell_states_of_16_bits_are_summed_in_more():
    """Of what a forget gate near 1 adds up only the sum is rounded."""
    module = torch.nn.LSTM(1, 1).bfloat16()
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.copy_(torch.tensor([-4.0, 9.0, 1.0, 0.0]))  # i about 0.018, g 0.76
    T, B = 64, 32
    c_0 = torch.linspace(5, 15, B).bfloat16()
    x, state = torch.zeros(T, B, 1).bfloat16(), (torch.zeros(1, B, 1).bfloat16(), c_0[None, :, None])
    _, _, c = segments.run(Stack("lstm"), x, state, list(module.parameters()), cell_states=True)
    i, f, g = torch.tensor(-4.0).sigmoid(), torch.tensor(9.0).sigmoid(), torch.tensor(1.0).tanh()
    expected = c_0.float() * f**T + i * g * (1 - f**T) / (1 - f)
    assert c.dtype == torch.bfloat16
    torch.testing.assert_close(c[-1, :, 0].float(), expected, rtol=2**-8, atol=0)
