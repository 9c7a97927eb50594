"""What a call costs the host, without a clock: functions that it runs and memory may not grow unnoticed."""

import json

import pytest

from ..support import children

# Of a call like one before it: Python's and C's functions, torch 2.13 on Python 3.11; others differ by a few.
BUDGET = {
    "LSTM, 1, inference": 125,
    "LSTM, 1, training": 330,
    "LSTM, 2, inference": 180,
    "LSTM, 2, training": 550,
    "GRU, 1, inference": 120,
    "GRU, 1, training": 330,
    "GRU, 2, inference": 175,
    "GRU, 2, training": 545,
    "LSTM, lengths, inference": 175,
    "LSTM, reset, inference": 175,
    "LSTM, bidirectional, inference": 135,
    "LSTM, step, inference": 35,
    "LSTM, lengths, training": 385,
    "LSTM, reset, training": 385,
    "LSTM, bidirectional, training": 405,
    "LSTM, step, training": 110,
    "GRU, lengths, inference": 170,
    "GRU, reset, inference": 170,
    "GRU, bidirectional, inference": 135,
    "GRU, step, inference": 35,
    "GRU, lengths, training": 385,
    "GRU, reset, training": 385,
    "GRU, bidirectional, training": 410,
    "GRU, step, training": 105,
}
# Allocations of a call, and their bytes at the peak, by torch's allocator, torch 2.13.
MEMORY = {
    "LSTM, 1, inference": (4, 3072),
    "LSTM, 1, training": (12, 90112),
    "LSTM, 2, inference": (10, 4096),
    "LSTM, 2, training": (26, 224768),
    "GRU, 1, inference": (3, 2304),
    "GRU, 1, training": (12, 68352),
    "GRU, 2, inference": (7, 3072),
    "GRU, 2, training": (25, 169472),
    "LSTM, lengths, inference": (4, 3072),
    "LSTM, reset, inference": (4, 3072),
    "LSTM, bidirectional, inference": (8, 141312),
    "LSTM, step, inference": (6, 512),
    "LSTM, lengths, training": (15, 90240),
    "LSTM, reset, training": (13, 90112),
    "LSTM, bidirectional, training": (17, 311296),
    "LSTM, step, training": (22, 9152),
    "GRU, lengths, inference": (3, 2304),
    "GRU, reset, inference": (3, 2304),
    "GRU, bidirectional, inference": (7, 105984),
    "GRU, step, inference": (4, 512),
    "GRU, lengths, training": (15, 68480),
    "GRU, reset, training": (13, 68352),
    "GRU, bidirectional, training": (17, 235008),
    "GRU, step, training": (22, 6848),
}


def counted(arguments: list[str]) -> dict:
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
        ("fastrnn.compat.launcher.Ready.launch", "lambda kernel, grid, arguments: False"),
        ("fastrnn.nn.calls.observed", "lambda *tensors: True"),
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
    kernels = [case for case in BUDGET if "step" not in case]  # which are torch's
    assert all(longer[case] > 1.05 * shorter[case] for case in kernels)


def test_a_longer_step_is_noticed(tmp_path):
    """By a named backend's way, which is for sequences."""
    script = tmp_path / "longer.py"
    script.write_text(
        "from unittest import mock\nfrom bench import host_cost\nfrom fastrnn.nn import streaming\n"
        "step = streaming.step\n"
        "def longer(module, x, hx):\n    module.backend = 'reference'\n    return step(module, x, hx)\n"
        "with mock.patch.object(streaming, 'step', longer):\n    host_cost.main(['--calls'])\n"
    )
    longer = counted([str(script)])
    assert all(longer[case] > BUDGET[case] for case in BUDGET if "step" in case)


def grown(found: dict[str, list[int]]) -> dict[str, list[int]]:
    return {case: took for case, took in found.items() if took[0] > MEMORY[case][0] or took[1] > MEMORY[case][1]}


def test_a_call_takes_no_more_memory_than_it_did():
    assert MEMORY.keys() == BUDGET.keys()
    assert grown(counted(["-m", "bench.host_cost", "--memory"])) == {}


def test_memory_that_a_call_does_not_need_is_noticed(tmp_path):
    """Gates kept where no gradient is wanted; another tensor at each forward pass."""
    script = tmp_path / "more.py"
    script.write_text(
        "from unittest import mock\nfrom bench import host_cost\nfrom fastrnn.ops import layer\n"
        "forward = layer._forward\n"
        "def more(call, rows, reset, tensors, save):\n    kept = tensors[-1].clone()\n"
        "    return forward(call, rows, reset, tensors, save=True)\n"
        "with mock.patch.object(layer, '_forward', more):\n    host_cost.main(['--memory'])\n"
    )
    found = grown(counted([str(script)]))
    assert found.keys() == {case for case in MEMORY if "step" not in case}


def test_the_table_has_a_row_for_each_case():
    done = children.run(["-m", "bench.host_cost", "--count", "2"])
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| LSTM", "| GRU"))]
    assert len(rows) == len(BUDGET)
    assert all(float(row.split("|")[4]) > 0 for row in rows)
