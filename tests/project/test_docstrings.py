"""Public docstrings make the reference on the site: they name every argument, have an example, and lose no star."""

import ast
import inspect
import re

import pytest
import torch

import fastrnn
from fastrnn.cells import register
from fastrnn.nn.recurrent import Recurrent
from fastrnn.ops import recurrence

LAYERS = ("LSTM", "GRU", "RNN", "SLSTM")
METHODS = {f"{layer}.{name}": getattr(getattr(fastrnn, layer), name)
           for layer in ("LSTM", "SLSTM") for name in ("forward", "step", "plan")}  # fmt: skip
PUBLIC = {name: getattr(fastrnn, name) for name in fastrnn.__all__} | METHODS
PUBLIC |= {"cells.register": register, "ops.recurrence": recurrence}
RECORDS = {"Plan", "Report"}  # made by functions, whose examples show them


def arguments(name: str, public: object) -> set[str]:
    """The names that a caller may pass; a layer's come from torch.nn's base class and from ours."""
    if name in LAYERS:
        found = {*inspect.signature(torch.nn.RNNBase).parameters, *inspect.signature(Recurrent.__init__).parameters}
        return found - {"self", "mode", "args", "kwargs"} - ({"proj_size"} if name != "LSTM" else set())
    if isinstance(public, type):
        return set() if issubclass(public, Exception) else set(inspect.signature(public).parameters)
    return set(inspect.signature(public).parameters) - {"self"}


def faults(name: str, doc: str, named: set[str], needs_example: bool) -> list[str]:
    found = [f"{name}: {argument} is not described" for argument in named if not re.search(rf"\b{argument}\b", doc)]
    if needs_example and "Examples:\n    >>>" not in doc:
        found.append(f"{name}: no example")
    prose = re.sub(r"`[^`]*`|^    (>>>|\.\.\.).*$", "", doc, flags=re.MULTILINE)
    found += [f"{name}: Markdown takes the star of {part!r}" for part in re.findall(r"\S*\w\*\w\S*", prose)]
    return found


def written(name: str) -> set[str]:
    """The arguments in the signature of a layer that type checkers and the reference read, which never runs."""
    tree = ast.parse(inspect.getsource(getattr(fastrnn, name)).replace("# fmt: skip", ""))
    branch = next(
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    (made,) = branch.orelse
    assert isinstance(made, ast.FunctionDef)
    return {argument.arg for argument in (*made.args.args, *made.args.kwonlyargs)} - {"self"}


@pytest.mark.parametrize("name", LAYERS)
def test_the_signature_for_readers_has_every_argument(name):
    assert written(name) == arguments(name, getattr(fastrnn, name)) | ({"nonlinearity"} if name == "RNN" else set())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_described(name):
    public = PUBLIC[name]
    assert faults(name, inspect.getdoc(public) or "", arguments(name, public), name not in RECORDS) == []


@pytest.mark.parametrize(
    ("doc", "fault"),
    (
        ("Run.\n\nArgs:\n    hx: h.\n\nExamples:\n    >>> 1\n", "f: x is not described"),
        ("Run x on hx.\n", "f: no example"),
        ("Run x (T, B, D*H) on hx.\n\nExamples:\n    >>> 2*3\n", "f: Markdown takes the star of 'D*H)'"),
    ),
)
def test_faults_are_noticed(doc, fault):
    assert faults("f", doc, {"x", "hx"}, True) == [fault]
