"""LLVM's instructions with Python's operators: what a kernel for the CPU is written in.

A kernel is a Python function that runs once, on a `Code`: each operator writes an instruction, each `with code.loop(n)`
a loop. What is known then (sizes, a cell, which tensors are given) is plain Python, as a constant is in Triton.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
# Sums and products may be fused, as on a GPU; NaN and infinities are what they are.
FUSED = ("contract",)
_COMPARED = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


class Value:
    """A vector of floats, a mask, or an integer."""

    def __init__(self, code: "Code", value: Any) -> None:
        self.code, self.ir = code, value

    @property
    def lanes(self) -> Any:
        """Return the type of an element."""
        return self.ir.type.element if isinstance(self.ir.type, ir.VectorType) else self.ir.type

    @property
    def is_float(self) -> bool:
        return isinstance(self.lanes, ir.FloatType | ir.DoubleType)

    def like(self, other: Any) -> Any:
        """Return an operand of this value's type. A number is the same in all lanes."""
        return other.ir if isinstance(other, Value) else self.code.constant(self.ir.type, other)

    def _binary(self, other: Any, of_floats: str, of_ints: str, swapped: bool = False) -> "Value":
        if not isinstance(other, Value | int | float):
            return NotImplemented
        operands = (self.like(other), self.ir) if swapped else (self.ir, self.like(other))
        builder = self.code.builder
        if self.is_float:
            return Value(self.code, getattr(builder, of_floats)(*operands, flags=FUSED))
        return Value(self.code, getattr(builder, of_ints)(*operands))

    def _compare(self, how: str, other: Any) -> "Value":
        builder, other = self.code.builder, self.like(other)
        if not self.is_float:
            return Value(self.code, builder.icmp_signed(how, self.ir, other))
        compare = builder.fcmp_unordered if how == "!=" else builder.fcmp_ordered
        return Value(self.code, compare(how, self.ir, other))

    def __add__(self, other: Any) -> "Value":
        return self._binary(other, "fadd", "add")

    def __radd__(self, other: Any) -> "Value":
        return self._binary(other, "fadd", "add", swapped=True)

    def __sub__(self, other: Any) -> "Value":
        return self._binary(other, "fsub", "sub")

    def __rsub__(self, other: Any) -> "Value":
        return self._binary(other, "fsub", "sub", swapped=True)

    def __mul__(self, other: Any) -> "Value":
        return self._binary(other, "fmul", "mul")

    def __rmul__(self, other: Any) -> "Value":
        return self._binary(other, "fmul", "mul", swapped=True)

    def __truediv__(self, other: Any) -> "Value":
        return self._binary(other, "fdiv", "sdiv")

    def __rtruediv__(self, other: Any) -> "Value":
        return self._binary(other, "fdiv", "sdiv", swapped=True)

    def __floordiv__(self, other: Any) -> "Value":
        return self._binary(other, "fdiv", "sdiv")

    def __mod__(self, other: Any) -> "Value":
        return self._binary(other, "frem", "srem")

    def __and__(self, other: Any) -> "Value":
        return self._binary(other, "and_", "and_")

    def __or__(self, other: Any) -> "Value":
        return self._binary(other, "or_", "or_")

    __rand__, __ror__ = __and__, __or__

    def __neg__(self) -> "Value":
        return Value(self.code, self.code.builder.fneg(self.ir)) if self.is_float else 0 - self

    def __invert__(self) -> "Value":
        return Value(self.code, self.code.builder.not_(self.ir))

    def __lt__(self, other: Any) -> "Value":
        return self._compare("<", other)

    def __le__(self, other: Any) -> "Value":
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> "Value":
        return self._compare(">", other)

    def __ge__(self, other: Any) -> "Value":
        return self._compare(">=", other)

    def __eq__(self, other: Any) -> "Value":  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: Any) -> "Value":  # type: ignore[override]
        return self._compare("!=", other)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise NotImplementedError(
            "a kernel for the CPU cannot branch on the values of a tile: use tl.where in place of `if`"
        )

    def to(self, dtype: Any) -> "Value":
        """Return the value itself: all tiles of a cell have one dtype."""
        return self


class Pointer:
    """Elements of one type in memory, counted by integers."""

    def __init__(self, code: "Code", base: Any, of: Any) -> None:
        self.code, self.ir, self.of = code, base, of

    def at(self, index: Any) -> "Pointer":
        index = index.ir if isinstance(index, Value) else ir.Constant(I64, index)
        return Pointer(self.code, self.code.builder.gep(self.ir, [index], source_etype=self.of), self.of)

    def element(self, index: Any) -> Value:
        """Load one element. A float is then the same in all lanes."""
        found = self.code.builder.load(self.at(index).ir, typ=self.of)
        if not isinstance(self.of, ir.FloatType | ir.DoubleType):
            return Value(self.code, found)
        return self.code.spread(found)

    def load(self, index: Any, mask: Value | None = None) -> Value:
        """Load a vector. With a mask, the other lanes are zero."""
        code, at = self.code, self.at(index).ir
        whole = ir.VectorType(self.of, code.width)
        align = 4 if isinstance(self.of, ir.FloatType) else 8 if isinstance(self.of, ir.DoubleType) else 1
        if mask is None:
            return Value(code, code.builder.load(at, align=align, typ=whole))
        zeros = code.constant(whole, 0)
        # With the alignment as an argument: newer versions of LLVM read it as their own form.
        load = code.intrinsic("llvm.masked.load", whole, [ir.PointerType(), I32, mask.ir.type, whole])
        return Value(code, code.builder.call(load, [at, ir.Constant(I32, align), mask.ir, zeros]))

    def store(self, value: Value, index: Any, mask: Value | None = None) -> None:
        code, at, whole = self.code, self.at(index).ir, value.ir.type
        align = 4 if isinstance(self.of, ir.FloatType) else 8 if isinstance(self.of, ir.DoubleType) else 1
        if mask is None:
            code.builder.store(value.ir, at, align=align)
            return
        store = code.intrinsic("llvm.masked.store", ir.VoidType(), [whole, ir.PointerType(), I32, mask.ir.type])
        code.builder.call(store, [value.ir, at, ir.Constant(I32, align), mask.ir])


