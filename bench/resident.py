"""How many clusters of a compiled kernel are resident at once, by the CUDA driver (cuOccupancyMaxActiveClusters).

Types and numbers are those of cuda.h in CUDA 13.0.
"""

import ctypes
from typing import Any
from unittest import mock

import torch

from fastrnn.inspect.compile import Problem

from . import prepare
from .stages import Record

NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 13  # of CUfunction_attribute
CLUSTER_DIMENSION = 4  # of CUlaunchAttributeID


class Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


def clusters(problem: Problem, backend: str) -> Record:
    """What the driver says of the forward kernel's own cluster size: {"asked", "rc", "resident", "shared"}."""
    from triton.runtime.jit import JITFunction

    launched: list[Any] = []
    run = JITFunction.run

    def keep(self, *args, **options):
        launched.append(run(self, *args, **options))
        return launched[-1]

    with mock.patch.object(JITFunction, "run", keep):
        prepare.one_launch(problem, backend, "cuda", ("forward",))
    torch.cuda.synchronize()
    kernel = launched[-1]
    return {"asked": kernel.metadata.num_ctas} | of_kernel(ctypes.CDLL("libcuda.so.1"), kernel)


def of_kernel(driver: Any, kernel: Any) -> Record:
    """The driver's answer for a loaded kernel."""
    function, ctas = ctypes.c_void_p(kernel.function), kernel.metadata.num_ctas
    driver.cuFuncSetAttribute(function, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    attribute = Attribute(id=CLUSTER_DIMENSION)
    attribute.value[0], attribute.value[1], attribute.value[2] = ctas, 1, 1
    threads, shared = kernel.metadata.num_warps * 32, kernel.metadata.shared
    config = Config(ctas, 1, 1, threads, 1, 1, shared, None, ctypes.pointer(attribute), 1)
    count = ctypes.c_int(-1)
    rc = driver.cuOccupancyMaxActiveClusters(ctypes.byref(count), function, ctypes.byref(config))
    return {"rc": rc, "resident": count.value, "shared": shared}
