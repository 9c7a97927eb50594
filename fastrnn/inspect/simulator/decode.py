"""Machine code as both passes read it: operands, what an instruction writes, which pipe takes it."""

import functools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import sass


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Pipes of a scheduler by the first part of an opcode, without the U of the uniform datapath.
INTEGER = _names(
    "IADD IADD3 LOP3 SHF SHL SHR PRMT ISETP SEL LEA VIADD VIMNMX VIMNMX3 VIADDMNMX IMNMX IABS SGXT BMSK MOV PLOP3 VOTE "
    "P2R R2P FLO BREV CS2R FSEL FSETP FMNMX FMNMX3 FCHK F2FP HSETP2 HMNMX2"
)
FLOAT = _names("FADD FMUL FFMA FHADD FHFMA")
FLOAT_ON_ONE_PIPE = _names("IMAD HFMA2 HADD2 HMUL2 IDP")
FLOAT_ON_BOTH_PIPES = _names("FADD2 FMUL2 FFMA2")  # two results a lane
SPECIAL = _names("MUFU F2F F2I I2F FRND POPC I2FP F2IP")
TENSOR = _names("HMMA")
UNIFORM = _names(
    "UIADD3 UIMAD ULOP3 USHF UMOV USEL UISETP ULEA ULDC LDCU UPRMT UPLOP3 USGXT UFLO UPOPC UBMSK UP2UR R2UR UVIADD "
    "UVIMNMX UIABS UIADD UCLEA VOTEU UF2FP UFSETP"
)
SHARED = _names("LDS STS LDSM STSM ATOMS")
GLOBAL = _names("LDG STG LD ST LDL STL RED REDG ATOM ATOMG LDGSTS")
OTHER_MEMORY = _names("SHFL REDUX MOVM LDC S2R S2UR SYNCS")
BARRIERS = _names("BAR MEMBAR FENCE UCGABAR_ARV UCGABAR_WAIT")
BRANCHES = _names("BRA EXIT RET BSSY BSYNC WARPSYNC CALL")
NO_PIPE = _names("NOP DEPBAR LDGDEPBAR CCTL ERRBAR CGAERRBAR NANOSLEEP YIELD ACQBULK PREEXIT ELECT ENDCOLLECTIVE")
STORES = _names("STS STSM STG ST STL RED REDG")
RETURNS_DATA = _names("ATOM ATOMG ATOMS")
# Beside a register, these write the predicates that follow it: carries.
CARRY = ("IADD3", "IMAD", "LEA")


@dataclass(frozen=True)
class Operand:
    """A register (R, UR), predicate (P, UP), number, place in the constant bank, or address in memory."""

    kind: str  # "R", "UR", "P", "UP", "number", "constant", "memory", "other"
    number: int = -1  # -1: RZ or PT
    negated: bool = False
    inverted: bool = False
    absolute: bool = False
    text: str = ""


@functools.lru_cache(maxsize=1 << 14)
def operand(text: str) -> Operand:
    """Decode one operand.

    >>> operand("-R12.reuse").number, operand("!UP3").inverted, operand("c[0x0][0x210]").number
    (12, True, 528)
    """
    bare = text.removeprefix("-") if not re.match(r"-(0x|\d|INF)", text) else text
    signs = {"negated": bare != text, "inverted": bare[:1] in "~!" and bare != "", "absolute": "|" in bare}
    bare = bare.lstrip("~!").strip("|")
    if found := re.match(r"(U?[RP])([ZT]|\d+)\b", bare):
        return Operand(found[1], -1 if found[2] in "ZT" else int(found[2]), **signs, text=text)
    if found := re.match(r"c\[0x0\]\[(0x[0-9a-f]+)\]$", bare):
        return Operand("constant", int(found[1], 16), **signs, text=text)
    if re.match(r"-?(0x[0-9a-f]+|\d+)$", bare):
        return Operand("number", int(bare, 0) & 0xFFFFFFFF, text=text)
    return Operand("memory" if "[" in bare else "other", **signs, text=text)


