"""PTX instructions as C, by families: the first part of an opcode is looked up in FAMILIES.

Each function gives a loop over the lanes of a warp, or None for a form of the instruction that is missing.
Source: NVIDIA's PTX ISA 9.0 for every instruction's meaning.
"""

import re
from collections.abc import Callable

from .operands import C_TYPES, FROM_FLOAT, TO_FLOAT, Operands, unsigned
from .ptx import FENCE, Instruction, Kernel, size_of

BINARY = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
           "hs": ">="}  # fmt: skip
UNARY = {"ex2": "exp2f", "lg2": "log2f", "sqrt": "sqrtf", "tanh": "tanh_approx", "sin": "sinf", "cos": "cosf",
         "rcp": "1.0f / ", "rsqrt": "1.0f / sqrtf", "abs": "fabsf", "neg": "-"}  # fmt: skip


def instruction_in_c(kernel: Kernel, instruction: Instruction) -> str:
    """One instruction for all lanes in the mask m; NotImplementedError with its line if it is missing."""
    operands = Operands(kernel, instruction)
    family = FAMILIES.get(instruction.parts[0])
    translated = family(operands) if family else None
    return operands.missing() if translated is None else translated


def move(t: Operands) -> str:
    to, source = t.operands
    if to.startswith("{"):
        names = t.vector(to)
        bits = size_of(t.type) * 8 // len(names)
        parts = " ".join(t.store(name, f"u{bits}", f"v >> {bits * i}") for i, name in enumerate(names))
        return t.lanes(f"uint64_t v = {t.value(source, unsigned(t.type))}; {parts}")
    if source.startswith("{"):
        names = t.vector(source)
        bits = size_of(t.type) * 8 // len(names)
        parts = " | ".join(f"(uint64_t){t.value(name, f'u{bits}')} << {bits * i}" for i, name in enumerate(names))
        return t.result(parts, unsigned(t.type))
    return t.result(t.argument(1, unsigned(t.type)), unsigned(t.type))


def arithmetic(t: Operands) -> str | None:
    """add, sub, mul, and, or, xor, min, max, mad, fma of every type."""
    name, kind = t.parts[0], t.type
    if kind.endswith("x2"):
        return packed_arithmetic(t)
    if kind in TO_FLOAT and t.parts[-2] == "f32":  # sub.rn.f32.bf16: the factors, or the first term, are 16 bits
        narrow = 2 if name == "fma" else 1
        terms = [t.argument(i, kind if i <= narrow else "f32") for i in range(1, len(t.operands))]
        return t.result(_float_expression(name, terms), "f32")
    if kind in ("f32", "f16", "bf16"):
        return t.result(_float_expression(name, [t.argument(i) for i in range(1, len(t.operands))]))
    if kind == "pred":
        return t.result(f"{t.argument(1)} {BINARY[name]} {t.argument(2)}")
    if "wide" in t.parts:
        wide = f"{kind[0]}{size_of(kind) * 16}"
        product = f"({C_TYPES[wide]}){t.argument(1)} * ({C_TYPES[wide]}){t.argument(2)}"
        return t.result(product + (f" + {t.argument(3, wide)}" if name == "mad" else ""), unsigned(wide))
    if "hi" in t.parts:
        bits = size_of(kind) * 8
        if name != "mul" or bits == 64:
            return None
        narrow, wide = C_TYPES[kind], C_TYPES[f"{kind[0]}{2 * bits}"]
        factors = (
            f"({wide})({narrow})({t.argument(i)})" for i in (1, 2)
        )  # a constant may be written as a negative one
        return t.result(f"({' * '.join(factors)}) >> {bits}", f"u{bits}")
    if name in ("min", "max"):
        a, b = t.argument(1), t.argument(2)
        return t.result(f"{a} {'<' if name == 'min' else '>'} {b} ? {a} : {b}", unsigned(kind))
    kind = unsigned(kind)
    if name in ("mad", "fma"):
        return t.result(f"{t.argument(1, kind)} * {t.argument(2, kind)} + {t.argument(3, kind)}", kind)
    return t.result(f"{t.argument(1, kind)} {BINARY[name]} {t.argument(2, kind)}", kind)


def _float_expression(name: str, terms: list[str]) -> str:
    if name in ("fma", "mad"):
        return f"fmaf({', '.join(terms)})"
    return f"f{name}f({', '.join(terms)})" if name in ("min", "max") else f"{terms[0]} {BINARY[name]} {terms[1]}"


