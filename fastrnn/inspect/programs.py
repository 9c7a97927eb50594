"""Run the programs that inspect needs beside Python: NVIDIA's tools and gcc; what is missing is said in one line."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def nvidia_tool(name: str) -> str:
    """The path of one of NVIDIA's tools: Triton's own copy, else the one on the path; RuntimeError without either."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if os.access(bundled, os.X_OK) else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is missing: Triton's wheel for Linux has it, and so has NVIDIA's CUDA toolkit")
    return found


def run(command: Sequence[str], needed: str) -> str:
    """Run a program and return what it prints; RuntimeError, with its purpose, if it is missing or fails."""
    try:
        done = subprocess.run([*command], capture_output=True, text=True, check=False)
    except OSError as reason:
        raise RuntimeError(f"{needed} needs {command[0]}, which does not run here: {reason.strerror}") from None
    if done.returncode:
        raise RuntimeError(f"{needed}: {command[0]} failed with status {done.returncode}: {done.stderr.strip()[:2000]}")
    return done.stdout
