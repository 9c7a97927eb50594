"""What fastrnn corrects in Triton's interpreter is wrong there and right afterwards: a fixed Triton is noticed."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from fastrnn.compat import interpreter

pytestmark = pytest.mark.skipif(not interpreter.ENABLED, reason="about the interpreter: set TRITON_INTERPRET=1")


@triton.jit
def product(a_ptr, b_ptr, c_ptr, rounded_ptr):
    rows = tl.arange(0, 16)[:, None]
    columns = tl.arange(0, 16)[None, :]
    c = tl.dot(tl.load(a_ptr + rows * 16 + columns), tl.load(b_ptr + rows * 16 + columns))
    tl.store(c_ptr + rows * 16 + columns, c)
    tl.store(rounded_ptr + rows * 16 + columns, c.to(tl.bfloat16))


@triton.jit
def square(x):
    return x * x


@triton.jit
def fourth_power(x_ptr):
    tl.store(x_ptr, square(square(tl.load(x_ptr))))


@pytest.mark.parametrize("corrected", (True, False))
def test_triton_language_is_patched_once_a_launch(corrected, monkeypatch):
    patched = []
    patch = triton.runtime.interpreter._patch_lang_core
    monkeypatch.setattr(triton.runtime.interpreter, "_patch_lang_core", lambda *args: [patched.append(1), patch(*args)])
    for launches in (1, 2):
        x = torch.tensor([3.0])
        with interpreter.corrected() if corrected else contextlib.nullcontext():
            fourth_power[(1,)](x)
        assert x.item() == 81
        assert (len(patched) == launches) == corrected, "more often: a fault that Triton may have mended"
    assert tl.core.is_builtin(tl.load), "the launch puts back what it patched"


@triton.jit
def count_to(n_ptr, total_ptr):
    n = tl.load(n_ptr + tl.arange(0, 1)).sum(0)
    for i in range(tl.program_id(0) * 0, n):
        tl.store(total_ptr, tl.load(total_ptr) + i)


def test_a_loops_bound_may_be_an_array_of_one_element(monkeypatch):
    """As numpy 2.4 and later see the bounds that Triton 3.5 and 3.6 hold, whichever are installed here."""
    plain = triton.runtime.interpreter._patch_lang_tensor

    def refusing(tensor, *scope):
        plain(tensor, *scope)
        tensor.__index__ = refuse

    def refuse(self):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(triton.runtime.interpreter, "_patch_lang_tensor", refusing)
    before, total = vars(tl.tensor).get("__index__"), torch.tensor([0])
    with interpreter.corrected():
        count_to[(1,)](torch.tensor([4], dtype=torch.int32), total)
    assert total.item() == 0 + 1 + 2 + 3
    assert vars(tl.tensor).get("__index__") is before, "the launch puts back what it patched"


@pytest.mark.parametrize("corrected", (True, False))
def test_bfloat16(corrected):
    a, b = torch.randn(2, 16, 16).bfloat16()
    c, rounded = torch.zeros(16, 16), torch.zeros(16, 16).bfloat16()
    with interpreter.corrected() if corrected else contextlib.nullcontext():
        product[(1,)](a, b, c, rounded)
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-5) == corrected
    assert torch.equal(rounded, c.bfloat16()) == corrected
