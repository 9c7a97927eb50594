"""What the compiler makes of the planned kernels, for GPUs that are not here: the launcher's own arguments, compiled.

bench/inspect_table.py makes the table. `make snapshots` writes it anew; `make inspect` compiles what may be planned.
"""

import json
import re
import types
from importlib.metadata import version

import pytest

from bench import inspect_table
from bench.inspect_table import ARCHS, GROUPS
from fastrnn.device import DeviceSpec

from ..support import children, versions


@pytest.mark.skipif(
    inspect_table.snapshot()[0] != version("triton"), reason="another Triton makes other code; see `make matrix`"
)
@pytest.mark.one_in(len(ARCHS))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("arch", ARCHS)
def test_planned_kernels_compile_clean_and_as_committed(arch, group):
    """No spill, no load of W_hh in the time loop, memory within limits, tensor cores; and the snapshot's figures."""
    rows = inspect_table.compile_group(group, arch, GROUPS[group], children.run)
    assert [(row, found) for row in rows if (found := inspect_table.faults(row))] == []
    _, committed = inspect_table.snapshot()
    committed = [row for row in committed if (row["arch"], row["group"]) == (arch, group)]
    assert rows == committed, "`make snapshots` writes the table anew, for a reviewer to read the difference"


def test_the_snapshot_covers_all_tiers_on_every_architecture():
    _, rows = inspect_table.snapshot()
    for arch in ARCHS:
        compiled = [row for row in rows if row["arch"] == arch and "missing" not in row]
        tiers = {"resident", "cooperative"} | ({"cluster"} if DeviceSpec.named(arch).cluster_limit > 1 else set())
        assert {row["backend"] for row in compiled} == tiers
        assert len(compiled) >= 40
    assert not any(inspect_table.faults(row) for row in rows)


def test_the_plan_of_the_issue_compiles_clean():
    """GRU, H=1024, B=64, bf16 on an H100: 32 slices of 32 units for 4 batch tiles."""
    _, rows = inspect_table.snapshot()
    rows = [row for row in rows if row["group"] == "auto, batch 64" and row["arch"] == "sm_90"]
    assert [(row["backend"], row["programs"], row["spill_bytes"]) for row in rows] == [("cooperative", 128, 0)] * 2


@pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) < (3, 9), reason="gl.bank_conflicts as read in Triton 3.9"
)
def test_sums_in_shared_memory_meet_no_bank_twice():
    done = children.run(["-m", "bench.bank_conflicts"], errors=False)
    assert done.returncode == 0, done.stderr
    assert re.search("[1-9] forms without conflicts\nnoticed: True", done.stdout)


@versions.NEEDS_CLUSTERS
def test_operands_in_shared_memory_meet_no_bank_twice():
    """What notices one that does: test_simulator.py's conflicts of ldmatrix."""
    done = children.run(["-m", "bench.bank_conflicts", "operands"], errors=False)
    assert done.returncode == 0, done.stderr
    seen = re.match(r"(\d+) ldmatrix without conflicts\n", done.stdout)
    assert int(seen[1]) > 100


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spill_bytes", 8),
        ("weight_global_loads_in_loop", 1),
        ("unguarded_remote_accesses", 1),
        ("weight_global_loads", 0),
        ("shared_bytes", 1 << 20),
        ("shared_bytes_planned", 1 << 20),
        ("occupancy", 0),
        ("tensor_core_instructions", {}),
    ],
)
def test_a_fault_in_the_table_is_seen(key, value):
    _, rows = inspect_table.snapshot()
    row = next(row for row in rows if row.get("dtype") == "bfloat16" and "missing" not in row)
    assert inspect_table.faults(row) == []
    assert inspect_table.faults(json.loads(json.dumps(row)) | {key: value}) != []


def test_the_first_choice_without_spills_is_taken_and_kept():
    from fastrnn.compat import spills

    class Kernel:
        def __init__(self, counted):
            self.counted, self.asked = counted, []

        def warmup(self, *, grid, maxnreg=None):
            self.asked.append(maxnreg)
            return types.SimpleNamespace(_init_handles=lambda: None, n_spills=self.counted[maxnreg])

    choices = [{}, {"maxnreg": 255}, {"maxnreg": 247}]
    for counted, taken, asked in (
        ({None: 0}, {}, [None]),
        ({None: 2, 255: 0}, {"maxnreg": 255}, [None, 255]),
        ({None: 9, 255: 3, 247: 4}, {"maxnreg": 255}, [None, 255, 247]),
    ):
        kernel = Kernel(counted)
        for _ in range(2):
            assert spills.first_without_spills(kernel, "variant", choices, (), (1,), {}) == taken
        assert kernel.asked == asked
