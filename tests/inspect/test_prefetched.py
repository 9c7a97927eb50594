"""What a step reads is in L2 when it is loaded: by the lines that compiled kernels name, and by simulation."""

import json

import pytest

from ..support import children
from ..support.microbenchmarks import MICROBENCHMARKS
from ..support.versions import NEEDS_CLUSTERS


def checked(cell: str, H: int, *options: str) -> dict:
    done = children.run(["-m", "bench.prefetched", "--check", cell, str(H), *options], errors=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("cell", "H"),
    (
        ("rnn_tanh", 64),
        pytest.param("gru", 128, marks=NEEDS_CLUSTERS),
        pytest.param("lstm", 64, marks=pytest.mark.wide),
        pytest.param("lstm", 100, marks=[pytest.mark.wide, NEEDS_CLUSTERS]),
    ),
)
def test_every_line_is_prefetched_before_its_step(cell, H):
    """Three steps; the kept states, which backward reads a step early, two. So device memory costs nothing."""
    found = checked(cell, H)
    assert set(found["forward"]["steps"]) == {"3"} and set(found["backward"]["steps"]) == {"3", "2"}
    for which in found.values():
        assert which["memory"] <= 1.05 * which["L2"]


def test_another_distance_is_noticed():
    nearer = checked("rnn_tanh", 64, "--ahead", "3")
    assert set(nearer["forward"]["steps"]) == {"2"} and set(nearer["backward"]["steps"]) == {"2", "1"}
    none = checked("rnn_tanh", 64, "--ahead", "1")  # of what is loaded already
    assert none["forward"]["memory"] > 1.5 * none["forward"]["L2"]
    assert none["backward"]["memory"] > 1.5 * none["backward"]["L2"]


def test_a_prefetch_is_simulated():
    """Loads of one chain from memory, each prefetched three before it, take what they take from L2."""

    def step(name: str, is_cached: bool = False) -> float:
        return MICROBENCHMARKS[name].simulated(is_cached).cycles

    ahead, late = "L2 in a chain, prefetched", "L2 in a chain, prefetched too late"
    assert step(ahead) == pytest.approx(step(ahead, is_cached=True), abs=2)
    assert step(ahead) == pytest.approx(step("L2 in a chain", is_cached=True), rel=0.1)
    assert step(ahead) + 20 < step(late) < step("L2 in a chain")
