"""Execute the PTX of a compiled kernel on the CPU: does the code that a GPU would run compute what the kernel says?

The PTX is translated to C (translate.py), compiled by gcc with a machine of warps and memories around it, and run with
all programs alive, interleaved by a seeded schedule. Beside wrong results it finds what no GPU reports: races in shared
and in global memory, loads that a GPU may serve from a stale L1, accesses out of bounds, deadlocks.

    with launches(DeviceSpec.named("sm_90"), run=execute):
        y, h_n, c_n = fastrnn.ops.recurrence(...)   # on CPU tensors, computed by sm_90 code
"""

import ctypes
import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import programs
from .compile import Launch
from .operands import FILES
from .ptx import Kernel, parse, size_of
from .translate import translate

# Turns of the schedule a program, each running its warps up to their next barriers, without a change in global memory:
# then they wait for one another. A time step of our kernels takes less than 200.
PATIENCE = 4000


class ExecutionError(RuntimeError):
    """The compiled code did what it must not: a race, an access out of bounds, a deadlock."""


@dataclass(frozen=True)
class Executed:
    """What running a kernel counted."""

    instructions: int  # of warps
    blocks: dict[str, tuple[int, int]]  # label of a basic block: (times a warp ran it, its instructions)


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("size", ctypes.c_uint64), ("writes", ctypes.c_void_p))


class _Machine(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        *((n, ctypes.c_uint32) for n in ("threads", "cluster", "shared_bytes", "r64", "r32", "r16", "p", "blocks")),
        ("seed", ctypes.c_uint64),
        ("patience", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("range_count", ctypes.c_uint32),
        ("executed", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("line", ctypes.c_int),
    )


def execute(launch: Launch, seed: int = 0) -> Executed:
    """Run a launch's PTX on its tensors, which must be CPU tensors; seed chooses the schedule, 0 takes turns.

    Raises ExecutionError, naming the PTX line and the line of the kernel, for a race, an access out of bounds or a
    deadlock; NotImplementedError for an instruction that is missing here.
    """
    if "ptx" not in launch.asm:
        raise NotImplementedError(f"execution of {launch.spec.arch} code is missing; PTX is executed")
    arguments = list(launch.arguments.values())
    grid = (launch.grid[0] * launch.ctas, *launch.grid[1:])
    return execute_ptx(launch.asm["ptx"], grid, 32 * launch.warps, arguments, launch.shared_bytes, launch.ctas, seed)


def execute_ptx(
    ptx: str,
    grid: tuple[int, int, int],
    threads: int,
    arguments: list[Tensor | int],
    shared_bytes: int = 0,
    cluster: int = 1,
    seed: int = 0,
) -> Executed:
    """Run a PTX module's kernel; grid counts thread blocks, and parameters beyond the arguments are null pointers."""
    kernel, library = _build(ptx)
    parameters = bytearray(kernel.parameter_bytes)
    for (offset, type_), argument in zip(kernel.parameters.values(), arguments, strict=False):
        number = argument.data_ptr() if isinstance(argument, Tensor) else int(argument)
        size = size_of(type_)
        parameters[offset : offset + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.numel()]
    # A tensor may be given twice: as the whole storage it is a range of memory once.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    writes = [torch.zeros(4 * s.nbytes() + 32, dtype=torch.int32) for s in storages.values()]
    ranges = (_Range * max(1, len(storages)))(
        *((start, s.nbytes(), w.data_ptr()) for (start, s), w in zip(storages.items(), writes, strict=True))
    )
    executed = (ctypes.c_uint64 * len(kernel.blocks))()
    message = ctypes.create_string_buffer(512)
    parameter_buffer = (ctypes.c_char * max(1, len(parameters))).from_buffer(parameters or bytearray(1))
    counts: dict[str, int] = dict.fromkeys(("r64", "r32", "r16", "p"), 1)
    for prefix, count in kernel.registers.items():
        counts[FILES[prefix]] = max(counts[FILES[prefix]], count)
    counts["p"] += kernel.registers.get("q", 0)  # operands.py
    machine = _Machine(
        grid=(ctypes.c_uint32 * 3)(*grid),
        threads=threads,
        cluster=cluster,
        shared_bytes=shared_bytes,
        blocks=len(kernel.blocks),
        seed=seed,
        patience=PATIENCE,
        parameters=ctypes.addressof(parameter_buffer),
        ranges=ctypes.addressof(ranges),
        range_count=len(storages),
        executed=ctypes.addressof(executed),
        message=ctypes.cast(message, ctypes.c_char_p),
        **counts,
    )
    if library.run(ctypes.byref(machine)):
        raise ExecutionError(_explain(ptx, kernel, message.value.decode(), machine.line))
    labels = {number: label for label, number in kernel.labels.items()}
    blocks = {
        labels.get(n, f"block {n}"): (executed[n], len(block)) for n, block in enumerate(kernel.blocks) if executed[n]
    }
    return Executed(sum(times * size for times, size in blocks.values()), blocks)


def _explain(ptx: str, kernel: Kernel, message: str, line: int) -> str:
    if not line:
        return message
    sources = {i.line: i.source for block in kernel.blocks for i in block}
    return f"{message}; PTX line {line} ({sources.get(line, '?')}): {ptx.splitlines()[line - 1].strip()}"


@cache
def _build(ptx: str) -> tuple[Kernel, ctypes.CDLL]:
    """The kernel and its machine as a library, kept on disk under a name that its source makes."""
    kernel = parse(ptx)
    machine = [(Path(__file__).parent / name).read_text() for name in ("machine.h", "schedule.h")]
    source = "".join((*machine, translate(kernel)))
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastrnn"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            code, built = Path(temporary) / "kernel.c", Path(temporary) / "kernel.so"
            code.write_text(source)
            # Products and sums apart, as PTX says where it wants them fused. A kernel runs for a fraction of what gcc
            # takes to build it: -O1 built three times as long, and saved a quarter of the run.
            flags = ["-O0", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
            programs.run(["gcc", *flags, str(code), "-o", str(built), "-lm"], "executing PTX on the CPU")
            built.replace(path)  # whole or not at all, whoever else builds it
    return kernel, ctypes.CDLL(str(path))
