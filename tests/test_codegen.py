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


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"))
def test_planned_kernels_compile_without_spilling_or_reloading_weights(arch):
    # The largest sizes that each tier limit admits, a padded one, and the smallest.
    rows = compile_table("--arch", arch, "--cell", "lstm", "gru", "--hidden", "7", "64", "100", "128")
    compiled = [row for row in rows if "missing" not in row]
    assert len(compiled) >= 12
    for row in compiled:
        forward, G = row["pass"] == "forward", GATES[row["cell"]]
        has_tensor_core = row["dtype"] != "float32" or row["precision"] == "tf32" or arch.startswith("gfx")
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["shared_planned"] <= DeviceSpec.named(arch).shared_bytes, row
        # x_gates of the next step; backward: the kept state, dy and four saved tiles. Not W_hh.
        assert row["loads"] == (G if forward else 6), row
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