def packed_arithmetic(t: Operands) -> str:
    """Two floats in one register: f32x2 in 64 bits, f16x2 and bf16x2 in 32."""
    element = t.type.removesuffix("x2")
    bits = size_of(element) * 8
    halves = []
    for half in range(2):
        terms = [f"({t.argument(i, f'u{2 * bits}')} >> {bits * half})" for i in range(1, len(t.operands))]
        convert = "FLOAT" if element == "f32" else TO_FLOAT[element]
        value = _float_expression(t.parts[0], [f"{convert}((uint{bits}_t){term})" for term in terms])
        halves.append(f"BITS({value})" if element == "f32" else f"{FROM_FLOAT[element]}({value})")
    return t.result(f"{halves[0]} | (uint{2 * bits}_t){halves[1]} << {bits}", f"u{2 * bits}")


def shift(t: Operands) -> str:
    bits, by = size_of(t.type) * 8, t.argument(2, "u32")
    if t.parts[0] == "shr" and t.type[0] == "s":
        return t.result(f"{t.argument(1)} >> ({by} >= {bits} ? {bits - 1} : {by})", f"u{bits}")
    operator = "<<" if t.parts[0] == "shl" else ">>"
    return t.result(f"{by} >= {bits} ? 0 : {t.argument(1, f'u{bits}')} {operator} {by}", f"u{bits}")


def unary(t: Operands) -> str | None:
    name = t.parts[0]
    if name == "not":
        return t.result(f"{'!' if t.type == 'pred' else '~'}{t.argument(1, unsigned(t.type))}", unsigned(t.type))
    if t.type == "f32":
        return t.result(f"{UNARY[name]}({t.argument(1)})")
    if t.type[0] == "s":
        value = t.argument(1)
        return t.result(f"-{value}" if name == "neg" else f"{value} < 0 ? -{value} : {value}", unsigned(t.type))
    return None


def divide(t: Operands) -> str | None:
    if t.type == "f32":
        return t.result(f"{t.argument(1)} / {t.argument(2)}") if t.parts[0] == "div" else None
    operator = "/" if t.parts[0] == "div" else "%"
    return t.result(f"{t.argument(2)} ? {t.argument(1)} {operator} {t.argument(2)} : 0", unsigned(t.type))


def extract_bits(t: Operands) -> str:
    length, left = (
        t.argument(3, "u32"),
        f"({t.argument(1, 'u32')} << (32 - {t.argument(2, 'u32')} - {t.argument(3, 'u32')}))",
    )
    return t.result(f"{length} ? (({C_TYPES[t.type]}){left}) >> (32 - {length}) : 0", "u32")


def permute_bytes(t: Operands) -> str:
    return t.lanes(
        f"uint64_t from = {t.argument(1, 'u32')} | (uint64_t){t.argument(2, 'u32')} << 32; "
        f"uint32_t select = {t.argument(3, 'u32')}, to = 0; for (int i = 0; i < 4; i++) {{ "
        "uint32_t s = select >> 4 * i, byte = from >> (s & 7) * 8 & 255; "
        f"to |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i; }} {t.store(t.operands[0], 'u32', 'to')}"
    )


def select(t: Operands) -> str:
    kind = unsigned(t.type)
    return t.result(f"{t.value(t.operands[3], 'pred')} ? {t.argument(1, kind)} : {t.argument(2, kind)}", kind)


def compare(t: Operands) -> str | None:
    name = t.parts[1]
    if t.type in ("f16x2", "bf16x2"):
        predicates, *terms = t.operands
        if name not in COMPARE or len(terms) != 2:
            return None
        to_float, code = TO_FLOAT[t.type.removesuffix("x2")], ""
        for half, predicate in enumerate(predicates.split("|")):
            a, b = (f"{to_float}((uint16_t)({t.argument(i, 'u32')} >> {16 * half}))" for i in (1, 2))
            code += t.store(predicate, "pred", f"{a} {COMPARE[name]} {b}")
        return t.lanes(code)
    a, b = t.argument(1), t.argument(2)
    unordered = len(name) == 3
    value = f"({a} {COMPARE[name[:2]]} {b})"
    if unordered:
        value = f"({value} || isnan({a}) || isnan({b}))"
    if t.parts[2] in ("and", "or", "xor"):
        value = f"{value} {BINARY[t.parts[2]]} {t.value(t.operands[3], 'pred')}"
    return t.result(value, "pred")