class Variable:
    """A variable that changes from one turn of a loop to the next."""

    def __init__(self, code: "Code", value: Value) -> None:
        self.code, self.of = code, value.ir.type
        with code.builder.goto_entry_block():
            self.ir = code.builder.alloca(self.of)
        self.put(value)

    def get(self) -> Value:
        return Value(self.code, self.code.builder.load(self.ir, typ=self.of))

    def put(self, value: Value) -> None:
        self.code.builder.store(value.ir, self.ir)


class Code:
    """A function of a module that is being written, for vectors of so many floats of a type."""

    def __init__(self, module: ir.Module, name: str, arguments: int, real: Any, width: int) -> None:
        self.module, self.real, self.width = module, real, width
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.arguments = [Value(self, argument) for argument in function.args]
        self.vector = ir.VectorType(real, width)

    def constant(self, of: Any, number: Any) -> Any:
        if isinstance(of, ir.VectorType):
            return ir.Constant(of, [self.constant(of.element, number)] * of.count)
        is_float = isinstance(of, ir.FloatType | ir.DoubleType)
        return ir.Constant(of, float(number) if is_float else int(number))

    def number(self, number: float) -> Value:
        """Return a vector of the number."""
        return Value(self, self.constant(self.vector, number))

    def integer(self, number: int) -> Value:
        return Value(self, ir.Constant(I64, number))

    def pointer(self, address: Value, of: Any) -> Pointer:
        return Pointer(self, self.builder.inttoptr(address.ir, ir.PointerType()), of)

    def spread(self, scalar: Any) -> Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.width), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        places = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return Value(self, self.builder.shuffle_vector(first, undefined, places))

    def intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """Declare a function of LLVM's, named by the type of the vector, and of the pointer if it takes one."""
        vector = next(of for of in (result, *arguments) if isinstance(of, ir.VectorType))
        element = f"f{32 if isinstance(vector.element, ir.FloatType) else 64}" if vector.element != I8 else "i8"
        full = f"{name}.v{vector.count}{element}" + (".p0" if "masked" in name else "")
        found = self.module.globals.get(full)
        return found or ir.Function(self.module, ir.FunctionType(result, arguments), full)

    def call(self, name: str, *operands: Value) -> Value:
        """Call an intrinsic of vectors of floats."""
        function = self.intrinsic(name, self.vector, [self.vector] * len(operands))
        return Value(self, self.builder.call(function, [operand.ir for operand in operands]))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, Value):
            return a if condition else b
        like = next((v for v in (a, b) if isinstance(v, Value)), self.number(0))
        return Value(self, self.builder.select(condition.ir, like.like(a), like.like(b)))

    def bits(self, value: Value, of: Any) -> Value:
        """Return the same bits as a vector of another type."""
        return Value(self, self.builder.bitcast(value.ir, ir.VectorType(of, self.width)))

    def shifted(self, value: Value, places: int) -> Value:
        """Shift a vector of integers to the left, or to the right for negative places."""
        shift = self.builder.shl if places >= 0 else self.builder.lshr
        return Value(self, shift(value.ir, self.constant(value.ir.type, abs(places))))

    def mask(self, count: int) -> Value:
        """Return the mask of the first lanes."""
        lanes = [ir.Constant(I1, int(lane < count)) for lane in range(self.width)]
        return Value(self, ir.Constant(ir.VectorType(I1, self.width), lanes))

    def widened(self, value: Value) -> Value:
        """Return a condition as an integer."""
        return Value(self, self.builder.zext(value.ir, I64))

    @contextmanager
    def loop(self, count: Any) -> Iterator[Value]:
        """Write a loop over an index from 0 on."""
        builder, count = self.builder, count if isinstance(count, Value) else self.integer(count)
        index = Variable(self, self.integer(0))
        head, body = builder.append_basic_block(), builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(head)
        builder.position_at_end(head)
        now = index.get()
        builder.cbranch((now < count).ir, body, after)
        builder.position_at_end(body)
        yield now
        index.put(now + 1)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    def blocks(self, H: int, body: Callable[[Any, Value | None], Any]) -> None:
        """Write body(first unit, mask) for each vector of H units. The mask is None if the vector is full."""
        if self.width <= H:
            with self.loop(H // self.width) as block:
                body(block * self.width, None)
        if H % self.width:
            body(self.integer(H // self.width * self.width), self.mask(H % self.width))
