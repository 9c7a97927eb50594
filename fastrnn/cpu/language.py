"""Functions of Triton, run on vectors of the CPU: of a cell, its step forward and backward.

A function with @triton.jit is Python source about tiles. Run as Python, with vectors for tiles and with what stands
here for triton.language, it writes LLVM's instructions. So the equations of a cell are written once, and a cell that
was registered needs nothing more.
"""

import functools
import inspect
import types
from typing import Any

from . import maths
from .values import Value


def _where(condition: Any, a: Any, b: Any) -> Any:
    code = next((v.code for v in (condition, a, b) if isinstance(v, Value)), None)
    return (a if condition else b) if code is None else code.where(condition, a, b)


def _intrinsic(name: str, *operands: Any) -> Value:
    first = next(v for v in operands if isinstance(v, Value))
    code = first.code
    return code.call(name, *(v if isinstance(v, Value) else code.number(v) for v in operands))


# Of triton.language, what a pointwise function may want.
LANGUAGE: dict[str, Any] = {
    "where": _where,
    "exp": maths.exp,
    "exp2": lambda x: maths.exp(x * 0.6931471805599453),
    "log": maths.log,
    "log2": lambda x: maths.log(x) * 1.4426950408889634,
    "sigmoid": lambda x: 1.0 / (1.0 + maths.exp(-x)),
    "abs": functools.partial(_intrinsic, "llvm.fabs"),
    "sqrt": functools.partial(_intrinsic, "llvm.sqrt"),
    "rsqrt": lambda x: 1.0 / _intrinsic("llvm.sqrt", x),
    "floor": functools.partial(_intrinsic, "llvm.floor"),
    "ceil": functools.partial(_intrinsic, "llvm.ceil"),
    "fma": functools.partial(_intrinsic, "llvm.fma"),
    "maximum": lambda a, b: _where(a > b, a, b),
    "minimum": lambda a, b: _where(a < b, a, b),
    "static_range": range,
    "constexpr": lambda value: value,
    "float32": "float32",
    "cast": lambda x, dtype: x,
    "zeros_like": lambda x: x.code.number(0.0),
    "full_like": lambda x, value: x.code.number(value),
    "static_assert": lambda *_: None,
}


class _Module:
    """A module whose functions of Triton are run on vectors."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if self._module.__name__.startswith("triton.language"):
            if name in ("math", "core"):
                return self
            if name not in LANGUAGE:
                raise NotImplementedError(
                    f"tl.{name} is missing in kernels for the CPU, which have {', '.join(LANGUAGE)}"
                )
            return LANGUAGE[name]
        return on_vectors(getattr(self._module, name))


def on_vectors(found: Any) -> Any:
    """Return what a name in a Triton function stands for when the function runs on vectors."""
    from triton.language import constexpr
    from triton.runtime.jit import KernelInterface

    if isinstance(found, constexpr):
        return found.value
    if isinstance(found, KernelInterface):
        function = found.fn  # type: ignore[attr-defined]
        run = _rebound(function)
        # Its polynomial is as exact as float32.
        if function.__name__ == "tanh" and function.__module__.endswith(".activations"):
            return lambda x, HOW: run(x, HOW) if maths.form_of(x.code) is maths.FLOAT32 else maths.tanh(x)
        return run
    if inspect.ismodule(found):
        return _Module(found)
    return LANGUAGE.get(found.__name__, found) if getattr(found, "__module__", "").startswith("triton") else found


def _rebound(function: Any) -> Any:
    """A Python function whose names are those of vectors; they are looked up when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        names = function.__globals__
        own = {name: on_vectors(names[name]) for name in function.__code__.co_names if name in names}
        cells = tuple(types.CellType(on_vectors(cell.cell_contents)) for cell in function.__closure__ or ())
        own["__builtins__"] = names["__builtins__"]
        made = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        return made(*args, **kwargs)

    return call
