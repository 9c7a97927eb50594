"""The examples as a user runs them: each learns what chance does not know, and leaves whole files or none.

test_char_lm.py has the language model's own.
"""

import importlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn

from ..support import examples
from ..support.examples import ROOT

TINY = {
    "classify": ("--hidden", "16", "--epochs", "5", "--batch", "64"),
    "forecast": ("--hidden", "8", "--steps", "40", "--batch", "8", "--lr", "1e-2"),
    "memory": ("--lengths", "4", "--hidden", "16", "--steps", "150"),
    "rollout": ("--hidden", "16", "--corridor", "3", "--mazes", "32", "--steps", "24", "--rollouts", "40"),
}
ENDLESS = {"classify": "--epochs", "forecast": "--steps", "memory": "--steps", "rollout": "--rollouts"}


def metrics(name: str, out: Path) -> dict:
    """Those of a run that went well and wrote a figure beside them, and nothing else."""
    done = examples.run(name, out, *TINY[name])
    assert done.returncode == 0, done.stderr
    assert "%|" in done.stderr  # a progress bar
    found, figure = sorted(out.iterdir(), key=lambda path: path.suffix)
    assert figure.read_bytes().startswith(b"\x89PNG") and str(figure) in done.stdout
    return json.loads(found.read_text())


def imported(name: str, monkeypatch: pytest.MonkeyPatch):
    """An example as a module of this process; its arguments' --threads are not for the tests that follow."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return importlib.import_module(name)


def test_classify_beats_chance(tmp_path):
    found = metrics("classify", tmp_path / "out")
    confusion = found["confusion"]
    assert sum(map(sum, confusion)) == 450
    assert found["accuracy"] == sum(confusion[i][i] for i in range(10)) / 450 > 2 * found["chance"]


def test_forecast_beats_last_year(tmp_path):
    found = metrics("forecast", tmp_path / "out")
    gru, naive, _ = found["mean_absolute_error"].values()
    assert gru < 0.7 * naive
    assert abs(found["coverage"] - found["intended_coverage"]) < 0.15


def test_memory_shows_what_gates_do(tmp_path):
    found = metrics("memory", tmp_path / "out")
    relative = {(row["problem"], row["cell"]): row["loss"] / row["baseline"] for row in found["losses"]}
    assert len(relative) == 6
    assert all(relative[problem, cell] < 0.6 for problem in ("adding", "copy") for cell in ("gru", "lstm"))
    for cell in ("gru", "lstm"):
        kept, default = (found["gradients"][cell][when] for when in ("gates biased to keep", "as torch.nn initializes"))
        assert kept[0] / kept[-1] > default[0] / default[-1]


def test_rollout_learns_to_remember(tmp_path):
    found = metrics("rollout", tmp_path / "out")
    assert found["right_turns"] > 0.85 and found["without_memory"] == 0.5
    assert found["acting_and_learning_differ"] < 1e-5  # fp32's rounding


def test_rollout_notices_a_missing_reset(monkeypatch, capsys):
    """Its own check of acting against learning: a state that crosses from one episode to the next fails it."""
    rollout = imported("rollout", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["rollout.py", *TINY["rollout"], "--rollouts", "3"])
    forward = fastrnn.GRU.forward

    def only_one_step(self, input, hx=None, reset=None):
        return forward(self, input, hx, reset=reset if len(input) == 1 else None)

    monkeypatch.setattr(fastrnn.GRU, "forward", only_one_step)
    with pytest.raises(SystemExit, match="acting and learning differ by"):
        rollout.main()


def test_rollout_in_two_processes_trains_one_policy(tmp_path):
    """Each with mazes of its own; the example itself compares their parameters, bit by bit."""
    # Addressed by number, since a machine may not know its own name.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "examples/rollout.py", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *TINY["rollout"]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the last episodes end with the right turn") == 1  # one of them speaks
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["processes"] == 2 and found["right_turns"] > 0.85


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# Run an example where fastrnn is not installed: without paths that have it.
BARE = """
import runpy, sys
from pathlib import Path
folder = str(Path(sys.argv[1]).parent)
sys.path[:] = [folder] + [p for p in sys.path if not (Path(p) / "fastrnn").exists()]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ("char_lm", "rollout"))
def test_from_a_bare_checkout(name, tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", BARE, str(ROOT / f"examples/{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout, done.stderr


@pytest.mark.parametrize("name", TINY)
def test_ctrl_c_leaves_what_was_there(name, tmp_path):
    before = tmp_path / "metrics.json"
    before.write_text("of a run before")
    done = examples.interrupt(examples.start(name, tmp_path, ENDLESS[name], "1000000"))
    assert done.returncode == 130, done.stderr
    assert "interrupted: nothing was written" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [before] and before.read_text() == "of a run before"


@pytest.mark.parametrize("is_terminal", (True, False))
def test_a_progress_bar_does_not_flood_a_log(is_terminal, monkeypatch):
    """100 steps of a second each: on a terminal all are drawn, in a log each tenth, on a line of its own."""
    common, stderr, now = imported("common", monkeypatch), io.StringIO(), [0.0]
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    with common.progress(range(100), desc="train") as bar:
        for step in bar:
            now[0] += 1
            bar.set_postfix_str(f"loss {step}")
    written = stderr.getvalue()
    if is_terminal:
        assert written.count("\r") >= 100
    else:
        lines = written.splitlines()
        assert len(lines) == 11 and "\r" not in written and written.endswith("\n")
        assert all(f"loss {n}" in line for n, line in zip((*range(9, 100, 10), 99), lines, strict=True))


def test_every_example_takes_that_bar():
    sources = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert [name for name, source in sources.items() if "tqdm" in source] == ["common.py"]
    assert "common.py" in sources and sum("progress(" in source for source in sources.values()) == 6


def test_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    common = imported("common", monkeypatch)
    path = tmp_path / "folder" / "figure.png"
    with common.whole(path) as part:
        part.write_text("first")
    with pytest.raises(KeyboardInterrupt), common.whole(path) as part:
        part.write_text("sec")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == [path] and path.read_text() == "first"


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    (
        ("classify", ("--epochs", "0"), "argument --epochs: expected a positive integer, got 0"),
        ("classify", ("--lr", "-1"), "argument --lr: expected a positive number, got -1"),
        ("classify", ("--lr", "nan"), "argument --lr: expected a positive number, got nan"),
        ("classify", ("--device", "warp"), "--device warp: expected cpu"),
        ("classify", ("--backend", "tpu"), "argument --backend: invalid choice: 'tpu'"),
        ("forecast", ("--window", "99999"), "--window 99999: expected at most"),
        ("forecast", ("--steps", "many"), "argument --steps: invalid positive value: 'many'"),
        ("forecast", ("--out", __file__), "expected a folder, got a file"),
        ("memory", ("--lengths", "9", "1"), "--lengths 1: expected at least 2"),
        ("rollout", ("--mazes", "0"), "argument --mazes: expected a positive integer, got 0"),
        ("rollout", ("--cell", "mgu"), "argument --cell: invalid choice: 'mgu'"),
        ("rollout", ("--clip", "1.5"), "argument --clip: expected a number from 0 to 1, got 1.5"),
        ("memory", ("--lengths",), "argument --lengths: expected at least one argument"),
    ),
)
def test_wrong_arguments_end_in_one_line(name, flags, text, tmp_path):
    done = examples.run(name, tmp_path / "out", *flags)
    assert done.returncode == 2
    assert text in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