def convert(t: Operands) -> str | None:
    to, source = t.parts[-2], t.parts[-1]
    if to in ("f16x2", "bf16x2") and source == "f32":
        high, low = (f"{FROM_FLOAT[to[:-2]]}({t.argument(i, 'f32')})" for i in (1, 2))
        return t.result(f"(uint32_t){high} << 16 | {low}", "u32")
    if to in FROM_FLOAT or source in TO_FLOAT:
        return t.result(t.argument(1, source), to) if "f32" in (to, source) else None
    if to == "tf32":
        return None
    if to[0] == "f":
        return t.result(f"({C_TYPES[to]}){t.argument(1, source)}", to)
    if source[0] == "f":
        rounding = {"rzi": "truncf", "rni": "rintf", "rmi": "floorf", "rpi": "ceilf"}[t.parts[1]]
        return t.result(f"({C_TYPES[to]}){rounding}({t.argument(1, source)})", unsigned(to))
    return t.result(f"({C_TYPES[to]}){t.argument(1, source)}", unsigned(to))


def load(t: Operands) -> str | None:
    kind = unsigned(t.type) if t.type != "f32" else "u32"
    size, names = size_of(kind), t.vector(t.operands[0])
    stores = " ".join(t.store(name, kind, f"v[{i}]") for i, name in enumerate(names))
    values = f"{C_TYPES[kind]} v[{len(names)}];"
    if t.space == "param":
        place = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", t.operands[1].replace(" ", ""))
        assert place is not None
        offset = t.kernel.parameters[place[1]][0] + int(place[2] or 0)
        return t.lanes(f"{values} memcpy(v, M->parameters + {offset}, sizeof v); {stores}")
    if t.space == "shared":
        read = f"read_shared(w, v, {t.address(t.operands[1], True)}, {size * len(names)}, {t.line});"
        return t.lanes(f"{values} {read} {stores}")
    if t.space != "global":
        return None
    address = t.address(t.operands[1], False)
    strong = {"acquire", "relaxed", "volatile", "cv"} & set(t.parts)  # how programs wait for one another
    how = "STRONG" if strong else "PAST_L1" if "cg" in t.parts else "THROUGH_L1"
    sync = f"synchronise(w, {address}, 1, 0);" if "acquire" in t.parts else ""
    return t.lanes(f"{values} read_global(w, v, {address}, sizeof v, sizeof *v, {how}, {t.line}); {sync} {stores}")


def store(t: Operands) -> str | None:
    kind = unsigned(t.type) if t.type != "f32" else "u32"
    names = t.vector(t.operands[1])
    values = ", ".join(t.value(name, kind) for name in names)
    to = f"{C_TYPES[kind]} v[] = {{{values}}};"
    if t.space == "shared":
        return t.lanes(f"{to} write_shared(w, {t.address(t.operands[0], True)}, v, sizeof v, {t.line});")
    if t.space != "global" or {"release", "volatile"} & set(t.parts):
        return None
    how = "STRONG" if "relaxed" in t.parts else "PAST_L1"
    return t.lanes(f"{to} write_global(w, {t.address(t.operands[0], False)}, v, sizeof v, {how}, {t.line});")


def atomic(t: Operands) -> str | None:
    """atom and red on global memory."""
    returns = t.parts[0] == "atom"
    operations = {"add": "old + v", "exch": "v", "max": "old > v ? old : v", "min": "old < v ? old : v",
                  "and": "old & v", "or": "old | v"}  # fmt: skip
    operation = next((p for p in t.parts if p in operations), None)
    if t.space != "global" or operation is None or t.type in ("f16", "bf16"):
        return None
    c_type, at = C_TYPES[t.type], int(returns)
    acquire = int(bool({"acquire", "acq_rel"} & set(t.parts)))
    release = int(bool({"release", "acq_rel"} & set(t.parts)))
    code = (
        f"uint64_t a = {t.address(t.operands[at], False)}; range_of(a, {size_of(t.type)}, {t.line}); "
        f"{c_type} old, v = {t.argument(at + 1)}; memcpy(&old, (void *)a, sizeof old); v = {operations[operation]}; "
        f"if (memcmp(&old, &v, sizeof v)) changes++; memcpy((void *)a, &v, sizeof v); "
        f"synchronise(w, a, {acquire}, {release});"
    )
    return t.lanes(code + (t.store(t.operands[0], t.type, "old") if returns else ""))


def load_matrices(t: Operands) -> str:
    return _matrices(t, "load_matrices(w, v, {n}, a, {trans}, {line});", registers=0, address=1)


