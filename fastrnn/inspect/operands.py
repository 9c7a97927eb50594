"""Operands of PTX instructions as C: registers, constants, addresses and guards of one lane `l` of a Warp `w`."""

import re
from typing import NoReturn

from .ptx import Instruction, Kernel, size_of

C_TYPES = {
    f"{kind}{bits}": f"{name}{bits}_t"
    for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
    for bits in (8, 16, 32, 64)
}
C_TYPES |= {"f32": "float", "f64": "double", "pred": "uint8_t"}
FILES = {
    "rd": "r64",
    "r": "r32",
    "rs": "r16",
    "p": "p",
    "f": "r32",
    "fd": "r64",
    "q": "p",
}  # PTX register prefix: array of Warp
TO_FLOAT = {"f16": "half_to_float", "bf16": "bfloat_to_float"}
FROM_FLOAT = {"f16": "float_to_half", "bf16": "float_to_bfloat"}
SPECIAL = {"%laneid": "l", "%warpid": "w->index", "%cluster_ctarank": "w->program->rank",
           "%tid.x": "(w->index * 32 + l)", "%ntid.x": "M->threads"}  # fmt: skip


def unsigned(type_: str) -> str:
    """The type of the same width without a sign; floats and predicates as they are."""
    return type_ if type_ in ("f32", "f64", "pred") else f"u{size_of(type_) * 8}"


class Operands:
    """One instruction, and how its operands are read and written in C."""

    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self.kernel, self.instruction = kernel, instruction
        self.parts, self.operands = instruction.parts, instruction.operands
        self.type = self.parts[-1]
        self.line = instruction.line

    def missing(self) -> NoReturn:
        raise NotImplementedError(f"PTX line {self.line} ({self.instruction.source}): {self.instruction.text}")

    # ---- operands ----
    def guard(self) -> str:
        """Whether this lane takes part."""
        if self.instruction.guard is None:
            return "1"
        return f"({'!' * self.instruction.guard_negated}({self.cell(self.instruction.guard)} & 1))"

    def cell(self, operand: str) -> str | None:
        """The C lvalue of a register or special value; None for a constant."""
        if operand in SPECIAL:
            return SPECIAL[operand]
        if special := re.fullmatch(r"%(ctaid|nctaid|clusterid|tid|ntid)\.([xyz])", operand):
            axis = "xyz".index(special[2])
            if special[1] == "ctaid":
                return f"w->program->id[{axis}]"
            if special[1] == "nctaid":
                return f"M->grid[{axis}]"
            if special[1] == "clusterid":
                return f"(w->program->id[{axis}]{' / M->cluster' if axis == 0 else ''})"
            return "0" if special[1] == "tid" else "1"
        if local := re.fullmatch(r"%q(\d+)", operand):  # predicates of inline PTX, behind the compiler's
            return f"w->p[{self.kernel.registers['p'] + int(local[1])} * 32 + l]"
        if register := re.fullmatch(r"%(rd|rs|r|p|fd|f)(\d+)", operand):
            return f"w->{FILES[register[1]]}[{register[2]} * 32 + l]"
        if operand.startswith("%"):
            self.missing()
        return None

    def value(self, operand: str, type_: str) -> str:
        """An operand as a C expression of a PTX type; 16-bit floats as float."""
        cell = self.cell(operand)
        if cell is None:
            if bits := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
                return f"FLOAT(0x{bits[1]}u)" if type_ == "f32" else f"0x{bits[1]}u"
            if operand == "global_smem":
                return "0u"
            if type_ == "pred":
                return str(int(operand not in ("0", "false")))
            if type_ in TO_FLOAT:
                return f"{TO_FLOAT[type_]}({operand})"
            return f"FLOAT({operand})" if type_ == "f32" else f"(({C_TYPES[type_]}){operand})"
        if type_ in TO_FLOAT:
            return f"{TO_FLOAT[type_]}({cell})"
        if type_ == "f32":
            return f"FLOAT({cell})"
        if type_ == "f64":
            return f"AS(double, uint64_t, {cell})"
        return f"({cell} & 1)" if type_ == "pred" else f"(({C_TYPES[type_]}){cell})"

    def store(self, operand: str, type_: str, expression: str) -> str:
        """Assignment of an expression of a PTX type to a register."""
        if operand == "_":
            return f"(void)({expression});"
        wrapped = {
            "f32": f"BITS({expression})",
            "f64": f"AS(uint64_t, double, {expression})",
            "f16": f"float_to_half({expression})",
            "bf16": f"float_to_bfloat({expression})",
        }.get(type_, expression)
        return f"{self.cell(operand)} = {wrapped};"

    def lanes(self, code: str) -> str:
        guard = self.guard()
        return f"L {{ {code} }}" if guard == "1" else f"L if ({guard}) {{ {code} }}"

    def result(self, expression: str, type_: str | None = None) -> str:
        return self.lanes(self.store(self.operands[0], type_ or self.type, expression))

    def argument(self, index: int, type_: str | None = None) -> str:
        return self.value(self.operands[index], type_ or self.type)

    def vector(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{}").split(",")]

    def registers(self, operand: str) -> str:
        """C array of the addresses of a vector's registers, all lanes of each."""
        cells = ", ".join(f"&{self.cell(o)}".replace("* 32 + l]", "* 32]") for o in self.vector(operand))
        return f"{{{cells}}}"

    def address(self, operand: str, shared: bool) -> str:
        """The integer address of "[%rd1+8]"."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        type_ = "u32" if shared else "u64"
        return f"({self.value(base, type_)} + ({offset or 0}))"

    @property
    def space(self) -> str:
        named = (part.split("::")[0] for part in self.parts)
        return next((name for name in named if name in ("param", "shared", "global")), "generic")
