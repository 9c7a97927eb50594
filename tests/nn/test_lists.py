"""Lists, NumPy's arrays and integers, and states of the wrong kind: taken, or refused with expected and got."""

import functools

import numpy as np
import pytest
import torch

import fastrnn

from .test_modules import NAMES
from .test_reports import BACKENDS, made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "convert", (list, tuple, np.array, lambda x: np.array(x[::-1])[::-1]), ids=("list", "tuple", "array", "reversed")
)
def test_lists_and_arrays(convert, backend, device):
    module, lengths, cu_seqlens = made("GRU", backend, device), [5, 0, 2], [0, 5, 5, 7]
    reset = [[False, True, True]] * 5
    x, ragged = torch.randn(5, 3, 3, device=device), torch.randn(7, 3, device=device)
    for input, options in ((x, {"lengths": lengths, "reset": reset}), (ragged, {"cu_seqlens": cu_seqlens})):
        tensors = {name: torch.tensor(value, device=device) for name, value in options.items()}
        found, truth = (module(input, **o) for o in ({n: convert(v) for n, v in options.items()}, tensors))
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


WRONG = {
    "floats": ({"lengths": [5.0, 2.0]}, "lengths: expected torch.int64 or torch.int32 .*; got torch.float32"),
    "flags": ({"lengths": np.array([True, False])}, "lengths: expected torch.int64 .*; got torch.bool"),
    "words": (
        {"lengths": ["five", "two"]},
        r"lengths: expected a tensor, a list or an array .*; got \['five', 'two'\]",
    ),
    "nothing": ({"lengths": [5, None]}, r"lengths: expected a tensor, .*; got \[5, None\]"),
    "a number": ({"lengths": 5}, r"lengths: expected \(2,\), one for each sequence; got \(\)"),
    "a generator": ({"lengths": (n for n in (5, 2))}, "lengths: expected a tensor, a list .*; got <generator"),
    "too many": ({"lengths": [5, 2, 1]}, r"lengths: expected \(2,\), .* got \(3,\)"),
    "too long": ({"lengths": np.array([6, 2])}, r"lengths: expected 0 to T=5; got \[6, 2\]"),
    "below 0": ({"lengths": [5, -1]}, r"lengths: expected 0 to T=5; got \[5, -1\]"),
    "reset of numbers": ({"reset": [[0, 1]] * 5}, r"reset: expected \(5, 2\) of torch.bool .*; got .* torch.int64"),
    "reset of another shape": ({"reset": [[True]] * 5}, r"reset: expected \(5, 2\) of torch.bool .*; got \(5, 1\)"),
    "reset of unequal rows": ({"reset": [[True], []]}, "reset: expected a tensor, a list or an array of torch.bool"),
    "cu_seqlens without a start": ({"cu_seqlens": []}, r"cu_seqlens: expected \(N \+ 1,\), got \(0,\)"),
    "cu_seqlens that decrease": ({"cu_seqlens": [0, 4, 3, 10]}, "not to decrease, from 0 to total=10; got"),
    "cu_seqlens short of total": ({"cu_seqlens": np.array([0, 4, 9])}, "from 0 to total=10; got"),
    "cu_seqlens of no sequence": ({"cu_seqlens": [0]}, r"from 0 to total=10; got \[0\]"),
    "cu_seqlens of rows": ({"cu_seqlens": [[0, 10]]}, r"cu_seqlens: expected \(N \+ 1,\), got \(1, 2\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_lists_say_what_was_expected(wrong, device):
    options, text = WRONG[wrong]
    x = torch.randn(*((10,) if "cu_seqlens" in options else (5, 2)), 3, device=device)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=text):
            made("GRU", backend, device)(x, **options)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_numpys(name, backend, device):
    H, L, more = np.int32(6), np.int64(2), {"checkpoint_every": np.int16(2)}
    if name == "LSTM":
        more |= {"proj_size": np.uint8(2)}
    module = getattr(fastrnn, name)(np.int64(3), H, num_layers=L, backend=backend, device=device, **more)
    x = torch.randn(5, 2, 3, device=device)
    output, _ = module(x)
    assert type(module.num_layers) is type(module.checkpoint_every) is int
    by_hand, _ = getattr(fastrnn, name.lower())(
        x, None, list(module.parameters()), num_layers=L, backend=backend, checkpoint_every=np.int64(2)
    )
    torch.testing.assert_close(by_hand, output)
    for wrong in (np.float64(2.0), 2.0, "2", None, 0):
        with pytest.raises(ValueError, match="num_layers: expected a positive int, got"):
            getattr(fastrnn, name.lower())(x, None, list(module.parameters()), num_layers=wrong, backend=backend)
    assert getattr(fastrnn, name)(np.int64(3), H, L, backend=backend, device=device)(x)[0].shape == (5, 2, 6)


def test_a_plan_of_numpys_sizes():
    plan = functools.partial(fastrnn.plan, "gru", dtype=torch.bfloat16, device="sm_90")
    sizes = {"hidden_size": 96, "batch_size": 4, "seq_len": 700, "num_layers": 2, "directions": 2}
    given = {name: np.int64(size) for name, size in sizes.items()}
    assert plan(**given, checkpoint_every=np.int32(8)) == plan(**sizes, checkpoint_every=8)
    for name in sizes:
        with pytest.raises(ValueError, match=f"{name}: expected .* got "):
            plan(**(given | {name: np.float64(4.5)}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hx_of_too_many_or_other_things(backend, device):
    h = torch.zeros(1, 2, 6, device=device)
    x, ragged = torch.zeros(5, 2, 3, device=device), torch.zeros(10, 3, device=device)
    lstm, gru = made("LSTM", backend, device), made("GRU", backend, device)
    for input, options in ((x, {}), (x, {"lengths": [5, 2]}), (ragged, {"cu_seqlens": [0, 5, 10]})):
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            lstm(input, (h, h, h), **options)
    for cell, hx, got in (("lstm", (h, None), "Tensor, NoneType"), ("gru", (h, h), "tuple"), ("gru", [h], "list")):
        params = list((lstm if cell == "lstm" else gru).parameters())
        with pytest.raises(ValueError, match=f"hx: expected a .*tensor.*, got {got}"):
            getattr(fastrnn, cell)(x, hx, params, backend=backend)
