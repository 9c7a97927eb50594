"""A GPU that refuses launches: "auto" takes what comes next, says so once and remembers; a name gets an error."""

import re

from ..support.versions import NEEDS_CLUSTERS
from .test_launcher import child

pytestmark = NEEDS_CLUSTERS
CLUSTER = {"cluster": 16, "cooperative": 0, "error": 0}
COOPERATIVE = {"cluster": 1, "cooperative": 1, "error": 0}
REFUSED_CLUSTER = CLUSTER | {"error": 912}
REFUSED_COOPERATIVE = COOPERATIVE | {"error": 720}
CLUSTERS_REFUSED = re.escape("stand-in refused 16 programs (clusters of 16, 8 warps each): a kernel launch error has")


def scenario(name: str) -> list[dict]:
    return child(name, module="tests.support.launcher.refused")


def test_auto_takes_the_next_tier_warns_once_and_remembers_it():
    first, again, other_size = scenario("next_tier")
    assert first["launches"] == other_size["launches"] == [REFUSED_CLUSTER, COOPERATIVE]
    assert again["launches"] == [COOPERATIVE]
    (warning,) = first["warnings"]
    assert re.match(f"backend='auto' runs the cooperative kernel: {CLUSTERS_REFUSED}", warning)
    assert again["warnings"] == other_size["warnings"] == []  # the same reason
    assert first["error"] is again["error"] is other_size["error"] is None


def test_auto_takes_torchs_kernel_where_all_are_refused():
    first, again = scenario("torchs_own")
    assert first["launches"] == [REFUSED_CLUSTER, REFUSED_COOPERATIVE] and again["launches"] == []
    assert first["by torch"] and again["by torch"] and again["warnings"] == []
    why = f"runs torch's own kernel: resident: .*; cluster: {CLUSTERS_REFUSED}.*; cooperative: .* too many blocks"
    assert re.search(why, first["warnings"][-1])


def test_a_named_backend_gets_an_error_every_time():
    *named, auto = scenario("named")
    assert [record["launches"] for record in named] == [[REFUSED_CLUSTER], [REFUSED_CLUSTER], [REFUSED_COOPERATIVE]]
    for record in named[:2]:
        assert re.match(f"fastrnn.LaunchRefusedError: backend='cluster': {CLUSTERS_REFUSED}", record["error"])
    assert re.search("'cooperative': stand-in refused 32 programs .8 warps each.: too many", named[2]["error"])
    assert all(record["warnings"] == [] for record in named)
    assert auto["launches"] == [] and auto["by torch"] and auto["error"] is None


def test_a_refusal_in_backward_is_an_error_once():
    """Forward has run by then; "auto" plans both passes anew in the next call."""
    first, again = scenario("in_backward")
    assert first["launches"] == [CLUSTER, REFUSED_CLUSTER] and "fastrnn.LaunchRefusedError" in first["error"]
    assert again["launches"] == [COOPERATIVE] * 2 and again["error"] is None


def test_what_does_not_fit_a_program_is_refused_before_a_launch():
    (record,) = scenario("too_much_shared_memory")
    assert record["launches"] == [] and record["by torch"]
    assert "out of resource: shared memory" in record["warnings"][-1]


def test_the_planner_asks_the_driver_and_nothing_is_refused():
    (record,) = scenario("known_before")
    assert record == {"launches": [COOPERATIVE], "warnings": [], "error": None, "by torch": False, "remembered": 0}


def test_other_errors_are_no_refusals():
    (record,) = scenario("another_error")
    assert record["error"] == "RuntimeError: Triton Error [CUDA]: unknown error" and record["remembered"] == 0


def test_a_refusal_that_is_not_remembered_ends_in_an_error():
    (record,) = scenario("forgetful")
    assert record["launches"] == [REFUSED_CLUSTER] * 4 and "fastrnn.LaunchRefusedError" in record["error"]


def test_torch_compile_traces_what_the_driver_said_and_refused():
    assert [record["cluster"] for record in scenario("compiled")] == [1, 0]
