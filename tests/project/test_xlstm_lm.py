"""The example of xLSTM's blocks: what a block computes, and the run as a user makes it, with Ctrl-C and --resume."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from ..support import examples

SMALL = ("--hidden", "16", "--heads", "2", "--batch", "8", "--window", "16", "--eval-every", "50")
T, B, H, N = 6, 3, 12, 3


def run(out: Path, *flags: str) -> subprocess.CompletedProcess:
    return examples.run("xlstm_lm", out, *SMALL, *flags)


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(examples.ROOT / "examples")
    return importlib.import_module("xlstm_lm")


@pytest.fixture
def block(example):
    torch.manual_seed(0)
    made = example.Block(H, N, "reference").double()
    for p in made.parameters():  # norms' too: their first values are ones and zeros
        torch.nn.init.normal_(p, std=0.5)
    return made


def x_like(**options) -> torch.Tensor:
    return torch.randn(T, B, H, dtype=torch.float64, **options)


def normed(x: torch.Tensor, norm: nn.Module, groups: int = 1) -> torch.Tensor:
    parts = x.unflatten(-1, (groups, -1))
    parts = parts - parts.mean(-1, keepdim=True)
    parts = parts / (parts.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return parts.flatten(-2) * norm.weight + norm.bias


def check_equations(block: nn.Module) -> None:
    x = x_like()
    found, _ = block(x, None)
    inner = x + normed(block.slstm(normed(x, block.norm))[0], block.head_norm, N)
    fed = normed(inner, block.norm_ff)
    gate, up = (fed @ W.T for W in block.gate_up.weight.chunk(2))
    assert gate.shape[-1] == 16 == H * 4 // 3
    torch.testing.assert_close(found, inner + (nn.functional.gelu(gate) * up) @ block.down.weight.T)


def check_causal(block: nn.Module) -> None:
    """What comes out at a step depends on no later step and no other row, on what came before, and on the state."""
    x = x_like(requires_grad=True)
    y, _ = block(x, None)
    (dx,) = torch.autograd.grad(y[2, 1].sum(), x)
    assert dx[:3, 1].abs().amin() > 0
    assert not dx[3:].any() and not dx[:, [0, 2]].any()


def test_block_is_its_equations(block):
    check_equations(block)


def test_block_is_causal(block):
    check_causal(block)


def test_one_norm_of_all_heads_is_noticed(block):
    block.head_norm.num_groups = 1
    with pytest.raises(AssertionError):
        check_equations(block)


def test_a_norm_over_time_is_noticed(block):
    per_head = block.head_norm.forward
    block.head_norm.forward = lambda y: per_head(y.view(T, B, H).permute(1, 2, 0)).permute(2, 0, 1).flatten(0, 1)
    with pytest.raises(AssertionError):
        check_causal(block)


def check_state_is_carried(network: nn.Module) -> None:
    x = x_like()
    whole, last = network(x, None)
    first, state = network(x[:4], None)
    second, last_of_parts = network(x[4:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(last_of_parts, last)
    assert [s.shape for s in last] == [(2, B, H)] * 4


def test_two_parts_with_the_state_carried_are_the_whole(example):
    torch.manual_seed(0)
    network = example.XLSTM(H, N, 2, "reference").double()
    check_state_is_carried(network)
    network.blocks[1].forward = lambda x, state, forward=network.blocks[1].forward: forward(x, None)
    with pytest.raises(AssertionError):
        check_state_is_carried(network)


def test_kernels_agree_with_the_reference(example):
    """A training step of blocks on the persistent kernel (in the interpreter where there is no GPU), in float32."""
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for backend in ("reference", "resident"):
        torch.manual_seed(0)
        network = example.XLSTM(H, N, 2, backend).to(device)
        y, _ = network(x_like().float().to(device), None)
        y.backward(x_like().float().to(device))
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
        found.append((y.detach(), gradient))
    budget = 1e-5 if device == "cpu" else 1e-2  # a GPU may compute float32 products in tf32
    for of_reference, of_kernel in zip(*found, strict=True):
        assert (of_kernel - of_reference).abs().amax() <= budget * of_reference.abs().amax()


def test_both_learn_as_large_and_resume_continues_exactly(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, *more in ((whole, "--steps", "100"), (parts, "--steps", "50"), (parts, "--steps", "100", "--resume")):
        done = run(out, *more)
        assert done.returncode == 0, done.stderr
        for text in ("slstm, T=16, B=8, H=16 in 2 heads", "2 heads, bfloat16, on sm_90", "bits per character"):
            assert text in done.stdout
    found = metrics(whole)
    assert found == metrics(parts)
    assert 1 <= found["LSTM"]["parameters"] / found["xLSTM"]["parameters"] < 1.3  # steps of 8 units of some 16
    for of_one in found.values():
        half, end = of_one["history"]
        assert (half["step"], end["step"]) == (50, 100)
        assert end["valid"] < half["valid"] < 6.0  # 8 is chance
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path):
    """While the first network trains: the second has none yet, and begins at its start."""
    process = examples.start("xlstm_lm", tmp_path, *SMALL, "--steps", "1000000", "--eval-every", "1000000")
    interrupted = examples.interrupt(process)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "with --resume continues exactly" in interrupted.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["lstm"]
    step = torch.load(tmp_path / "lstm/checkpoint.pt", weights_only=True)["step"]
    done = run(tmp_path, "--steps", str(step + 1), "--eval-every", "1000000", "--resume")
    assert done.returncode == 0, done.stderr
    assert [of_one["history"][-1]["step"] for of_one in metrics(tmp_path).values()] == [step + 1] * 2


@pytest.mark.parametrize(
    ("flags", "text"),
    (
        (("--heads", "3"), "--heads 3: expected a divisor of --hidden 16"),
        (("--heads", "0"), "argument --heads: expected a positive integer, got 0"),
        (("--blocks", "x"), "argument --blocks: invalid positive value: 'x'"),
        (("--backend", "torch"), "--backend torch: torch has no sLSTM"),
        (("--batch", "99999"), "--batch 99999 x --window 16 needs more text"),
        (("--resume",), "--resume: there is no checkpoint at"),
    ),
)
def test_wrong_arguments_end_in_one_line(flags, text, tmp_path):
    done = run(tmp_path / "out", *flags)
    assert done.returncode != 0
    assert text in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_resume_refuses_other_heads(tmp_path):
    assert run(tmp_path, "--steps", "2").returncode == 0
    done = run(tmp_path, "--steps", "4", "--heads", "4", "--resume")
    assert done.returncode == 1
    assert "the checkpoint has --heads 2, got 4" in done.stderr
