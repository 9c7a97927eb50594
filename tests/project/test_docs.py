"""Every code block of the README and of docs/ is run, as a reader would: in the repository, with python and make.

The Python of a page is one script, in a process of its own. A block of sh that takes minutes or needs a GPU says so
behind its language (```sh minutes, ```sh gpu): of it is checked that the commands exist and take their arguments.
"""

import contextlib
import operator
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastrnn
from fastrnn.compat import spills

from ..support import children, versions

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NO_CODE = {"text", "mlir"}
MARKS = {"", "minutes", "gpu"}
NEEDS_TRITON = {"upstream-num-ctas.md": (3, 9)}  # the first that compiles the program which the report is about


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line} {self.mark}".rstrip()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    assert text.count("\n```") % 2 == 0, f"{page.name}: a block without an end"
    found = re.finditer(r"^```(\w*) *(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(page, text[: m.start(3)].count("\n") + 1, m[1], m[2], m[3]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
SCRIPTED = sorted({block.page for block in BLOCKS if block.language == "python"})
LIMIT = 300  # seconds: ten times what the longest block takes
HAS_GPU = torch.cuda.is_available()


def run(command: list[str]) -> None:
    """As from a shell with the tests' Python first on its path, and nothing set that a reader has not set."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not over in {LIMIT} s: a block that takes minutes says so, ```sh minutes")
        finally:  # whatever it started ends with it, `make bench` too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, stdout[-3000:] + stderr[-3000:]


def test_every_block_is_run_or_says_why_not():
    assert SCRIPTED and SHELL
    for block in BLOCKS:
        allowed = MARKS if block.language == "sh" else {""}
        assert block.language in {"python", "sh"} | NO_CODE, f"{block}: a language that no test runs"
        assert block.mark in allowed, f"{block}: expected one of {allowed} behind the language, got {block.mark!r}"


@pytest.mark.parametrize("page", SCRIPTED, ids=lambda page: page.name)
def test_python_runs(page, tmp_path):
    needed = NEEDS_TRITON.get(page.name, (0, 0))
    if spills.triton_version() < needed:
        pytest.skip(f"needs Triton {needed[0]}.{needed[1]}")
    script = ""
    for block in blocks_of(page):
        if block.language == "python":  # at its own line numbers, which errors then name
            script += "\n" * (block.line - 1 - script.count("\n")) + block.code
    path = tmp_path / f"{page.stem}.py"
    path.write_text(script)
    run([sys.executable, str(path)])


def skip_without_packages(code: str) -> None:
    """Tables of `inspect` need rich, and the examples' --help needs what they import."""
    needed = [
        ("matplotlib", "examples/"),
        ("tqdm", "examples/"),
        ("sklearn", "classify.py"),
        ("statsmodels", "forecast.py"),
    ]
    missing = [module for module, text in needed if text in code and find_spec(module) is None]
    tables = [line for line in code.splitlines() if re.search("fastrnn inspect|mgu.py inspect", line)]
    if find_spec("rich") is None and any("--json" not in line for line in tables):
        missing.append("rich")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def rehearse(line: str) -> None:
    """Check a command's words by one that does nothing: make -n, or --help behind what argparse reads first."""
    words = shlex.split(line, comments=True)
    program = next(word for word in words if "=" not in word)
    assert program in ("make", "python", "torchrun"), f"no rehearsal is known for {line!r}"
    if words[0] == "python":
        done = children.run([*words[1:], "--help"], errors=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    else:
        run(["bash", "-c", line.replace("make", "make -n", 1) if program == "make" else shlex.join([*words, "--help"])])


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_runs(block):
    code = block.code
    skip_without_packages(code)
    if block.mark == "minutes" or (block.mark == "gpu" and not HAS_GPU):
        for line in code.splitlines():
            rehearse(line)
    else:
        run(["bash", "-euo", "pipefail", "-c", code])


@pytest.mark.parametrize(
    "line",
    ("make nothing", "python examples/nothing.py", "python -m fastrnn inspect --cell nothing --hidden 64", "true"),
)
def test_rehearsal_notices_what_would_not_run(line):
    with pytest.raises(AssertionError):
        rehearse(line)


def test_a_block_that_does_not_say_it_takes_minutes_is_ended(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 1)
    with pytest.raises(pytest.fail.Exception, match="not over in 1 s"):
        run(["bash", "-c", "sleep 600 & sleep 600"])


def test_the_page_on_cells_has_the_code_of_the_example():
    example = (ROOT / "examples/mgu.py").read_text()
    kernels = [block.code for block in blocks_of(ROOT / "docs/writing-a-cell.md") if "@triton.jit" in block.code]
    assert len(kernels) == 2
    (layer,) = (block.code for block in blocks_of(ROOT / "docs/writing-a-cell.md") if "class MGU" in block.code)
    for code in (*kernels, layer[layer.index("class MGU") :]):
        assert code in example


def test_links_between_pages():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_architecture_quotes_the_loop():
    """Its lines stand in kernels/loop.py, in their order."""
    quoted = re.search(r"```text\n(for step in .*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    lines = iter([line.strip() for line in (ROOT / "kernels/loop.py").read_text().splitlines()])
    for line in quoted[1].splitlines():
        assert line.strip() in lines, f"{line!r} is not in kernels/loop.py, or not behind the line before"


def test_the_reference_has_every_public_name():
    """As a directive of mkdocstrings; a name without a docstring would be an empty entry."""
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    listed = re.findall(r"^::: fastrnn\.([\w.]+)$", pages, re.MULTILINE)
    assert sorted(listed) == sorted([*fastrnn.__all__, "cells.register", "ops.recurrence"])
    for name in listed:
        assert operator.attrgetter(name)(fastrnn).__doc__, f"fastrnn.{name} has no docstring"


def starred(text: str) -> list[str]:
    """Words whose star Markdown takes for emphasis, as in a shape that is not marked as code."""
    prose = re.sub(r"^```.*?^```$|^ {4}.*?$|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\S*\w\*\w\S*", prose)


def test_no_star_of_a_shape_is_lost():
    assert {page.name: starred(page.read_text()) for page in PAGES} == {page.name: [] for page in PAGES}
    assert starred("of shape (L*D, 1, H)") == ["(L*D,"] and starred("of shape `(L*D, 1, H)`") == []


def test_pictures_have_a_text():
    for page in PAGES:
        for text, file in re.findall(r"!\[(.*?)\]\((\S+)\)", page.read_text()):
            assert len(text) > 20, f"{page.name}: {file} needs an alternative text"


def test_the_pictures_are_those_of_the_data(tmp_path, monkeypatch):
    """`python -m bench.pictures` draws the committed files again."""
    pictures = pytest.importorskip("bench.pictures", reason="needs matplotlib")
    committed = pictures.FOLDER
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.main([])
    # The planner's map has clusters, which older Triton does not compile.
    for name in set(pictures.PICTURES) - ({"planner"} if not versions.HAS_CLUSTERS else set()):
        drawn, kept = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, committed))
        assert re.findall(r"<text.*?</text>", drawn, re.DOTALL) == re.findall(r"<text.*?</text>", kept, re.DOTALL), name
