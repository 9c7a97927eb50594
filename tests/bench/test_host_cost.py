"""What a call costs the host, without a clock: how many functions it runs may not grow unnoticed."""

import json

import pytest

from ..support import children

# Of a call like one before it: Python's and C's functions, torch 2.13 on Python 3.11; others differ by a few.
BUDGET = {
    "LSTM, 1, inference": 390,
    "LSTM, 1, training": 770,
    "LSTM, 2, inference": 650,
    "LSTM, 2, training": 1370,
    "GRU, 1, inference": 390,
    "GRU, 1, training": 770,
    "GRU, 2, inference": 650,
    "GRU, 2, training": 1370,
}


def counted(arguments: list[str]) -> dict[str, int]:
    done = children.run(arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == BUDGET.keys()
    return found


def test_a_call_runs_no_more_functions_than_it_did():
    found = counted(["-m", "bench.host_cost", "--calls"])
    assert {case: count for case, count in found.items() if count > BUDGET[case]} == {}


@pytest.mark.parametrize(
    ("target", "does"),
    (
        ("fastrnn.compat.launcher.Ready.usable", "lambda kernel: False"),
        ("fastrnn.ops.library.observed", "lambda tensors: True"),
    ),
)
def test_a_longer_way_is_noticed(target, does, tmp_path):
    """Triton's binder at each launch; the op's dispatch."""
    script = tmp_path / "longer.py"
    script.write_text(
        f"from unittest import mock\nimport fastrnn.compat.launcher\nfrom bench import host_cost\n"
        f"with mock.patch({target!r}, {does}):\n    host_cost.main(['--calls'])\n"
    )
    shorter, longer = counted(["-m", "bench.host_cost", "--calls"]), counted([str(script)])
    assert all(longer[case] > 1.05 * shorter[case] for case in BUDGET)


def test_the_table_has_a_row_for_each_case():
    done = children.run(["-m", "bench.host_cost", "--count", "2"])
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| LSTM", "| GRU"))]
    assert len(rows) == len(BUDGET)
    assert all(float(row.split("|")[4]) > 0 for row in rows)
