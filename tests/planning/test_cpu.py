"""Whether CPU tensors take our kernels: by name, by price, by what a call asks for; and what is said of it."""

import functools
import subprocess
import sys

import pytest
import torch

import fastrnn
from fastrnn import plan
from fastrnn.planning import cpu as prices

pytest.importorskip("llvmlite")
from fastrnn.cpu import threads


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_other_dtypes_are_named(dtype):
    with pytest.raises(NotImplementedError, match=f"kernel for {dtype} is missing"):
        fastrnn.GRU(3, 4, backend="cpu", dtype=dtype)(torch.randn(2, 2, 3, dtype=dtype))
    with pytest.raises(NotImplementedError, match="run on CPU tensors; one for sm_90 is missing"):
        plan("gru", hidden_size=8, batch_size=1, device="sm_90", backend="cpu")


def test_without_llvmlite(monkeypatch):
    """By name an error that says what to install; auto runs torch's kernel, and says why."""
    monkeypatch.setattr(prices, "MISSING", ["llvmlite"])
    with pytest.raises(NotImplementedError, match=r"pip install fastrnn\[cpu\]"):
        plan("gru", hidden_size=64, batch_size=8, device="cpu", backend="cpu")
    found = plan("gru", hidden_size=64, batch_size=8, seq_len=128, device="cpu")
    assert found.backend == "torch" and "llvmlite is missing" in found.why
    assert plan("slstm", hidden_size=64, batch_size=8, device="cpu").backend == "reference"


def test_import_needs_no_llvmlite():
    code = """if True:
        import sys
        sys.modules["llvmlite"] = None
        import torch, fastrnn
        gru, x = fastrnn.GRU(64, 64), torch.randn(64, 8, 64)
        gru(x)
        assert "llvmlite is missing" in fastrnn.explain(gru, x).why
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_auto_goes_by_price(monkeypatch):
    sizes = {"hidden_size": 64, "batch_size": 8, "seq_len": 128, "device": "cpu"}
    found = plan("gru", **sizes)
    assert found.backend == "cpu" and "times as fast as torch's kernel" in found.why
    assert plan("gru", **sizes, dtype=torch.float64).backend == "torch"
    assert plan("lstm", **sizes, num_heads=2).backend == "cpu"
    monkeypatch.setattr(prices, "PRICES", {"T": [4], "B": [1], "H": [16], "ratios": {"gru": [[[1.0]]]}})
    found = plan("gru", **sizes)
    assert found.backend == "torch" and "1.00 times as fast" in found.why
    monkeypatch.setitem(prices.PRICES["ratios"], "gru", [[[1.2]]])
    assert plan("gru", **sizes | {"seq_len": prices.LEAST_STEPS + 1}).backend == "cpu"
    few = plan("gru", **sizes | {"seq_len": prices.LEAST_STEPS})
    assert few.backend == "torch" and "16 steps, or fewer" in few.why


def test_between_sizes_the_worst_neighbour_counts(monkeypatch):
    monkeypatch.setattr(
        prices, "PRICES", {"T": [4, 32], "B": [1], "H": [16, 64], "ratios": {"gru": [[[5, 4]], [[3, 2]]]}}
    )
    assert prices.times_as_fast("gru", 4, 1, 16) == 5
    assert prices.times_as_fast("gru", 8, 7, 64) == 2
    assert prices.times_as_fast("gru", 1000, 1, 16) == 3
    assert prices.times_as_fast("gru", 32, 1, 17) == 2
    assert prices.times_as_fast("lstm", 32, 1, 17) is None


def test_observed_calls_stay_torchs():
    """What exports, compiles or transforms a model on CPU tensors gets torch's operators."""
    gru, x = fastrnn.GRU(16, 64), torch.randn(32, 8, 16)
    assert fastrnn.explain(gru, x).backend == "cpu"
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        gru(x)
    assert seen and not any("fastrnn" in name for name in seen)


ONE = {"T": [4, 32], "B": [1], "H": [16]}


