"""Without the packages that tests and targets want, what can run runs, and what cannot says what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import needed

from .test_packaging import commands

ROOT = Path(__file__).parents[2]


def test_every_target_of_the_makefile_says_what_it_needs():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    examples = re.search(r"^EXAMPLES := (.*)$", makefile, re.MULTILINE)[1].split()
    targets = {*phony, *examples} - {"$(EXAMPLES)", ".venv", "clean"}
    assert needed.TARGETS.keys() >= targets
    for target in targets:
        assert commands(target, "VENV=no").splitlines()[0] == f"python3 -m bench.needed {target}"


def test_what_a_test_needs_is_among_what_make_test_needs():
    named = {module for _, modules in needed.TESTS for module in modules}
    for target in ("test", "test-all"):
        assert named <= {module for modules in needed.TARGETS[target] for module in modules}
    assert named <= needed.PACKAGES.keys()


def test_a_line_says_what_is_missing_and_what_that_leaves_out():
    everything = needed.said("test", lambda module: False)
    assert everything == ("", True)
    line, runs = needed.said("test", lambda module: module in ("build", "hatchling", "xdist"))
    assert runs and line == (
        "make test leaves out what needs: build, hatchling (the wheel's tests), "
        "pytest-xdist (running on more than one core)"
    )
    assert needed.said("lint", lambda module: module == "ruff") == ("make lint does not run: missing ruff", False)


@pytest.mark.parametrize(
    ("test", "missing"),
    [
        ("tests/nn/test_real_models.py::test_trains_a_step_as_with_torch_nn[par-auto]", ["deepecho"]),
        ("tests/nn/test_real_models.py::test_trains_a_step_as_with_torch_nn[deepar-auto]", ["gluonts"]),
        (
            "tests/project/test_examples.py::test_wrong_arguments[classify-x]",
            ["torch", "matplotlib", "tqdm", "scikit-learn"],
        ),
        ("tests/project/test_packaging.py::test_editable_install_sees_new_files", ["hatchling", "editables"]),
        ("tests/bench/test_bench.py::test_a_group_of_the_suite", ["pytest-benchmark"]),
        ("tests/ops/test_recurrence.py::test_matches_reference[gru]", []),
    ],
)
def test_what_a_test_needs(test, missing):
    assert needed.missing_for(test, lambda module: True) == missing


@pytest.mark.parametrize("target", ("test", "demo"))
def test_without_a_venv_nothing_is_installed(target):
    ran = commands(target, "VENV=no", f"PYTHON={sys.executable}")
    assert "pip" not in ran.replace("pipe", "") and ".venv/installed" not in ran
    assert sys.executable in ran


def test_tests_are_collected_and_skipped_where_packages_are_missing(tmp_path):
    """A process that can import none of them: every test is collected, and those that need one skip with its name."""
    hidden = [name for name in needed.PACKAGES if name not in ("torch", "triton", "pytest", "xdist")]
    (tmp_path / "hidden.py").write_text(
        "import importlib.util, sys\n"
        f"hidden = {hidden!r}\n"
        "sys.modules.update(dict.fromkeys(hidden))\n"
        "plain = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name in hidden else plain(name, *more)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    clean["PYTHONPATH"] = str(tmp_path)
    off = [word for name in ("hypothesispytest", "benchmark", "xdist") for word in ("-p", f"no:{name}")]
    pytest_here = [sys.executable, "-m", "pytest", "-p", "hidden", *off, "-p", "no:cacheprovider"]
    options = {"cwd": ROOT, "env": clean, "capture_output": True, "text": True}
    done = subprocess.run([*pytest_here, "--collect-only", "tests"], **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test_matches_reference" in done.stdout
    some = [
        "tests/bench/test_bench.py::test_a_group_of_the_suite",
        "tests/nn/test_torch_inputs.py",
        "tests/nn/test_any_shape.py",
        "tests/nn/test_real_models.py",
        "tests/nn/test_foreign.py",
        "tests/project/test_char_lm.py",
    ]
    done = subprocess.run([*pytest_here, "-x", "-rs", *some], **options)
    assert "failed" not in done.stdout and "passed" not in done.stdout, done.stdout
    models = ("gluonts", "sb3-contrib", "deepecho", "xlstm", "tirex-ts")
    for name in ("expecttest", "hypothesis", *models, "matplotlib, tqdm", "pytest-benchmark"):
        assert re.search(rf"SKIPPED.*{name}", done.stdout), name
