"""A fork (tests/support/children.py) ends as a process of Python does, which runs the same script beside it."""

import subprocess
import sys

import pytest

from ..support import children

SCRIPTS = {
    "it ends": "print('out'); print('err', file=sys.stderr)",
    "a status": "sys.exit(3)",
    "a text": "sys.exit('a reason')",
    "no status": "sys.exit(None)",
    "an exception": "print('out'); raise ValueError('wrong')",
    "a warning": "import warnings; warnings.warn('old')",
    "at exit": "import atexit; atexit.register(print, 'over')",
    "arguments": "print(sys.argv, __name__, sys.path[0])",
    "environment": "print(os.environ['FASTRNN_TEST'], os.environ.get('TRITON_INTERPRET'), os.getcwd())",
    "input": "print(sys.stdin.read())",
}


@pytest.mark.parametrize("errors", (True, False))
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork_ends_as_a_process_does(name, errors, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\n{SCRIPTS[name]}\n")
    monkeypatch.setenv("FASTRNN_TEST", name)
    forked = children.run([str(script), "--flag", "a word"], errors)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, *(["-W", "error"] if errors else []), str(script), "--flag", "a word"]
    plain = subprocess.run(command, cwd=children.ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (forked.returncode, forked.stdout) == (plain.returncode, plain.stdout)
    assert forked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert ("Traceback" in forked.stderr) == ("Traceback" in plain.stderr)


def test_a_module_is_run_by_its_name():
    done = children.run(["-m", "fastrnn", "plan", "--cell", "gru", "--hidden", "64"])
    assert done.returncode == 0 and done.stdout.startswith("gru, "), done.stderr


def test_forks_leave_nothing_to_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import fastrnn; print(vars(fastrnn).get('seen')); fastrnn.seen = 1\n")
    assert [children.run([str(script)]).stdout for _ in range(2)] == ["None\n"] * 2
