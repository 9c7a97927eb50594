"""Compiled kernels of fastrnn, executed on the CPU: outputs, gradients, schedules, windows, and PTX that was broken."""

import json

import pytest
import torch

from fastrnn.compat import interpreter, spills
from fastrnn.planning.tiers import TIERS

from ..support import children
from ..support.cases import CELLS, Problem, beyond_budget, over_budget
from ..support.versions import HAS_CLUSTERS, NEEDS_CLUSTERS
from ..support.width import wide


def child(*arguments: str) -> list[dict]:
    done = children.run(["-m", "tests.support.executed", *arguments])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "command",
    (
        "kernels sm_80 resident",
        "kernels sm_90 cooperative",
        "kernels sm_100 cluster",
        "tile sm_90 resident",
        "rows sm_90 resident 16",
        "rows sm_90 resident 32",
        "rows sm_90 cluster 64",
        wide("rows sm_90 cluster 16"),
        wide("rows sm_90 cluster 32"),
        wide("kernels sm_80 cooperative"),
        wide("kernels sm_90 resident"),
        wide("kernels sm_90 cluster"),
        wide("kernels sm_100 resident"),
        wide("kernels sm_100 cooperative"),
        wide("tile sm_90 cooperative"),
    ),
)
def test_compiled_kernels_compute_what_the_reference_does(command):
    """Outputs, final states and every gradient, from the PTX of both passes, under a schedule a cell."""
    records = child(*command.split())
    assert {record["cell"] for record in records} == set(CELLS)
    for record in records:
        assert record["faults"] == {} and not record.get("spills"), record


@pytest.mark.parametrize("backend", TIERS)
def test_compiled_kernels_run_sequences_of_their_own(backend):
    """Lengths and resets, dense and ragged, with gradients of the states that segments start from."""
    records = child("sequences", "sm_90", backend, "by step")
    assert len(records) == 4
    for record in records:
        assert record["faults"] == {} and record["spills"] == [], record


def test_compiled_parts_of_a_batch_have_the_bits_of_the_whole():
    whole, parts, less = child("parts", "sm_90")
    assert whole["grids"] == [[17, 3, 1]] * 2 and parts["grids"] == [[17, 1, 1]] * 6
    assert whole["differ"] == parts["differ"] == []
    assert {"y", "h_n", "d_x_gates"} <= set(less["differ"])  # the last part of forward was not run


@pytest.mark.parametrize("backend", TIERS)
def test_compiled_kernels_take_absent_states_for_zeros(backend):
    records = child("absent", "sm_90", backend)
    assert len(records) == 3
    for record in records:
        assert record["faults"] == {} and record["differ"] == [], record


@pytest.mark.parametrize("H", (64, 192, 1024, *(wide(H) for H in (96, 128, 256, 384, 512))))
def test_plans_agree_with_tile_triton_under_the_interpreter(H, tmp_path):
    """Both passes of every cell, from one problem: "auto"'s plans for sm_90 executed, tile Triton interpreted."""
    planned = {record["cell"]: record["backend"] for record in child("plans", str(H), str(tmp_path))}
    tier = "resident" if H <= 128 else "cluster" if H <= 256 and HAS_CLUSTERS else "cooperative"
    of_gru = "cluster" if H == 512 and HAS_CLUSTERS else tier  # by price: in full clusters, where W_hh of a GRU fits
    assert (planned["lstm"], planned["gru"]) == (tier, of_gru)
    for cell in CELLS:
        inputs, upstream, executed = torch.load(tmp_path / f"{cell}.pt")
        problem = Problem(cell, inputs, upstream)
        assert beyond_budget(problem, executed) == {}
        if interpreter.ENABLED:  # which holds any H in one program, as a GPU does not
            assert over_budget(problem) == {}


@NEEDS_CLUSTERS
@pytest.mark.parametrize("count", (10, wide(50)))
def test_clusters_are_right_under_many_schedules(count):
    records = child("schedules", "sm_90", "cluster", str(count))
    assert len(records) == count * len(CELLS)
    assert [record for record in records if record["faults"]] == []


@pytest.mark.skipif(spills.triton_version() < (3, 9), reason="breaks PTX as Triton 3.9 writes it")
def test_broken_ptx_is_noticed():
    records = child("mutations")
    assert len(records) > 8
    for record in records:
        assert record["noticed"] and record["noticed"].startswith(record["expected"]), record


@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_compiled_windows_give_the_bits_of_one_run(backend):
    """What checkpoint_every and the wavefront rest on; a state that is rounded between the windows is noticed."""
    *exact, rounded = child("windows", "sm_90", backend)
    assert [record["differ"] for record in exact] == [[], []]
    assert rounded["kept"] == "torch.bfloat16" and rounded["differ"]
