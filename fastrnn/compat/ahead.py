"""Compile kernels before the first launch that needs them, several at once, in this process and in others.

`asking` runs calls without launching our kernels, and collects what first_without_spills was asked. `compile_all`
compiles these kernels into Triton's cache on disk, and loads them. A process with torch starts in the time of about
three kernels. This process therefore begins at once, and the others take from the rest as soon as they are up.

Uses JITFunction.run and .warmup, make_backend and its backends' add_stages, and triton.runtime.driver, read in 3.6 to
3.9.
"""

import contextlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from . import spills

STARTS_IN = 3  # kernels that this process compiles while another one starts


class Kernel(NamedTuple):
    """What first_without_spills was asked, with Pointers in place of tensors, and Triton's number of the device."""

    asked: spills.Asked
    device: int

    def compiled(self, choice: dict) -> Any:
        with torch.cuda.device(self.device) if torch.cuda.is_available() else contextlib.nullcontext():
            return self.asked.compiled(choice)


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


Form = tuple[Kernel, dict]  # a kernel, and one of its choices


@contextlib.contextmanager
def asking(instead: Callable[[tuple], object]) -> Iterator[list[Kernel]]:
    """Launch none of our kernels inside the block, but call instead(arguments). Yields a list of the kernels."""
    from triton.runtime.jit import JITFunction

    found: list[Kernel] = []
    known, functions, run_by_triton = set(), set(), JITFunction.run

    def listen(asked: spills.Asked) -> None:
        device = _driver().get_current_device()
        functions.add(asked.function)
        if (device, asked.key) not in known:
            known.add((device, asked.key))
            found.append(Kernel(asked._replace(arguments=spills.Pointer.like(asked.arguments)), device))

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in functions:  # somebody else's kernel
            return run_by_triton(self, *args, grid=grid, warmup=warmup, **options)
        instead(args)

    with mock.patch.object(spills, "listener", listen), mock.patch.object(JITFunction, "run", run):
        yield found


def compile_all(kernels: list[Kernel], processes: int) -> int:
    """Compile and load what first_without_spills will choose. Return how many compilations Triton's caches lacked."""
    kernels = [kernel for kernel in kernels if not spills.is_chosen(kernel.asked)]
    first = [(kernel, kernel.asked.choices[0]) for kernel in kernels]
    count = _compile(first, processes)
    # Only the driver counts spilled registers, and this process has it. If one spills, compile all its other forms.
    spilling = [kernel for kernel, choice in first if spills.spilled_registers(kernel.compiled(choice))]
    count += _compile([(kernel, choice) for kernel in spilling for choice in kernel.asked.choices[1:]], processes)
    for kernel in kernels:
        with torch.cuda.device(kernel.device) if torch.cuda.is_available() else contextlib.nullcontext():
            spills.first_without_spills(*kernel.asked)
    return count


def _compile(forms: list[Form], processes: int) -> int:
    missing = [form for form in forms if not _is_cached(*form)]
    own, shared = [], deque[tuple[Form, bytes]]()
    for form in missing:
        try:
            shared.append((form, _pickled(*form)))
        except pickle.PicklingError:
            own.append(form)
    others = [_Other(shared) for _ in range(min(processes - 1, len(shared) // STARTS_IN))]
    try:
        for kernel, choice in own:
            kernel.compiled(choice)
        while shared:
            with contextlib.suppress(IndexError):  # another process was faster
                (kernel, choice), _ = shared.popleft()
                kernel.compiled(choice)
    finally:
        shared.clear()
        for other in others:
            other.finish()
    for other in others:
        if other.failed:
            raise RuntimeError(f"a process that compiled kernels ahead failed: {other.failed}")
    return len(missing)


class _MissingError(Exception):
    """Triton's caches lack a kernel."""


def _is_cached(kernel: Kernel, choice: dict) -> bool:
    """Whether Triton has a kernel in memory or on disk. The compiler's stages do not run."""
    from triton.compiler.compiler import make_backend

    def stop(*args: Any) -> None:
        raise _MissingError

    backend = type(make_backend(_driver().get_current_target()))
    with mock.patch.object(backend, "add_stages", stop):
        try:
            kernel.compiled(choice)
        except _MissingError:
            return False
    return True


class _Pickler(pickle.Pickler):
    """Pickles kernels and their steps by name."""

    def reducer_override(self, found: Any) -> Any:
        from triton.runtime.jit import JITFunction

        if not isinstance(found, JITFunction):
            return NotImplemented
        module, name = found.fn.__module__, found.fn.__qualname__
        if module == "__main__" or getattr(sys.modules.get(module), name, None) is not found:
            raise pickle.PicklingError(f"another process cannot import {name} from {module}")
        return _imported, (module, name)


def _imported(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _pickled(kernel: Kernel, choice: dict) -> bytes:
    asked, file = kernel.asked, io.BytesIO()
    _Pickler(file).dump(
        (_driver().get_current_target(), asked.function, asked.arguments, asked.grid, asked.options_of(choice))
    )
    return file.getvalue()


class _Other(threading.Thread):
    """Another process, and the thread that hands it one kernel after the other."""

    def __init__(self, shared: deque[tuple[Form, bytes]]) -> None:
        super().__init__(daemon=True)
        # The other process gets this one's sys.path, to import fastrnn and the user's cells. It needs no GPU.
        start = f"import sys; sys.path[:] = {sys.path!r}; from fastrnn.compat import ahead; ahead.serve()"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (the thread closes it)
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        self.shared, self.busy, self.idle_at_the_end, self.failed = shared, False, False, ""
        self.start()

    def run(self) -> None:
        ask, answer = self.process.stdin, self.process.stdout
        assert ask and answer
        with ask, answer, self.errors:
            while answer.read(1):  # the process is up, or has compiled a kernel
                self.busy = True
                try:
                    _, pickled = self.shared.popleft()
                except IndexError:
                    self.busy = False
                    break
                ask.write(pickled)
                ask.flush()
            ask.close()
            if self.process.wait() and not self.idle_at_the_end:
                self.errors.seek(0)
                self.failed = self.errors.read().decode(errors="replace")[-2000:] or "it wrote no message"

    def finish(self) -> None:
        """Wait for the kernel that the process compiles, if any. Nothing is left to share."""
        if not self.busy:  # it waits for a kernel, or is not up yet
            self.idle_at_the_end = True
            self.process.kill()
        self.join()


def serve() -> None:
    """Compile what comes through standard input until it ends. The other processes run this."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a compiler prints must not mix with the answers
    answers.write(b".")
    while True:
        try:
            target, function, arguments, grid, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        from triton.runtime import driver

        stand_in: Any = SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda target=target: target,
        )
        with mock.patch.object(driver, "_active", stand_in):
            function.warmup(*arguments, grid=grid, **options)
        answers.write(b".")
