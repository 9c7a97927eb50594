"""What the compiler makes of the planned kernels, for GPUs that are not here: the launcher's own arguments, compiled.

Run in processes of its own, since this one may interpret. `python -m bench.cross_compile` prints the whole table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn.device import DeviceSpec
from fastrnn.reference import GATES

ROOT = Path(__file__).parents[1]


def compile_table(*flags: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "bench.cross_compile", "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# The largest sizes that each resident limit admits, a padded one and the smallest; sizes that no power of two is near.
RESIDENT = ("--backend", "resident", "--cell", "lstm", "gru", "--hidden", "7", "64", "100", "128")
COOPERATIVE = ("--backend", "cooperative", "--cell", "lstm", "gru", "--hidden")


# On sm_120 the LSTM's forward still spills at 384 (CHANGELOG.md).
TABLE = [(arch, RESIDENT, 12) for arch in ARCHS] + [
    (arch, (*COOPERATIVE, "192" if arch == "sm_120" else "384"), 4) for arch in ARCHS
]


@pytest.mark.parametrize(("arch", "flags", "least"), TABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_planned_kernels_compile_without_spilling_or_reloading_weights(arch, flags, least):
    rows = [row for row in compile_table("--arch", arch, *flags) if "missing" not in row]
    assert len(rows) >= least
    for row in rows:
        forward, G = row["pass"] == "forward", GATES[row["cell"]]
        has_tensor_core = row["dtype"] != "float32" or row["precision"] == "tf32" or arch.startswith("gfx")
        # x_gates of the next step; backward: the kept state, dy and four saved tiles. Not W_hh.
        inputs = G if forward else 6
        exchanged = 0 if row["backend"] == "resident" else row["pieces"] * (1 if forward else G)
        assert row["loads"] == inputs + exchanged + row["polls"], row
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["shared_planned"] <= DeviceSpec.named(arch).shared_bytes, row
        assert (row["tensor_core"] > 0) == has_tensor_core, row


def test_a_load_inside_the_loop_is_seen():
    """The check itself: a kernel that reads W_hh in every step has its loads counted."""
    from bench.cross_compile import _loads_in_loop

    once = """
    %w = tt.load %p : tensor<16x16x!tt.ptr<f32>>
    %r = scf.for %t = %a to %b step %c : i32 {
      %x = tt.load %q : tensor<16x16x!tt.ptr<f32>>
      %y = scf.if %z {
        scf.yield %x
      }
    } {tt.num_stages = 1}
    %v = tt.load %p
"""
    assert _loads_in_loop(once) == 1
    assert _loads_in_loop(once.replace("%y = scf.if", "%w = tt.load %p\n      %y = scf.if")) == 2
    assert _loads_in_loop(once.replace("tt.load %q", "amdg.buffer_load %q")) == 1