def test_each_pass_and_kind_has_its_price(monkeypatch):
    """Of what was not measured the kind before counts; with more steps than that, of lengths, the whole batch's too."""
    ratios = {"lstm": [[[0.7]], [[0.7]]], "lstm, lengths, inference": [[[1.5]], [[1.5]]],
              "lstm, lengths": [[[1.0]], [[1.0]]], "lstm, cell states": [[[2.0]], [[2.0]]]}  # fmt: skip
    monkeypatch.setattr(prices, "PRICES", {**ONE, "ratios": ratios})
    find = functools.partial(prices.times_as_fast, "lstm", 32, 1, 16)
    assert find() == 0.7 and find(training=False) == 0.7
    assert find("lengths") == 1.0 and find("lengths", training=False) == 1.5
    assert find("resets") == 1.0 and find("resets", training=False) == 1.5
    assert find("cell states") == 2.0
    assert prices.times_as_fast("lstm", 64, 1, 16, "cell states") == 2.0
    assert prices.times_as_fast("lstm", 64, 1, 16, "lengths", training=False) == 0.7
    assert prices.times_as_fast("gru", 32, 1, 16, "lengths") is None


def test_explain_says_why_with_lengths_too(monkeypatch, capsys):
    """A plain LSTM is torch's; by its price not with lengths, resets, c of every step, or packed; heads are ours."""
    ratios = {"lstm": [[[0.7]], [[0.7]]], "lstm, lengths": [[[1.6]], [[1.6]]], "lstm, resets": [[[2.5]], [[2.5]]],
              "lstm, cell states": [[[3.5]], [[3.5]]]}  # fmt: skip
    monkeypatch.setattr(prices, "PRICES", {**ONE, "ratios": ratios})
    lstm, x = fastrnn.LSTM(16, 16), torch.randn(32, 8, 16)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.arange(25, 33).flip(0))
    expected = [
        (x, {}, "torch", "0.70 times as fast, or less"),
        (x, {"lengths": [32] * 8}, "cpu", "1.6 times as fast as torch's kernel with lengths"),
        (packed, {}, "cpu", "1.6 times as fast as torch's kernel with lengths"),
        (x, {"reset": torch.zeros(32, 8, dtype=torch.bool)}, "cpu", "2.5 times as fast as torch's kernel with resets"),
        (x, {"return_cell_states": True}, "cpu", "3.5 times as fast as torch's kernel with cell states"),
    ]
    for input, options, backend, why in expected:
        found = fastrnn.explain(lstm, input, **options)
        assert found.backend == backend and why in found.why and why in capsys.readouterr().out
        ran = []
        with monkeypatch.context() as patch:
            patch.setattr(threads, "run", lambda *args, run=threads.run, ran=ran: ran.append(1) or run(*args))
            lstm(input, **options)
        assert bool(ran) is (backend == "cpu"), "what runs is not what explain says"
    assert "with heads" in fastrnn.explain(fastrnn.LSTM(16, 16, num_heads=2), x, lengths=[32] * 8).why
    ratios["lstm, lengths"] = [[[1.0]], [[1.0]]]
    found = fastrnn.explain(lstm, x, lengths=[32] * 8)
    assert found.backend == "torch" and "1.00 times as fast with lengths" in found.why


def test_explain_checks_options():
    gru, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"options: expected some of lengths, .*return_cell_states; got length"):
        fastrnn.explain(gru, x, length=[5, 3])
    with pytest.raises(ValueError, match=r"lengths: expected \(2,\), one for each sequence; got \(3,\)"):
        fastrnn.explain(gru, x, lengths=[5, 3, 1])
    assert fastrnn.explain(gru, torch.randn(9, 3), cu_seqlens=[0, 4, 9]).batch_size == 2


@pytest.mark.parametrize("batch_first", (False, True))
def test_a_call_of_few_steps_is_not_planned(monkeypatch, batch_first):
    """However many sequences it has: torch's kernel is done before the plan would be."""
    asked = []
    monkeypatch.setattr(fastrnn.GRU, "plan", lambda self, input: asked.append(1))
    gru = fastrnn.GRU(64, 8, batch_first=batch_first)
    with torch.no_grad():
        gru(torch.randn(64, 4, 64) if batch_first else torch.randn(4, 64, 64))
    assert not asked
    assert prices.may_pay("GRU", torch.randn(64, 20, 64), batch_first=True)
    assert not prices.may_pay("LSTM", torch.randn(64, 20, 64), batch_first=True)
