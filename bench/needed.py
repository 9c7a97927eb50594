"""What tests and make's targets need beside torch, Triton, numpy and pytest, and what is left out where it is missing.

python -m bench.needed TARGET    one line of what is missing for a target of the Makefile; 2 if it cannot run at all
"""

import sys
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.util import find_spec

# A package, by the name it is imported by: its name for pip, and what a target does without it.
PACKAGES = {
    "build": ("build", "the wheel's tests"),
    "deepecho": ("deepecho", "the test on its model"),
    "editables": ("editables", "the wheel's tests"),
    "expecttest": ("expecttest", "torch's own sample inputs"),
    "gluonts": ("gluonts", "the test on its model"),
    "hatchling": ("hatchling", "the wheel's tests"),
    "hypothesis": ("hypothesis", "sizes that hypothesis chooses"),
    "llvmlite": ("llvmlite", "the kernels for CPUs"),
    "material": ("mkdocs-material", "the site"),
    "matplotlib": ("matplotlib", "figures and the examples' tests"),
    "mkdocstrings": ("mkdocstrings[python]", "the site"),
    "pip": ("pip", "versions of Triton that are not at hand"),
    "pyright": ("pyright", "types"),
    "pytest": ("pytest", "all tests"),
    "pytest_benchmark": ("pytest-benchmark", "all times"),
    "rich": ("rich", "tables for people"),
    "ruff": ("ruff", "style"),
    "sb3_contrib": ("sb3-contrib", "the test on its model"),
    "sklearn": ("scikit-learn", "the digits' test"),
    "statsmodels": ("statsmodels", "what reads its series"),
    "tirex": ("tirex-ts", "what is about its cell"),
    "torch": ("torch", "everything"),
    "tqdm": ("tqdm", "the examples' tests"),
    "triton": ("triton", "the kernels"),
    "xdist": ("pytest-xdist", "running on more than one core"),
    "xlstm": ("xlstm", "what is about its cells"),
}
TESTED = (
    "build", "deepecho", "editables", "expecttest", "gluonts", "hatchling", "hypothesis", "llvmlite", "matplotlib",
    "pytest_benchmark", "rich", "sb3_contrib", "tirex", "xlstm",
)  # fmt: skip
EXAMPLE = ("torch", "matplotlib", "tqdm")
# Of each target: what it cannot run without, and what it leaves a part out without.
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "demo": (EXAMPLE, ("triton",)),
    "classify": ((*EXAMPLE, "sklearn"), ()),
    "forecast": ((*EXAMPLE, "statsmodels"), ()),
    "memory": (EXAMPLE, ()),
    "rollout": (EXAMPLE, ()),
    "xlstm_lm": (EXAMPLE, ()),
    "test": (("torch", "triton", "pytest"), (*TESTED, "sklearn", "statsmodels", "tqdm", "xdist")),
    "quick": (("torch", "triton", "pytest"), ("xdist",)),
    "test-all": (("torch", "triton", "pytest"), (*TESTED, "sklearn", "statsmodels", "tqdm", "xdist")),
    "matrix": (("torch", "triton", "pytest"), ("pip",)),
    "lint": (("ruff", "pyright"), ()),
    "docs": (("torch", "material", "mkdocstrings"), ()),
    "inspect": (("torch", "triton"), ()),
    "snapshots": (("torch", "triton"), ()),
    "bench": (("torch", "pytest", "pytest_benchmark", "matplotlib"), ("triton", "llvmlite")),
    "bench-auto": (("torch", "triton"), ("llvmlite",)),
    "bench-gpu": (("torch", "triton"), ("pytest", "pytest_benchmark", "statsmodels", "tirex", "xlstm")),
}
# What each test needs: patterns of its id. Modules that fail to import say so themselves, by pytest.importorskip.
TESTS = (
    ("tests/bench/test_bench.py::test_report", ("matplotlib",)),
    ("tests/bench/test_bench.py::test_a_group_of_the_suite", ("pytest_benchmark",)),
    ("tests/bench/test_clients.py::*times_both[[]tirex*", ("tirex", "statsmodels")),
    ("tests/bench/test_clients.py::*times_both[[]xlstm*", ("xlstm",)),
    ("tests/project/test_char_lm.py::*", EXAMPLE),
    ("tests/project/test_docs.py::test_the_pictures*", ("matplotlib",)),
    ("tests/project/test_xlstm_lm.py::*", EXAMPLE),
    ("tests/project/test_examples.py::*", EXAMPLE),
    ("tests/project/test_examples.py::*classify*", ("sklearn",)),
    ("tests/project/test_examples.py::*forecast*", ("statsmodels",)),
    ("tests/inspect/test_inspect.py::test_a_file_that_cannot_be_written*--plot*", ("matplotlib",)),
    ("tests/project/test_packaging.py::test_wheel*", ("build", "hatchling")),
    ("tests/project/test_packaging.py::test_sdist*", ("build", "hatchling")),
    ("tests/project/test_packaging.py::test_editable*", ("hatchling", "editables")),
    ("tests/inspect/test_profile.py::test_command_line", ("matplotlib",)),
    ("tests/nn/test_foreign.py::*tirex*", ("tirex",)),
    ("tests/nn/test_foreign.py::*tirex_forecasts*", ("statsmodels",)),
    ("tests/nn/test_foreign.py::*xlstm*", ("xlstm",)),
    ("tests/nn/test_real_models.py::*[[]deepar-*", ("gluonts",)),
    ("tests/nn/test_real_models.py::*[[]par-*", ("deepecho",)),
    ("tests/nn/test_real_models.py::*[[]recurrent_policy-*", ("sb3_contrib",)),
)


def is_missing(module: str) -> bool:
    return find_spec(module) is None


def missing_for(test: str, is_missing: Callable[[str], bool] = is_missing) -> list[str]:
    """Names for pip of what a test needs, by its id, and is not installed."""
    needed = dict.fromkeys(module for pattern, modules in TESTS if fnmatch(test, pattern) for module in modules)
    return [PACKAGES.get(module, (module,))[0] for module in needed if is_missing(module)]


def said(target: str, is_missing: Callable[[str], bool] = is_missing) -> tuple[str, bool]:
    """One line about a target, empty if nothing is missing, and whether the target can run."""
    needed, wanted = TARGETS[target]
    if names := [PACKAGES[module][0] for module in needed if is_missing(module)]:
        return f"make {target} does not run: missing {', '.join(names)}", False
    left_out: dict[str, list[str]] = {}
    for name, what in (PACKAGES[module] for module in wanted if is_missing(module)):
        left_out.setdefault(what, []).append(name)
    parts = [f"{', '.join(names)} ({what})" for what, names in left_out.items()]
    return f"make {target} leaves out what needs: {', '.join(parts)}" if parts else "", True


def main(target: str) -> int:
    line, runs = said(target)
    if line:
        print(line, file=sys.stderr)
    return 0 if runs else 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
