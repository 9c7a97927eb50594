"""The planner's choices against what was measured, and the tables that docs/performance.md shows of it."""

from collections import defaultdict

import pytest

from bench import DOCUMENT, measured
from fastrnn.planning.tiers import TIERS


def slower_than_the_best() -> dict[tuple[str, int], float]:
    """By cell and H, both passes' time of the form that is planned over that of the fastest that was measured."""
    both: dict[tuple, dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in measured.records("forms"):
        if "us" in record:
            passes = both[record["cell"], record["H"]][record["ctas"], record["warps"]]
            passes[record["pass"]] = min(record["us"], passes.get(record["pass"], record["us"]))
    ratios = {}
    for (cell, hidden), kernels in both.items():
        best = min(sum(passes.values()) for passes in kernels.values() if len(passes) == 2)
        with measured.tiles_of_16_rows():
            planned = [measured.today(cell, hidden, which) for which in ("forward", "backward")]
        ratios[cell, hidden] = sum(planned) / best
    return ratios


def test_what_is_planned_is_close_to_the_fastest_that_was_measured():
    ratios = slower_than_the_best()
    assert len(ratios) == 10
    assert {where: ratio for where, ratio in ratios.items() if ratio > 1.06} == {}


@pytest.fixture
def forgotten():
    """Plans are made anew, and forgotten again."""

    def forget() -> None:
        for tier in TIERS.values():
            tier.plan.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("forgotten")
def test_another_number_of_warps_is_noticed(mutate):
    mutate({"fastrnn.planning.cluster.held": ("min(8, block_h // 8)", "16")})
    with measured.tiles_of_16_rows():
        passes = [measured.today("lstm", 256, which) for which in ("forward", "backward")]
    assert sum(passes) > 1.06 * (1.3107 + 1.3258)


def test_tiles_of_8_rows_were_not_measured():
    assert measured.today("lstm", 256, "forward") is None


def test_the_document_shows_the_records():
    text = DOCUMENT.read_text()
    for name, table in measured.TABLES.items():
        assert "\n".join([f"<!-- python -m bench.measured --write: {name} -->", *table(), "<!-- end -->"]) in text
