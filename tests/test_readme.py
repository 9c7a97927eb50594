"""What the README says: its code runs, and its table is what the planner answers."""

import re
from pathlib import Path

import torch

import fastrnn

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "backend resident" in capsys.readouterr().out


def largest(cell: str, arch: str, dtype: torch.dtype, precision: str) -> int:
    sizes = {"batch_size": 1, "dtype": dtype, "device": arch, "precision": precision}
    return max(H for H in range(16, 2049, 16) if fastrnn.plan(cell, hidden_size=H, **sizes).backend == "resident")


def test_table_of_what_fits():
    rows = [row for row in README.splitlines() if re.match(r"\| (sm_|gfx)", row) and row.count("|") == 5]
    archs = set()
    for row in rows:
        names, *cells = (text.strip() for text in row.strip("|").split("|"))
        for arch in names.split(", "):
            archs.add(arch)
            for text, (dtype, precision) in zip(
                cells, ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")), strict=True
            ):
                found = " / ".join(str(largest(cell, arch, dtype, precision)) for cell in ("lstm", "gru", "rnn_tanh"))
                assert text in (found, "as ieee"), (arch, dtype, precision)
    assert len(archs) == 9


def test_table_of_the_cooperative_tier():
    rows = [row for row in README.splitlines() if re.match(r"\| (sm_|gfx)", row) and row.count("|") == 4]
    assert len(rows) == 5
    for row in rows:
        arch, *cells = (text.strip() for text in row.strip("|").split("|"))
        for text, (dtype, precision) in zip(cells, ((torch.bfloat16, "ieee"), (torch.float32, "tf32")), strict=True):
            sizes = {"batch_size": 16, "dtype": dtype, "device": arch, "precision": precision}
            for cell, stated in zip(("lstm", "gru", "rnn_tanh"), map(int, text.split(" / ")), strict=True):
                assert fastrnn.plan(cell, hidden_size=stated, **sizes).backend != "torch"
                assert all(
                    fastrnn.plan(cell, hidden_size=H, **sizes).backend == "torch" for H in range(stated + 32, 4096, 32)
                )
