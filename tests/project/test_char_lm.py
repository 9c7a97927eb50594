"""The example as a user runs it: it learns, resumes exactly, survives Ctrl-C, and refuses wrong arguments."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from ..support import examples

SMALL = (
    "--hidden",
    "24",
    "--embedding",
    "8",
    "--batch",
    "8",
    "--window",
    "16",
    "--eval-every",
    "100",
    "--sample",
    "40",
    "--threads",
    "1",
)


def start(out: Path, *flags: str) -> subprocess.Popen:
    return examples.start("char_lm", out, *SMALL, *flags)


def run(out: Path, *flags: str) -> subprocess.CompletedProcess:
    return examples.run("char_lm", out, *SMALL, *flags)


def history(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("flags", (("--cell", "gru"), ("--cell", "lstm", "--layers", "2", "--dropout", "0.2")), ids=str)
def test_resume_continues_exactly(flags, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, *more in ((whole, "--steps", "200"), (parts, "--steps", "100"), (parts, "--steps", "200", "--resume")):
        done = run(out, *flags, *more)
        assert done.returncode == 0, done.stderr
    assert [h["step"] for h in history(whole)] == [100, 200]
    assert history(whole) == history(parts)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["model"] for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert history(whole)[1]["valid"] < history(whole)[0]["valid"] < 6.0  # 8 is chance
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU runs the kernels themselves: nothing to compare on the CPU"
)
def test_prints_the_plan_and_that_kernels_agree(tmp_path):
    done = run(tmp_path, "--cell", "rnn", "--steps", "20")
    assert done.returncode == 0, done.stderr
    for text in ("CPU tensors take torch's own kernel", "Triton kernels in the interpreter", "they agree",
                 "on sm_90: backend resident", "bits per character; curve in"):  # fmt: skip
        assert text in done.stdout


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path):
    process = start(tmp_path, "--steps", "1000000", "--eval-every", "1000000")
    interrupted = examples.interrupt(process)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "with --resume continues exactly" in interrupted.stdout
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 1 and not (tmp_path / ".checkpoint.pt").exists()
    done = run(tmp_path, "--steps", str(step + 1), "--eval-every", "1000000", "--resume")
    assert done.returncode == 0, done.stderr
    assert history(tmp_path)[-1]["step"] == step + 1


@pytest.mark.parametrize(
    ("flags", "text"),
    (
        (("--steps", "0"), "expected a positive integer, got 0"),
        (("--hidden", "x"), "argument --hidden: invalid positive value: 'x'"),
        (("--cell", "mgu"), "argument --cell: invalid choice: 'mgu'"),
        (("--backend", "tpu"), "argument --backend: invalid choice: 'tpu'"),
        (("--resume",), "--resume: there is no checkpoint at"),
        (("--batch", "99999"), "--batch 99999 x --window 16 needs more text"),
        (("--dropout", "2"), "--dropout: expected a number from 0 to 1, got 2"),
        (("--device", "warp"), "--device"),
    ),
)
def test_wrong_arguments_end_in_one_line(flags, text, tmp_path):
    done = run(tmp_path, *flags)
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_resume_refuses_another_configuration(tmp_path):
    assert run(tmp_path, "--cell", "rnn", "--steps", "2").returncode == 0
    done = run(tmp_path, "--cell", "gru", "--steps", "4", "--resume")
    assert done.returncode == 1
    assert "the checkpoint has --cell rnn, got gru" in done.stderr
