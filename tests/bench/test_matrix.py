"""The matrix of Triton's versions fails where it should."""

import json
import shutil
import subprocess
from importlib.metadata import version

import pytest

from bench import inspect_table, matrix

HERE = matrix.Triton(version("triton").split("+")[0], None)


def broken(name: str, value: object) -> list[dict]:
    """The snapshot's resident kernels for sm_90, one of them changed."""
    records = [json.loads(line) for line in inspect_table.SNAPSHOT.read_text().splitlines()[1:]]
    found = [r for r in records if r["arch"] == "sm_90" and r["group"].startswith("resident") and "missing" not in r]
    return [*found[:-1], found[-1] | {name: value}]


def test_kernels_as_they_are_pass():
    assert matrix.judged(HERE, "resident", broken("triton", "")).startswith("passed: ")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    (
        ("spill_bytes", 8, "registers spill"),
        ("weight_global_loads_in_loop", 1, "W_hh is loaded in the time loop"),
        ("unguarded_remote_accesses", 1, "shared memory of another program"),
    ),
)
def test_a_bad_kernel_fails(name, value, fault):
    found = matrix.judged(HERE, "resident", broken(name, value))
    assert found.startswith("failed: 1 fault(s)") and fault in found


def test_a_tier_without_kernels_fails_unless_it_is_known():
    missing = [{"missing": "a reason"}]
    assert matrix.judged(matrix.Triton("3.6.0", None), "cluster", missing) == "skipped: a reason"
    assert matrix.judged(matrix.Triton("3.8.0", None), "cluster", missing) == "failed: a reason"
    assert matrix.judged(matrix.Triton("3.6.0", None), "resident", missing) == "failed: a reason"


def test_kernels_that_compute_something_else_fail(tmp_path):
    """In a copy of the repository, the sign of one of the GRU's gradients is wrong: compiled, and executed."""
    for name in ("fastrnn", "kernels", "tests"):
        shutil.copytree(matrix.ROOT / name, tmp_path / name, symlinks=True)
    cells, right = tmp_path / "kernels" / "cells.py", "d_z = dh * (h_prev - n)"
    assert right in cells.read_text()
    cells.write_text(cells.read_text().replace(right, "d_z = dh * (n - h_prev)"))
    found = matrix.executed(HERE._replace(root=tmp_path), "resident", matrix.QUICK_EXECUTED)
    assert found.startswith("failed: {'cell': 'gru'") and "d_W_hh" in found


@pytest.mark.parametrize(
    ("status", "output", "result"),
    (
        (0, '{"faults": []}\n{"faults": []}', "passed: 2 launches"),
        (0, '{"faults": []}\n{"faults": ["grid"]}', "failed: {'faults': ['grid']}"),
        (0, "", "failed: exit status 0"),
        (1, '{"faults": []}\nRuntimeError: no launcher', "failed: RuntimeError: no launcher"),
    ),
)
def test_a_launch_that_reaches_the_driver_otherwise_fails(monkeypatch, status, output, result):
    def run(self, *arguments, interpret=False):
        return subprocess.CompletedProcess(arguments, status, output, "")

    monkeypatch.setattr(matrix.Triton, "run", run)
    assert matrix.launched(HERE, "resident") == result


def test_another_triton_is_not_taken_for_the_one_asked_for():
    assert matrix.imported(HERE) == "passed"
    assert matrix.imported(HERE._replace(version="1.0.0")) == f"failed: {HERE.version}"


def test_an_interpreter_that_fails_is_a_failure(monkeypatch):
    def run(self, *arguments, interpret=False):
        return subprocess.CompletedProcess(arguments, 1, "E   TypeError: no\nFAILED tests/x.py", "")

    monkeypatch.setattr(matrix.Triton, "run", run)
    assert matrix.interpreted(HERE, "") == "failed: FAILED tests/x.py"


@pytest.mark.parametrize(
    ("output", "errors", "reason"),
    (
        ("", "x.Error: at 5:8:\nTypeError('no None')\nx.Error: at 10:18:\n   ^", "TypeError('no None')"),
        ("E   assert 1 == 2\nFAILED tests/x.py::test\n", "nanobind: leaked", "FAILED tests/x.py::test"),
        ("", "Traceback\nValueError: no\n - leaked x", "ValueError: no"),
        ("", "", "exit status 3"),
    ),
)  # fmt: skip
def test_the_reason_of_a_failure(output, errors, reason):
    assert matrix.reason_of(subprocess.CompletedProcess([], 3, output, errors)) == reason


def test_what_cannot_be_installed_fails_and_the_others_go_on(monkeypatch):
    def installed(wanted):
        if wanted == "0.0.1":
            raise RuntimeError("no such version")
        return HERE

    monkeypatch.setattr(matrix, "installed", installed)
    monkeypatch.setattr(matrix, "checks", lambda triton, quick: [matrix.Row(triton.version, "import", "passed")])
    rows = set(matrix.matrix(["0.0.1", HERE.version], quick=True, jobs=2))
    failed = matrix.Row("0.0.1", "everything else", "failed: RuntimeError: no such version")
    assert rows == {failed, matrix.Row(HERE.version, "import", "passed")}


def test_without_pip_what_is_at_hand_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "find_spec", lambda name: None)
    monkeypatch.setattr(matrix, "checks", lambda triton, quick: [matrix.Row(triton.version, "import", "passed")])
    rows = set(matrix.matrix(["0.0.1", HERE.version], quick=True, jobs=2))
    skipped = matrix.Row("0.0.1", "everything", "skipped: pip is missing")
    assert rows == {skipped, matrix.Row(HERE.version, "import", "passed")}


@pytest.mark.parametrize(("result", "status"), (("passed", 0), ("skipped: no", 0), ("failed: no", 1)))
def test_the_exit_status(monkeypatch, capsys, result, status):
    monkeypatch.setattr(matrix, "matrix", lambda *_: [matrix.Row("3.9.0", "import", result)])
    assert matrix.main(["--quick"]) == status
    assert capsys.readouterr().out.splitlines()[-1] == f"| 3.9.0 | import | {result} |"