def store_matrices(t: Operands) -> str:
    return _matrices(t, "store_matrices(w, a, v, {n}, {trans}, {line});", registers=1, address=0)


def _matrices(t: Operands, call: str, registers: int, address: int) -> str:
    names = t.operands[registers]
    addresses = f"for (int l = 0; l < 32; l++) a[l] = {t.address(t.operands[address], True)};"
    call = call.format(n=len(t.vector(names)), trans=int("trans" in t.parts), line=t.line)
    return f"{{ uint32_t a[32], *v[] = {t.registers(names)}; {addresses} {call} }}"


def multiply(t: Operands) -> str | None:
    if t.instruction.guard or t.parts[1] != "sync" or t.type != "f32":
        return None
    shape, factor = t.parts[3], t.parts[-2]
    known = {("m16n8k16", "f16"): (16, "half_to_float"), ("m16n8k16", "bf16"): (16, "bfloat_to_float"),
             ("m16n8k8", "tf32"): (8, "NULL")}.get((shape, factor))  # fmt: skip
    if known is None:
        return None
    names = ", ".join(f"*{v}[] = {t.registers(o)}" for v, o in zip("dabc", t.operands, strict=True))
    # The tf32 form has two registers of b and four of a, as the 16-bit one of K = 16 has.
    return f"{{ uint32_t {names}; multiply(d, a, b, c, {known[0]}, {int(factor != 'tf32')}, {known[1]}); }}"


def shuffle(t: Operands) -> str:
    other = {"bfly": "l ^ by", "up": "l - by", "down": "l + by", "idx": "least | (by & ~segment & 31)"}[t.parts[2]]
    outside = "j < most" if t.parts[2] == "up" else "j > most"
    target, _, inside = t.operands[0].partition("|")
    found = t.store(inside, "pred", f"!({outside})") if inside else ""
    return (
        f"{{ uint32_t from[32]; L from[l] = {t.argument(1, 'u32')}; "
        + t.lanes(
            f"int by = {t.argument(2, 'u32')}, c = {t.argument(3, 'u32')}, segment = c >> 8 & 31, "
            f"most = (l & segment) | (c & ~segment & 31), least = l & segment, j = {other}; {found} "
            f"{t.store(target, 'u32', f'from[{outside} ? l : j]')}"
        )
        + " }"
    )


def copy_async(t: Operands) -> str | None:
    if t.instruction.opcode.startswith("cp.async.commit_group"):
        return "w->group++;"
    if t.instruction.opcode.startswith(("cp.async.wait_group", "cp.async.wait_all")):
        return f"wait_copies(w, {t.operands[0] if t.operands else 0});"
    if t.parts[1] != "async" or t.parts[2] not in ("ca", "cg"):
        return None
    to, source, size, *filled = t.operands
    places = f"{t.address(to, True)}, {t.address(source, False)}"
    return t.lanes(f"copy_later(w, l, {places}, {size}, {t.value(filled[0], 'u32') if filled else size}, {t.line});")


def prefetch(t: Operands) -> str | None:
    """Nothing, at an address that must exist: PTX does not say what another one does."""
    return t.lanes(f"range_of({t.address(t.operands[0], False)}, 1, {t.line});") if t.space == "global" else None


def map_shared(t: Operands) -> str:
    return t.result(f"({t.argument(2, 'u32')} + 1) << 24 | {t.argument(1, 'u32')}", "u32")


def fence(o: Operands) -> str | None:
    """Nothing of its own: the arrival that it stands before publishes (translate.py)."""
    return "" if o.instruction.opcode == FENCE else None


FAMILIES: dict[str, Callable[[Operands], str | None]] = {
    "mov": move, "cvta": move, "selp": select, "setp": compare, "cvt": convert, "bfe": extract_bits,
    "prmt": permute_bytes, "shl": shift, "shr": shift, "div": divide, "rem": divide, "not": unary,
    "ld": load, "st": store, "atom": atomic, "red": atomic, "cp": copy_async, "mapa": map_shared,
    "ldmatrix": load_matrices, "stmatrix": store_matrices, "mma": multiply, "shfl": shuffle, "fence": fence,
    "prefetch": prefetch,
}  # fmt: skip
FAMILIES |= dict.fromkeys(("add", "sub", "mul", "and", "or", "xor", "min", "max", "mad", "fma"), arithmetic)
FAMILIES |= dict.fromkeys(UNARY, unary)
