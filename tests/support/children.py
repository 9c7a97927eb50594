"""Run Python in a process of its own, without the seconds that importing torch, Triton and fastrnn takes each time.

A process that has imported them and done nothing else (one a test worker) forks for every call. The fork goes on as
`python` would behind those imports: with its own arguments, environment, folder and files, up to its own exit.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = ("torch", "triton", "numpy", "fastrnn", "fastrnn.inspect.compile", "matplotlib.figure", "tqdm")


def run(command: list[str], errors: bool = True) -> subprocess.CompletedProcess[str]:
    """As subprocess.run does `python` with these arguments, -m MODULE or SCRIPT and its own; errors is `-W error`.

    In ROOT, in this process's environment but for TRITON_INTERPRET, which is read on import.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("out", "err")]
        parent = _parent(errors)
        parent.stdin.write(json.dumps({"command": command, "environment": environment, "files": files}) + "\n")
        parent.stdin.flush()
        status = parent.stdout.readline()
        assert status, "the process that forks has ended"
        return subprocess.CompletedProcess(command, int(status), *(Path(file).read_text() for file in files))


@functools.cache
def _parent(errors: bool) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *(["-W", "error"] if errors else []), "-m", "tests.support.children"]
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
    atexit.register(started.communicate)  # closes its input, which ends it
    return started


def _requested() -> dict:
    """Fork for every line of the input; return in the fork, with what it is to do."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def _become(request: dict) -> int:
    """Do it, and return the exit status, as Python's main does."""
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, file in enumerate([os.devnull, *request["files"]]):
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        if request["command"][0] == "-m":
            _, module, *arguments = request["command"]
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = request["command"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    for name in IMPORTED:
        if find_spec(name.split(".")[0]):
            importlib.import_module(name)
    gc.freeze()
    status = _become(_requested())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a second less than to take down all that was imported
