"""Which tests `make test` runs, and which are only wider: more sizes, seeds, dtypes or architectures of the same check.

A test or parameter with the mark `wide` runs with --wide=yes, or =only. Of a test with the mark one_in(n), of whose
parameters there are many combinations, one in n is run and the others are wide: those whose places in their lists sum
to a multiple of n. So each value still meets each other, where its list has n values or more;
tests/project/test_width.py checks that no value is left out.
"""

import operator
from fnmatch import fnmatch
from pathlib import Path

import pytest

# What `make quick` runs, by patterns of test ids: each tier and cell in the interpreter, broken kernels, schedules, an
# operator, compiled kernels executed, a launch, the planner, layers on the CPU, bad input.
QUICK = (
    "tests/ops/test_recurrence.py::test_matches_reference[*-T5-*",
    "tests/ops/test_sequences.py::test_matches_reference[gru-*",
    "tests/ops/test_mutations.py::*",
    "tests/ops/test_ops.py::test_opcheck_*[gru-*",
    "tests/ops/test_cells.py::test_compiled_kernels_match_the_step[*",
    "tests/compat/test_schedules.py::test_every_schedule_gives_the_same_bits[*gru-*",
    "tests/compat/test_schedules.py::test_every_broken_protocol_is_caught[*-gru]",
    "tests/compat/test_refused.py::test_auto_takes_the_next_tier*",
    "tests/planning/*::*",
    "tests/torch_path/test_segments.py::test_against_the_loop[*",
    "tests/nn/test_bad_input.py::*",
    "tests/nn/test_convert.py::test_a_layer_alone[*",
    "tests/nn/test_modules.py::test_equals_torch_nn[*",
    "tests/nn/test_options.py::test_lengths_are_what_packing_does[*",
    "tests/inspect/test_execute.py::test_warps_*",
    "tests/project/test_rooms.py::*",
    "tests/project/test_width.py::*",
)
COLLECTED = pytest.StashKey[list[pytest.Item]]()  # all tests, before some are left out


def wide(value: object):
    """A parameter's value that is only wide."""
    return pytest.param(value, marks=pytest.mark.wide)


def is_wide(item: pytest.Item) -> bool:
    if item.get_closest_marker("wide"):
        return True
    one_in = item.get_closest_marker("one_in")
    return one_in is not None and sum(places(item)) % one_in.args[0] != 0


def places(item: pytest.Item) -> list[int]:
    """Of each parametrization of a test, the place of its value in the list."""
    found = []
    for mark in item.iter_markers("parametrize"):
        names = [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
        chosen = [item.callspec.params[name] for name in names]
        values = [v.values if hasattr(v, "marks") else v if len(names) > 1 else (v,) for v in mark.args[1]]
        found.append(next(place for place, v in enumerate(values) if all(map(operator.is_, v, chosen))))
    return found


def has_quick(file: Path) -> bool:
    return any(file.match(pattern.split("::")[0]) for pattern in QUICK)


def matches(item: pytest.Item, pattern: str) -> bool:
    """Of the characters that fnmatch has a meaning for, * only: ids are in brackets."""
    return fnmatch(item.nodeid, pattern.replace("[", "[[]"))


def is_quick(item: pytest.Item) -> bool:
    return any(matches(item, pattern) for pattern in QUICK)


def is_chosen(item: pytest.Item, wide: str, quick: bool) -> bool:
    """wide is "no", "yes" for all, or "only"; quick leaves the tests of QUICK."""
    return (wide == "yes" or is_wide(item) == (wide == "only")) and (not quick or is_quick(item))