def split(text: str) -> list[str]:
    """Split the operands at the commas outside brackets."""
    return [part.strip() for part in re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|[^,\[(])+", text) if part.strip()]


@dataclass(frozen=True)
class Op:
    """One instruction, decoded."""

    index: int
    code: sass.Instruction
    name: str  # the opcode's first part
    base: str  # without the U of the uniform datapath
    parts: tuple[str, ...]
    guard: Operand | None
    results: tuple[Operand, ...]
    sources: tuple[Operand, ...]
    pipe: str
    width: int  # bytes a lane that it moves
    registers: int  # that its result takes
    address: tuple[tuple[str, int, bool, int], ...] | None = field(default=None)  # (kind, number, 64 bits, factor)

    @property
    def text(self) -> str:
        return self.code.text

    @property
    def is_far_fence(self) -> bool:
        return self.name == "MEMBAR" and ("GPU" in self.parts or "SYS" in self.parts)

    @property
    def is_prefetch(self) -> bool:
        return _is_prefetch(self.parts)

    @property
    def is_strong(self) -> bool:
        return "STRONG" in self.parts


def decode(index: int, code: sass.Instruction) -> Op:
    """An instruction; NotImplementedError for one whose pipe is not known."""
    guard, _, rest = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", code.text).groups()  # type: ignore[union-attr]
    parts = tuple(code.opcode.split("."))
    name = parts[0]
    base = name[1:] if name in UNIFORM and name.startswith("U") else name
    operands = [operand(text) for text in split(rest)]
    prefetches = _is_prefetch(parts)
    count = 0 if prefetches else _results(base, operands)
    place = next((one for one in operands if one.kind == "memory" and not one.text.startswith("c[")), None)
    registers = _registers(base, parts)
    return Op(
        index, code, name, base, parts, operand(guard) if guard else None, tuple(operands[:count]),
        tuple(operands[count:]), "memory" if prefetches else _pipe(name, code), _width(name, code.opcode), registers,
        _address(place.text, name) if place and (name in SHARED | GLOBAL or prefetches) else None,
    )  # fmt: skip


def _is_prefetch(parts: tuple[str, ...]) -> bool:
    """Into L2; CCTL does other things to caches as well."""
    return parts[0] == "CCTL" and "PF2" in parts


def decoded(code: sass.Code) -> list[Op]:
    """Decode all instructions of a kernel."""
    return [decode(index, instruction) for index, instruction in enumerate(code.instructions)]


def step_loop(code: sass.Code) -> tuple[int, int]:
    """Return first and last instruction of the step loop, which has the widest jump back; ValueError without one."""
    jumps = [(i, code.instructions[i].target) for i in code.loop]
    spans = [(i - to, to, i) for i, to in jumps if to is not None and to < i]
    if not spans:
        raise ValueError("expected a loop over time in the machine code, found none")
    _, first, last = max(spans)
    return first, last


def _results(base: str, operands: Sequence[Operand]) -> int:
    """How many operands are written: they come first."""
    if base in STORES | BRANCHES | BARRIERS or not operands:
        return 0
    leading = 0
    while leading < len(operands) and operands[leading].kind in ("P", "UP"):
        leading += 1
    if "SETP" in base or base == "PLOP3":
        return 2
    count = leading + 1
    while base in CARRY and count < len(operands) and operands[count].kind in ("P", "UP"):
        count += 1
    return count


def _pipe(name: str, code: sass.Instruction) -> str:
    kinds = (
        ("uniform", UNIFORM), ("integer", INTEGER), ("fp32", FLOAT), ("one fp32", FLOAT_ON_ONE_PIPE),
        ("both fp32", FLOAT_ON_BOTH_PIPES), ("special", SPECIAL), ("tensor", TENSOR),
        ("memory", SHARED | GLOBAL | OTHER_MEMORY), ("barrier", BARRIERS), ("branch", BRANCHES), ("none", NO_PIPE),
    )  # fmt: skip
    for pipe, names in kinds:
        if name in names:
            return pipe
    raise NotImplementedError(f"simulation of {code.opcode} is missing: the simulator does not know its pipe")


def _width(name: str, opcode: str) -> int:
    if name in ("LDSM", "STSM"):  # 8x8 matrices of 16-bit numbers, 4 bytes a lane each
        matrices = re.search(r"\.M\w*88\.([24])", opcode)
        return 4 * int(matrices[1]) if matrices else 4
    found = re.search(r"\.(128|64|U8|S8|U16|S16)\b", opcode)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


def _registers(base: str, parts: tuple[str, ...]) -> int:
    if base in TENSOR:
        return 4
    if base in FLOAT_ON_BOTH_PIPES or "WIDE" in parts or (base == "CS2R" and "32" not in parts):
        return 2
    return max(1, _width(base, ".".join(parts)) // 4)


def _address(text: str, name: str) -> tuple[tuple[str, int, bool, int], ...]:
    """Terms of `desc[UR8][R200.64+0x40]`: its last brackets. A kind "number" is a constant offset."""
    inner = re.findall(r"\[([^\[\]]*)\]", text)[-1]
    uniform_base = name in GLOBAL and re.match(r"R(Z|\d+)\.U32\b|UR", inner)  # 64 bits, the register beside it 32
    terms = []
    for term in inner.replace("+-", "+ -").split("+"):
        if found := re.match(r"\s*(U?R)(Z|\d+)((?:\.\w+)*)\s*$", term):
            flags = found[3].split(".")
            if uniform_base:
                wide = found[1] == "UR"
            else:
                wide = "64" in flags or (name in ("LD", "ST", "CCTL") and found[1] == "R")
            factor = next((int(flag[1:]) for flag in flags if re.fullmatch(r"X\d+", flag)), 1)
            terms.append((found[1], -1 if found[2] == "Z" else int(found[2]), bool(wide), factor))
        else:
            terms.append(("number", int(term.replace(" ", ""), 0), False, 1))
    return tuple(terms)


def parameters(cubin: bytes) -> list[tuple[int, int]]:
    """Return (offset in the constant bank, bytes) of each of the kernel's parameters, in order.

    Read from the section .nv.info.KERNEL: attribute 0x17 is a parameter's record, 0x0a where they begin in the bank.
    """
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, headers + size * k) for k in range(count)]
    found, base = [], 0
    for name, _, _, _, at, length, *_ in sections:
        start = sections[names][4] + name
        if not cubin[start : cubin.index(b"\0", start)].startswith(b".nv.info."):
            continue
        end = at + length
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4 and attribute == 0x17:
                _, ordinal, offset, packed = struct.unpack_from("<IHHI", cubin, at)
                found.append((ordinal, offset, packed >> 18))
            if form == 4 and attribute == 0x0A:
                _, base, _ = struct.unpack_from("<IHH", cubin, at)
            at += value if form == 4 else 0
    return [(base + offset, length) for _, offset, length in sorted(found)]
