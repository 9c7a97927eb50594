"""Machine code for this CPU, in this process, from what is written in values.py."""

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import binding, ir

from .values import Code

_LOCK = threading.Lock()


class Machine(NamedTuple):
    """The CPU that code is written for."""

    bytes: int  # of a vector's register
    rows: int  # of a batch, and
    columns: int  # vectors of units, whose sums a product keeps in registers


@functools.cache
def machine() -> Machine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    has = binding.get_host_cpu_features()
    # Registers of vectors: 32 of 64 bytes, 16 of 32, else (NEON has 32) of 16 bytes.
    size, rows, columns = (64, 8, 2) if has.get("avx512f") else (32, 4, 2) if has.get("avx2") else (16, 4, 2)
    return Machine(size, rows, columns)


def _target() -> Any:
    """This CPU; an engine takes one for its own."""
    features = binding.get_host_cpu_features().flatten()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True
    )


class Compiled:
    """A compiled function of several int64, some of them addresses. It runs without Python's lock."""

    def __init__(self, name: str, arguments: int, dtype: torch.dtype, write: Callable[[Code], None]) -> None:
        with _LOCK:  # llvmlite's global context is one for all threads
            on, real = machine(), ir.FloatType() if dtype == torch.float32 else ir.DoubleType()
            module = ir.Module(name)
            target = _target()
            module.triple = target.triple
            code = Code(module, name, arguments, real, on.bytes // dtype.itemsize)
            write(code)
            code.builder.ret_void()
            parsed = binding.parse_assembly(str(module))
            options = binding.create_pipeline_tuning_options(speed_level=3)
            builder = binding.create_pass_builder(target, options)
            builder.getModulePassManager().run(parsed, builder)
            self._engine = binding.create_mcjit_compiler(parsed, target)
            self._engine.finalize_object()
            address = self._engine.get_function_address(name)
        self.call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)
