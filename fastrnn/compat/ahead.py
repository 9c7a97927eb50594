"""Kernels compiled before the first launch that needs them, several at once: by this process and by others.

`asking` runs calls of which no kernel of ours is launched, and collects what first_without_spills was asked;
`compile_all` compiles that into Triton's cache on disk, and loads it. A process with torch starts in the time of some
three kernels: this one begins at once, and others take from what is left as soon as they are up.

Uses JITFunction.run and .warmup, make_backend and its backends' add_stages, and triton.runtime.driver,
read in 3.6 to 3.9.
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
    """What was asked, with Pointers for tensors, on a device by Triton's number."""

    asked: spills.Asked
    device: int

    def compiled(self, choice: dict) -> Any:
        with torch.cuda.device(self.device) if torch.cuda.is_available() else contextlib.nullcontext():
            return self.asked.compiled(choice)


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


Form = tuple[Kernel, dict]  # and one of its choices


@contextlib.contextmanager
def asking(instead: Callable[[tuple], object]) -> Iterator[list[Kernel]]:
    """While the block runs, launch none of our kernels but call instead(arguments); which were asked for, each once."""
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
    """Compile and load what first_without_spills will choose; return how many forms Triton's caches did not have."""
    kernels = [kernel for kernel in kernels if not spills.is_chosen(kernel.asked)]
    first = [(kernel, kernel.asked.choices[0]) for kernel in kernels]
    count = _compile(first, processes)
    # Only the driver counts the registers that spill, and this process has it. All other forms are tried at once then.
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
    """Whether Triton has a kernel, in memory or on disk, without the stages of its compiler."""
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
    """Of kernels and their steps only the names."""

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
        # Where fastrnn, and a cell of one's own, was imported from, whatever the folder. No GPU: it needs none.
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
            while answer.read(1):  # it is up, or has compiled one
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
        """Wait for the kernel that it compiles, if any; nothing is left to share."""
        if not self.busy:  # or not even up
            self.idle_at_the_end = True
            self.process.kill()
        self.join()


def serve() -> None:
    """Compile what comes by standard input, until it ends: what the other process does."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a compiler prints
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
