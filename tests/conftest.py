"""The same tests run in Triton's interpreter where there is no GPU, and natively where there is one."""

import ast
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bench import needed

from .support import width
from .support.width import COLLECTED

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastrnn and triton are imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the tests that compare runs bit by bit
if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker a core: more threads wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of child processes


try:
    importlib.metadata.version("fastrnn")
except importlib.metadata.PackageNotFoundError:  # a bare checkout: child processes import fastrnn from it too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.getenv("PYTHONPATH"))))


def pytest_collection_modifyitems(config, items):
    """Leave out what is wide, and skip what needs a package that is missing here, with its name."""
    from .support import versions  # imports fastrnn, and with it what TRITON_INTERPRET says

    config.stash[COLLECTED] = list(items)
    wide, quick = config.getoption("--wide"), config.getoption("--quick")
    named = {Path(name).as_posix() for name in config.args}  # whoever names a wide test runs it
    chosen = [item for item in items if item.nodeid in named or width.is_chosen(item, wide, quick)]
    if others := set(items).difference(chosen):
        config.hook.pytest_deselected(items=[item for item in items if item in others])
        items[:] = chosen
    for item in items:
        if missing := needed.missing_for(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
        # Where kernels are interpreted, tests in this process skip by themselves: the tier has no form for it.
        if versions.compiles_clusters(item):
            item.add_marker(versions.NEEDS_CLUSTERS)


def pytest_ignore_collect(collection_path, config):
    """Import what `make quick` runs only."""
    if config.getoption("--quick") and collection_path.is_file():
        return None if width.has_quick(collection_path) else True
    return None


def pytest_addoption(parser):
    # On a GPU a case takes milliseconds.
    wide = "yes" if torch.cuda.is_available() else "no"
    parser.addoption("--wide", choices=("no", "yes", "only"), default=wide, help="see tests/support/width.py")
    parser.addoption("--quick", action="store_true", help="what `make quick` runs")
    parser.addoption("--schedules", type=int, default=200, help="schedules a cell and pass (tests/compat), at most")


@pytest.fixture(autouse=True)
def _seeded_and_exact():
    """Seed, fp32 products in full precision, and torch.nn by torch's own loop, so that it is the truth on a GPU too.

    cuDNN is not: in fp32 and "ieee" its gradients were off by 5e-5 (H100, cuDNN of torch 2.11). It also differentiates
    in training only, once, and takes no states with gaps. tests/gpu/test_native.py has the tests of what runs by cuDNN.
    """
    torch.manual_seed(0)
    cudnn = torch.backends.cudnn.enabled
    torch._C._set_cudnn_enabled(False)  # torch's own tests forbid setting torch.backends.cudnn.enabled once imported
    rnn, matmul = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision = rnn, matmul
    torch._C._set_cudnn_enabled(cudnn)


@pytest.fixture(autouse=True)
def _on_cpu(request):
    """Kernels for CPUs are for CPU tensors, and need llvmlite."""
    of_test = getattr(request.node, "callspec", None)
    if of_test is not None and of_test.params.get("backend") == "cpu":
        from fastrnn.planning import cpu

        if torch.cuda.is_available():
            pytest.skip("tests/ops/test_cpu.py has what is of CPU tensors where there is a GPU")
        if cpu.MISSING:
            pytest.skip(f"needs {', '.join(cpu.MISSING)}")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned():
    """torch in deterministic mode fills what it allocates with NaN: what is unwritten or read early shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


_numbers = itertools.count()


@pytest.fixture
def mutate(monkeypatch, tmp_path):
    """Replace texts in functions, and put what is made of their modules in the originals' place for the test.

    mutate({"kernels.cells.lstm_forward": (old, new), ...}): a text stands for the same text within that function only,
    wherever the function is in its module; all of kernels is copied, since its modules import each other.
    """
    root = Path(__file__).parents[1]

    def put(changes: dict[str, tuple[str, str]]) -> None:
        sources: dict[str, str] = {}
        for function, (old, new) in changes.items():
            module, _, name = function.rpartition(".")
            path = module.replace(".", "/") + ".py"
            source = sources.get(path) or (root / path).read_text()
            sources[path] = replaced(source, name, old, new)
        name = f"mutant_{next(_numbers)}"
        kernels = {path: source for path, source in sources.items() if path.startswith("kernels/")}
        for path in sources.keys() - kernels.keys():
            original = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            file = tmp_path / f"{name}.py"
            file.write_text(sources[path])
            # In the original's package, whose modules it imports.
            spec = importlib.util.spec_from_file_location(f"{original.__package__}.{name}", file)
            mutant = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(mutant)
            for attribute, value in vars(mutant).items():
                if not attribute.startswith("__"):
                    monkeypatch.setattr(original, attribute, value)
        if kernels:
            shutil.copytree(root / "kernels", tmp_path / name)
            for path, source in kernels.items():
                (tmp_path / name / path.removeprefix("kernels/")).write_text(source)
            monkeypatch.syspath_prepend(tmp_path)
            for module in ("", ".cells", ".tile", ".tile.resident", ".tile.cooperative"):
                mutant = importlib.import_module(name + module)
                monkeypatch.setitem(sys.modules, f"fastrnn.kernels{module}", mutant)
                if module:
                    above, _, attribute = f"fastrnn.kernels{module}".rpartition(".")
                    monkeypatch.setattr(sys.modules[above], attribute, mutant, raising=False)

    return put


def replaced(source: str, function: str, old: str, new: str) -> str:
    """A module's source with a text replaced in one of its functions."""
    found = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    assert len(found) == 1, f"expected one function {function}, found {len(found)}: mutate what took its place"
    lines = source.splitlines(keepends=True)
    first, last = found[0].lineno - 1, found[0].end_lineno
    own = "".join(lines[first:last])
    assert old in own, f"{old!r} is not in {function} any more: mutate the code that took its place"
    return "".join(lines[:first]) + own.replace(old, new) + "".join(lines[last:])
