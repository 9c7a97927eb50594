"""Run the examples as a user does, in a process of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import children

ROOT = Path(__file__).parents[2]


def start(example: str, out: Path, *flags: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / f"examples/{example}.py"), "--out", str(out), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(example: str, out: Path, *flags: str) -> subprocess.CompletedProcess:
    return children.run([str(ROOT / f"examples/{example}.py"), "--out", str(out), *flags], errors=False)


def interrupt(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Press Ctrl-C once the progress bar shows that training is under way."""
    for line in iter(process.stderr.readline, ""):  # type: ignore[union-attr]
        if "%|" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
