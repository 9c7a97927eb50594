"""Sequences of no steps, which rows of a batch may be: zeros, hx, and gradients as if they were absent."""

import numpy as np
import pytest
import torch

from .test_modules import NAMES, flat
from .test_reports import BACKENDS, made, state


def of_rows(module, x, hx, lengths, reset, rows, ragged):
    """Output by row, final states and gradients of parameters, x and hx, of a batch of these rows alone."""
    x = x[:, rows].clone().requires_grad_()
    hx = tuple(h[:, rows].detach().requires_grad_() for h in (hx if isinstance(hx, tuple) else (hx,)))
    lengths, reset = [lengths[row] for row in rows], reset[:, rows]
    options, input = {"lengths": lengths, "reset": reset}, x
    if ragged:
        input, reset = (torch.cat([t[:n, b] for b, n in enumerate(lengths)]) for t in (x, reset))
        options = {"cu_seqlens": [0, *np.cumsum(lengths)], "reset": reset}
    output, final = module(input, hx if len(hx) == 2 else hx[0], **options)
    output, *final = flat(output, final)
    loss = (output.sin().sum() if output.numel() else 0) + sum((f * f).sum() for f in final)
    grads = torch.autograd.grad(loss, [*module.parameters(), x, *hx], materialize_grads=True, allow_unused=True)
    if ragged:
        output = torch.nn.utils.rnn.pad_sequence(list(output.split(lengths)))
    return output, final, grads[: -1 - len(hx)], grads[-1 - len(hx) :]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ragged", (False, True), ids=("lengths", "cu_seqlens"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    (
        ("RNN", {"num_layers": 2}),
        ("GRU", {"bidirectional": True}),
        ("LSTM", {"bidirectional": True, "num_layers": 2}),
        ("LSTM", {"proj_size": 2}),
    ),
    ids=("rnn", "gru", "lstm", "projected"),
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_batch_with_empty_rows_is_as_without_them(name, kwargs, backend, ragged, device):
    module, lengths, rows = made(name, backend, device, **kwargs), [0, 5, 0, 2], [1, 3]
    x, hx, reset = torch.randn(5, 4, 3, device=device), state(module, 4), torch.rand(5, 4, device=device) < 0.3
    given = hx if isinstance(hx, tuple) else (hx,)
    output, final, grads, by_row = of_rows(module, x, hx, lengths, reset, [0, 1, 2, 3], ragged)
    some = of_rows(module, x, hx, lengths, reset, rows, ragged)
    assert not output[:, [0, 2]].any()
    torch.testing.assert_close(output[:, rows], some[0])
    for all_rows, of_some, first in zip(final, some[1], given, strict=True):
        assert torch.equal(all_rows[:, [0, 2]], first[:, [0, 2]])
        torch.testing.assert_close(all_rows[:, rows], of_some)
    for all_rows, of_some in zip(grads, some[2], strict=True):
        torch.testing.assert_close(all_rows, of_some)
    for all_rows, of_some in zip(by_row, some[3], strict=True):
        torch.testing.assert_close(all_rows[:, rows], of_some)
    assert not by_row[0][:, [0, 2]].any()
    for d_first, first in zip(by_row[1:], given, strict=True):
        torch.testing.assert_close(d_first[:, [0, 2]], 2 * first.detach()[:, [0, 2]])


NOTHING = {
    "lengths, all 0": ((4, 2, 3), {"lengths": [0, 0]}, (4, 2)),
    "no time, lengths": ((0, 2, 3), {"lengths": [0, 0]}, (0, 2)),
    "no rows": ((4, 0, 3), {"lengths": []}, (4, 0)),
    "no rows and no time": ((0, 0, 3), {"lengths": np.array([])}, (0, 0)),
    "cu_seqlens, all 0": ((0, 3), {"cu_seqlens": [0, 0, 0], "reset": []}, (0,)),
    "cu_seqlens of no sequence": ((0, 3), {"cu_seqlens": [0]}, (0,)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_empty_sequences(name, backend, kind, device):
    """Output without steps, the states given, gradients that are 0; also with cells, and without hx."""
    shape, options, expected = NOTHING[kind]
    module = made(name, backend, device, num_layers=2, bidirectional=True)
    B = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else shape[1]
    x, hx = torch.randn(shape, device=device, requires_grad=True), state(module, B)
    output, final, *cells = module(x, hx, **options, return_cell_states=name == "LSTM")
    for steps in (output, *cells, module(x, **options)[0]):
        assert steps.shape == (*expected, 12) and not steps.any()
    _, *final = flat(output, final)
    given = hx if isinstance(hx, tuple) else (hx,)
    assert all(torch.equal(f, h) for f, h in zip(final, given, strict=True))
    loss = output.sum() + sum(f.sum() for f in final)
    grads = torch.autograd.grad(loss, [x, *given, *module.parameters()], allow_unused=True, materialize_grads=True)
    assert all(g.eq(1).all() for g in grads[1 : 1 + len(given)])
    assert not any(g.any() for g in (grads[0], *grads[1 + len(given) :]))


def test_no_time_and_no_lengths_fails_as_in_torch_nn(device):
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        made("GRU", "reference", device)(torch.zeros(0, 2, 3, device=device))
