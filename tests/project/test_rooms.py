"""The rooms of fastrnn/ import each other in one direction, and kernels/ imports none of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the bottom up: a module imports from its own line and those above it.
ORDER = (
    ("compat",),
    ("kernels", "sequences", "device", "noise"),
    ("cells", "reference", "stack"),
    ("planning",),
    ("cpu",),
    ("ops",),
    ("torch_path",),
    ("nn",),
    ("", "inspect", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def upward(root: Path) -> list[str]:
    """Imports of a room that lies higher than the file's own."""
    found = []
    for path in sorted((root / "fastrnn").rglob("*.py")):
        package = path.relative_to(root).with_suffix("").parts[:-1]
        own = (*package[1:], path.stem.replace("__init__", ""))[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) + 1 - node.level] + tuple((node.module or "").split("."))
                names = [base[1]] if base[1:] and base[1] else [alias.name for alias in node.names]
                known = [name if name in LEVEL else "" for name in names]
                found += [f"{path.relative_to(root)}: {name or names}" for name in known if LEVEL[name] > LEVEL[own]]
    return found


def test_nothing_imports_upwards():
    assert upward(ROOT) == []


@pytest.mark.parametrize("line", ("from ..nn import layers", "from ..nn.layers import split", "from .. import plan"))
def test_an_import_upwards_is_noticed(line, tmp_path):
    for name in ("planning", "ops"):
        (tmp_path / "fastrnn" / name).mkdir(parents=True)
    (tmp_path / "fastrnn/planning/tiers.py").write_text("from ..reference import GATES\nfrom . import cluster\n")
    (tmp_path / "fastrnn/ops/launch.py").write_text(f"def run():\n    {line}\n")
    assert [found.split(":")[0] for found in upward(tmp_path)] == ["fastrnn/ops/launch.py"]


# What users call by name, with torch.nn's arguments and ours.
PUBLIC = {"lstm", "gru", "rnn", "slstm", "plan", "recurrence", "reference.py: run", "recurrent.py: __init__"}
PUBLIC |= {"modules.py: __init__", "slstm.py: __init__"}


def crowded(root: Path) -> list[str]:
    """Functions with more than nine arguments, and files with more than 320 lines."""
    found = []
    for path in sorted((*(root / "fastrnn").rglob("*.py"), *(root / "kernels").rglob("*.py"))):
        source = path.read_text()
        if source.count("\n") > 320:
            found.append(path.name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not {node.name, f"{path.name}: {node.name}"} & PUBLIC:
                count = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
                found += [f"{path.name}: {node.name}"] * (count > 9)
    return found


def test_no_function_takes_more_than_nine_arguments():
    assert crowded(ROOT) == []


def test_a_tenth_argument_is_noticed(tmp_path):
    (tmp_path / "fastrnn").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "fastrnn/long.py").write_text("def f(a, b, c, d, e, f, g, h, i): ...\n" + "\n" * 320)
    (tmp_path / "kernels/wide.py").write_text("def f(a, b, c, d, e, f, g, h, *, i, j): ...\n")
    assert crowded(tmp_path) == ["long.py", "wide.py: f"]
