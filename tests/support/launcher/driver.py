"""A process whose NVIDIA driver is libcuda.c: Triton's launcher and fastrnn run as on an H100, up to the launch."""

import contextlib
import ctypes
import json
import subprocess
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SOURCE = Path(__file__).with_name("libcuda.c")
STREAM = 7  # what torch says is its current one


class Driver:
    """The library, built and loaded: from then on it is this process's libcuda.so.1."""

    def __init__(self) -> None:
        import triton
        from triton import knobs

        headers = Path(triton.__file__).parent / "backends/nvidia/include"
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "libcuda.so.1"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{headers}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", library, SOURCE], check=True)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its soname from now on
        self._library.stand_in_launches.restype = ctypes.c_char_p
        knobs.nvidia.libcuda_path = self._folder.name

    def launches(self) -> list[dict[str, Any]]:
        """What was launched since the last call."""
        return json.loads(self._library.stand_in_launches())

    def _variable(self, name: str) -> Any:
        return (ctypes.c_int * (8 if name == "groups" else 1)).in_dll(self._library, f"stand_in_{name}")

    def get(self, name: str) -> list[int]:
        """A variable of libcuda.c's, without its prefix."""
        return list(self._variable(name))

    def set(self, name: str, *values: int) -> None:
        """Set a variable's first values, the rest to 0."""
        variable = self._variable(name)
        variable[:] = (*values, *[0] * (len(variable) - len(values)))


def pretend(driver: Driver) -> None:
    """Make torch and Triton believe in the driver's GPU; tensors stay in the host's memory."""

    def properties(device: object = None) -> SimpleNamespace:
        count = sum(driver.get("groups"))
        return SimpleNamespace(
            name="stand-in", major=9, minor=0, multi_processor_count=count, shared_memory_per_block_optin=227 * 1024
        )

    fakes = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    # A CUDA build of torch asks the driver for what this one does not have, and says so.
    warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
