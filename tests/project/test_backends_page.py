"""The sizes in docs/backends.md are those that the planner answers; test_docs.py runs the page's code."""

import re
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn.device import DeviceSpec

KINDS = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))  # the tables' columns
PAGE = (Path(__file__).parents[2] / "docs/backends.md").read_text()


def largest(cell: str, arch: str, dtype: torch.dtype, precision: str, tier: str) -> int:
    def holds(H: int) -> bool:
        sizes = {"hidden_size": H, "batch_size": 1, "dtype": dtype, "device": arch, "precision": precision}
        try:
            return fastrnn.plan(cell, **sizes, backend=tier).backend == tier
        except NotImplementedError:
            return False

    return max(H for H in range(16, 2049, 16) if holds(H))


@pytest.mark.parametrize(("tier", "count"), (("resident", 9), ("cluster", 3)))
def test_table_of_what_fits(tier, count):
    rows = [row for row in PAGE.splitlines() if re.match(r"\| (sm_|gfx)", row) and "batch 16" not in row]
    archs = set()
    for row in (row for row in rows if ("cluster" in row) == (tier == "cluster")):
        names, *cells = (text.strip() for text in row.strip("|").split("|"))
        for arch in names.removesuffix(", cluster").split(", "):
            archs.add(arch)
            for text, (dtype, precision) in zip(cells, KINDS, strict=tier == "resident"):
                found = " / ".join(
                    str(largest(cell, arch, dtype, precision, tier)) for cell in ("lstm", "gru", "rnn_tanh")
                )
                assert text in (found, "as ieee"), (arch, dtype, precision)
    assert len(archs) == count


def test_table_of_the_cooperative_tier():
    rows = [row for row in PAGE.splitlines() if re.match(r"\| (sm_|gfx)", row) and "batch 16" in row]
    assert len(rows) == 5
    for row in rows:
        arch, *cells = (text.strip() for text in row.replace(", batch 16", "").strip("|").split("|"))
        for text, (dtype, precision) in zip(cells, KINDS, strict=True):
            if text == "as ieee":
                assert not DeviceSpec.named(arch).has_tf32
                continue
            sizes = {"batch_size": 16, "dtype": dtype, "device": arch, "precision": precision}
            for cell, stated in zip(("lstm", "gru", "rnn_tanh"), map(int, text.split(" / ")), strict=True):
                for H in range(32, 4096, 32):
                    plan = fastrnn.plan(cell, hidden_size=H, **sizes)  # torch's kernel may cost less than one that fits
                    fits = {plan.backend, *(price.backend for price in plan.prices)} != {"torch"}
                    assert fits == (stated >= H), (arch, cell, dtype, precision, H)
