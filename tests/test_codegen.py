"""What the compiler makes of the planned kernels, for GPUs that are not here: the launcher's own arguments, compiled.

Run in processes of its own, since this one may interpret. `python -m bench.cross_compile` prints the whole table.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastrnn.device import DeviceSpec
from fastrnn.kernels.cells import CELLS
from fastrnn.reference import GATES

ROOT = Path(__file__).parents[1]


def compile_table(*flags: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "bench.cross_compile", "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# What is compiled, by bench.cross_compile's flags, for each architecture, and how many rows at least have a plan.
# Resident: the largest sizes that each limit admits, a padded one and the smallest. Cooperative: sizes aligned and not,
# narrow and wide tiles, shares in one piece and in several, up to where shared memory ends.
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
GRID = [
    ("--backend resident --cell lstm gru --hidden 7 64 100 128", 12),
    ("--backend cooperative --cell lstm --hidden 192 650 --dtype bfloat16 float32 --precision tf32 ieee", 6),
    ("--backend cooperative --cell gru --hidden 384 --dtype float16 float32 --precision tf32", 2),
    ("--backend cooperative --cell gru lstm --hidden 512 --batch 64 --dtype bfloat16", 2),
    ("--backend cooperative --cell gru rnn_relu --hidden 1000 1500 2048 --dtype bfloat16", 4),
]


@pytest.mark.parametrize(("flags", "least"), GRID)
@pytest.mark.parametrize("arch", ARCHS)
def test_planned_kernels_compile_without_spilling_or_reloading_weights(arch, flags, least):
    rows = [row for row in compile_table("--arch", arch, *flags.split()) if "missing" not in row]
    assert len(rows) >= least
    for row in rows:
        forward, G = row["pass"] == "forward", GATES[row["cell"]]
        has_tensor_core = row["dtype"] != "float32" or row["precision"] == "tf32" or arch.startswith("gfx")
        # x_gates of the next step; backward: the kept state, dy and the saved tiles. Not W_hh.
        inputs = G if forward else 2 + CELLS[row["cell"]].saved
        exchanged = 0 if row["backend"] == "resident" else row["pieces"] * (1 if forward else G)
        # A tile that is smaller than the program's threads Triton may load twice, the kept state in two layouts.
        twice = not forward and 16 * row["units"] < 32 * row["warps"]
        assert row["loads"] == inputs + exchanged + row["polls"] + twice, row
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["shared_planned"] <= DeviceSpec.named(arch).shared_bytes, row
        assert (row["tensor_core"] > 0) == has_tensor_core, row


def test_the_plan_of_the_issue_compiles_clean():
    """GRU, H=1024, B=64, bf16 on an H100: 32 slices of 32 units for 4 batch tiles."""
    flags = "--arch sm_90 --backend auto --cell gru --hidden 1024 --batch 64 --dtype bfloat16"
    rows = compile_table(*flags.split())
    assert [(row["backend"], row["programs"], row["spilled"]) for row in rows] == [("cooperative", 128, 0)] * 2


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


def test_the_first_choice_without_spills_is_taken_and_kept():
    from fastrnn import compiler

    class Kernel:
        def __init__(self, spills):
            self.spills, self.asked = spills, []

        def warmup(self, *, grid, maxnreg=None):
            self.asked.append(maxnreg)
            return types.SimpleNamespace(_init_handles=lambda: None, n_spills=self.spills[maxnreg])

    choices = [{}, {"maxnreg": 255}, {"maxnreg": 247}]
    for spills, taken, asked in (
        ({None: 0}, {}, [None]),
        ({None: 2, 255: 0}, {"maxnreg": 255}, [None, 255]),
        ({None: 9, 255: 3, 247: 4}, {"maxnreg": 255}, [None, 255, 247]),
    ):
        kernel = Kernel(spills)
        for _ in range(2):
            assert compiler.first_without_spills(kernel, "variant", choices, (), (1,), {}) == taken
        assert kernel.asked == asked
