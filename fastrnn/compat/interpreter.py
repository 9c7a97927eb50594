"""Triton's interpreter with correct bfloat16, so that the CPU computes what a GPU would, and with less overhead.

It corrects two faults of triton/runtime/interpreter.py, read in 3.9.0 (the same in 3.5 to 3.8). `create_dot` multiplies
the uint16 that bfloat16 is stored in as integers. The cast from float32 truncates where hardware rounds to nearest
even. It is faster too: each call of a function in a kernel patches all of triton.language again (`_patch_lang`), a
third of the time. Here the launch does that once. Triton 3.5 and 3.6 moreover convert a loop's bound, an array of one
element, by `int`, which numpy 2.4 and later refuse. Only this file and concurrent_interpreter.py use the interpreter's
internals.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

# Kernels are interpreted if TRITON_INTERPRET=1 was set before fastrnn was imported.
ENABLED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@contextmanager
def corrected() -> Iterator[None]:
    """Correct the interpreter inside the block. Nothing happens where kernels are compiled."""
    if not ENABLED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_patch = interpreter._patch_lang

    def patch_lang(fn):
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(lang.load) for lang in langs):  # not patched yet: fn is the kernel itself
            return plain_patch(fn)

    plain_patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        plain_patch_tensor(tensor, *scope)  # first, so that the scope later restores Triton's own method
        tensor.__index__ = lambda self: self.handle.data.item()

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return plain_dot(self, a, b, d, *args)

    def cast_impl(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            exact = (np.asarray(src.data).astype(np.uint32) << 16).view(np.float32)
            return TensorHandle(exact, tl.float32)
        return plain_cast(self, src, dst_type)

    # exp overflows to inf on purpose (kernels/activations.py). A GPU is silent there, but numpy would warn.
    with (
        np.errstate(over="ignore"),
        mock.patch.multiple(interpreter, _patch_lang=patch_lang, _patch_lang_tensor=patch_lang_tensor),
        mock.patch.multiple(InterpreterBuilder, create_dot=create_dot, cast_impl=cast_impl),
    ):
        yield
