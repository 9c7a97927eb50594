"""How a time is taken: events on a GPU with its L2 flushed, a monotonic clock on a CPU with its threads pinned."""

import importlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("fastrnn", "torch", "triton", "numpy", "llvmlite", "flashrnn", "haste_pytorch", "torchrl")
QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class EventClock:
    """Seconds between two calls, by CUDA events: nobody waits at the first, so that the GPU finds work queued up.

    pytest-benchmark calls its timer before and after what it times; `prepare` goes before that.
    """

    def __init__(self) -> None:
        self.start: torch.cuda.Event | None = None
        self.flushed: torch.Tensor | None = None

    def prepare(self) -> None:
        """Fill twice L2's size with zeros: what is timed finds none of its tensors there."""
        self.start = None
        if self.flushed is None:
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self.flushed = torch.empty(2 * size, dtype=torch.int8, device="cuda")
        self.flushed.zero_()

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self.start is None:
            self.start = event
            return 0.0
        start, self.start = self.start, None
        event.synchronize()
        return start.elapsed_time(event) / 1000


class WallClock:
    """Seconds of a monotonic clock, for a CPU."""

    def prepare(self) -> None:
        pass

    def __call__(self) -> float:
        return time.perf_counter()


def seconds(call: Callable[[], object], clock: Any) -> float:
    """Return the seconds of one call."""
    clock.prepare()
    start = clock()
    call()
    return clock() - start


def pin_threads(cores: list[int]) -> None:
    """Bind this process to these cores, with a thread for each."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def machine() -> dict[str, Any]:
    """Return what a time depends on: device, clocks now, versions."""
    found: dict[str, Any] = {"device": device(), "cpu": cpu(), "threads": torch.get_num_threads()}
    found["python"] = platform.python_version()
    found |= {package: installed(package) for package in PACKAGES}
    if device() == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "hip": torch.version.hip}
        found |= {"cudnn": torch.backends.cudnn.version(), "clocks": clocks()}
    return found


def installed(package: str) -> str | None:
    """A package's version, None where it is missing: of those that run here anyway, the module's own.

    Metadata may be missing, as of a checkout, and those of torch from PyPI are without the local part (+cu130).
    """
    try:
        if package in ("fastrnn", "torch", "triton", "numpy"):
            return importlib.import_module(package).__version__
        return version(package)
    except (ImportError, PackageNotFoundError):
        return None


def clocks() -> dict[str, str] | None:
    """Return the clocks of the first GPU by nvidia-smi; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None
    return dict(zip(QUERY, (value.strip() for value in done.stdout.split(",")), strict=True))


def cpu() -> str:
    """Return the CPU's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
