"""What `make test` leaves to `make test-all` is only wider: it runs every value of every parameter that is thinned."""

from collections import defaultdict
from types import SimpleNamespace

import pytest

from ..conftest import COLLECTED
from ..support import width
from ..support.width import wide


def left_out(items: list[pytest.Item]) -> dict[str, set[tuple[int, int]]]:
    """Of each test with one_in, what none of its cases has that is run: a parametrization and a value's place there."""
    everywhere, run = defaultdict(set), defaultdict(set)
    for item in items:
        if item.get_closest_marker("one_in") and not item.get_closest_marker("wide"):
            name, values = item.nodeid.split("[")[0], set(enumerate(width.places(item)))
            everywhere[name] |= values
            run[name] |= set() if width.is_wide(item) else values
    return {name: values - run[name] for name, values in everywhere.items() if values - run[name]}


def test_every_value_of_a_thinned_parameter_is_run(request):
    """Of the tests that were collected with this one."""
    assert left_out(request.config.stash[COLLECTED]) == {}


def test_every_pattern_of_make_quick_matches_a_test(request):
    collected = request.config.stash[COLLECTED]
    files = {item.nodeid.split("::")[0] for item in collected}
    for pattern in (pattern for pattern in width.QUICK if pattern.split("::")[0] in files):
        assert any(width.matches(item, pattern) for item in collected), pattern


LETTERS, PAIRS = ("a", "b", wide("c")), [(1, 2), (1, 3), (2, 3)]
CASES = [(letter, *pair) for letter in LETTERS[:2] for pair in PAIRS]


def case(n: int, letter: str, x: int, y: int, marked: bool = False) -> pytest.Item:
    """A test over LETTERS and PAIRS of which one in n is run."""
    parametrized = [pytest.mark.parametrize("letter", LETTERS).mark, pytest.mark.parametrize("x, y", PAIRS).mark]
    marks = {"parametrize": parametrized, "one_in": [pytest.mark.one_in(n).mark], "wide": [pytest.mark.wide] * marked}
    return SimpleNamespace(
        nodeid="test[case]",
        callspec=SimpleNamespace(params={"letter": letter, "x": x, "y": y}),
        iter_markers=lambda name: iter(marks[name]),
        get_closest_marker=lambda name: next(iter(marks[name]), None),
    )


def test_one_in_two_is_run():
    run = [of for of in CASES if not width.is_wide(case(2, *of))]
    assert run == [("a", 1, 2), ("a", 2, 3), ("b", 1, 3)]
    assert left_out([case(2, *of) for of in CASES]) == {}


def test_a_value_that_is_left_out_is_noticed():
    assert left_out([case(4, *of) for of in CASES]) == {"test": {(0, 1), (1, 1), (1, 2)}}


def test_what_is_marked_is_wide_and_what_is_wide_is_chosen():
    marked, plain = case(1, *CASES[0], marked=True), case(1, *CASES[0])
    assert width.is_wide(marked) and not width.is_wide(plain)
    for chosen, of_wide in (([plain], "no"), ([marked], "only"), ([marked, plain], "yes")):
        assert [item for item in (marked, plain) if width.is_chosen(item, of_wide, quick=False)] == chosen
