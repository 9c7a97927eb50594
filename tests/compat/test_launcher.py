"""What reaches the driver when fastrnn launches: Triton's own launcher on a driver of ours, and launches gone wrong."""

import json

import pytest

from ..support import children
from ..support.versions import NEEDS_CLUSTERS

# (H, D, of a cluster: programs), by tier, and the grid that the driver is asked for; B = 17 where D = 2, else 3.
GRIDS = {
    "resident": {(24, 2, 1): [3, 2, 1], (64, 1, 1): [1, 1, 1]},
    "cluster": {(128, 2, 4): [12, 2, 1], (256, 1, 8): [8, 1, 1], (512, 1, 16): [16, 1, 1]},
    "cooperative": {(262, 2, 1): [17, 3, 2], (264, 1, 1): [17, 1, 1]},
}


def child(*arguments: str, module: str = "tests.support.launcher.run") -> list[dict]:
    done = children.run(["-m", module, *arguments])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("tier", ("resident", pytest.param("cluster", marks=NEEDS_CLUSTERS), "cooperative"))
def test_launches_reach_the_driver_as_planned(tier):
    """Both passes of LSTM and GRU, plain and with lengths and resets: each argument in the place of its parameter."""
    records = child("launches", tier)
    assert {record["pass"] for record in records} == {"forward", "backward"}
    assert {record["cell"] for record in records} == {"lstm", "gru"} and len({r["kind"] for r in records}) == 4
    for record in records:
        assert record["faults"] == [], record
    assert {(r["H"], r["D"], r["cluster"]): r["grid"] for r in records} == GRIDS[tier]
    # Lengths and resets bring pointers of their own; those that a call lacks are no parameters.
    parameters = {
        kind: max(len(r["sizes"]) for r in records if r["kind"] == kind) for kind in {r["kind"] for r in records}
    }
    assert parameters["plain"] + 4 <= parameters["lengths, resets by step"]


@pytest.mark.parametrize("tier", ("resident", pytest.param("cluster", marks=NEEDS_CLUSTERS), "cooperative"))
def test_a_launch_past_the_binder_is_the_same(tier):
    """Grid, threads, memory, stream, attributes, sizes and values of parameters; only the binder was not asked."""
    records = child("again", tier)
    assert len(records) >= 2
    for record in records:
        assert record["differ"] == ["bound"], record
        assert sum(parameter is not None and parameter > 1 << 20 for parameter in record["given"]) >= 4


def test_launches_changed_on_their_way_are_noticed():
    records = child("mutations")
    assert len(records) > 8
    for record in records:
        assert any(record["expected"] in noticed for noticed in record["noticed"]), record


def test_the_hosts_time_is_counted():
    for record in child("count"):
        assert record["forward"] > 0 and record["backward"] > 0
