"""Control and data flow of compiled code, read from its text: the time loop, and which global loads read W_hh.

PTX and LLVM IR become the same list of Statements. A register derives from W_hh if any of its definitions does, from
the kernel's parameter through conversions, sums and choices, to a fixpoint; what a load brings is not an address any
more. Nothing depends on names: the parameter is found by its position among the launch's arguments.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import ptx


@dataclass(frozen=True)
class Statement:
    """One instruction."""

    opcode: str
    text: str
    defines: tuple[str, ...] = ()  # registers
    uses: tuple[str, ...] = ()  # registers, and the parameter that it reads
    is_global_load: bool = False
    targets: tuple[str, ...] = ()  # labels that it may jump to
    falls_through: bool = True


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in the order of the text, and where its labels stand among them."""

    statements: list[Statement]
    labels: dict[str, int]
    parameters: list[str]

    def step_loop(self) -> list[Statement]:
        """The instructions of the loop over time: the one with the most of them; [] where there is none."""
        return [self.statements[i] for i in longest_loop(self.statements, self.labels)]

    def global_loads(self, parameter: int, statements: Sequence[Statement]) -> list[Statement]:
        """Return the loads from global memory whose address derives from a parameter of the kernel."""
        derived = {self.parameters[parameter]}
        # A loaded value is no address: it ends the flow.
        moves = [s for s in self.statements if s.defines and not _is_memory(s)]
        size = 0
        while size != len(derived):
            size = len(derived)
            for move in moves:
                if not derived.isdisjoint(move.uses):
                    derived.update(move.defines)
        return [s for s in statements if s.is_global_load and not derived.isdisjoint(s.uses)]


def longest_loop(statements: Sequence[Statement], labels: dict[str, int]) -> list[int]:
    """Return the indices of the loop with the most statements, including loops inside it.

    Compilers place blocks freely, and enter loops in their middle: the order of the text says nothing.
    """
    after: list[set[int]] = [set() for _ in statements]
    before: list[set[int]] = [set() for _ in statements]
    for i, statement in enumerate(statements):
        following = [labels[target] for target in statement.targets if target in labels]
        for j in following + [i + 1] * statement.falls_through:
            if j < len(statements):
                after[i].add(j)
                before[j].add(i)

    def reached(start: int, steps: list[set[int]]) -> set[int]:
        found, todo = set(), list(steps[start])
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                todo.extend(steps[i])
        return found

    heads = {labels[target] for statement in statements for target in statement.targets if target in labels}
    heads -= {len(statements)}
    return sorted(max((reached(i, after) & reached(i, before) for i in heads), key=len, default=set()))


def _is_memory(statement: Statement) -> bool:
    return statement.is_global_load or statement.opcode.startswith(("atom", "ld.shared", "ld.local", "ldmatrix"))


_REGISTER = re.compile(r"%[\w.$-]+")
# PTX instructions without a result; the first operand of all others is one.
_WITHOUT_RESULT = ("st", "red", "bar", "bra", "ret", "exit", "trap", "cp", "membar", "fence", "prefetch", "nanosleep")


def parse_ptx(text: str) -> Code:
    """The only kernel in a PTX text."""
    kernel = ptx.parse(text)
    statements: list[Statement] = []
    starts = []  # of each block
    for block in kernel.blocks:
        starts.append(len(statements))
        statements.extend(_ptx_statement(instruction) for instruction in block)
    return Code(statements, {label: starts[n] for label, n in kernel.labels.items()}, list(kernel.parameters))


def _ptx_statement(instruction: ptx.Instruction) -> Statement:
    opcode, operands = instruction.opcode, instruction.operands
    first = 0 if instruction.parts[0] in _WITHOUT_RESULT else 1
    is_load = opcode.startswith(("ld.", "ldu.")) and not opcode.startswith(("ld.param", "ld.shared", "ld.local"))
    is_copy = opcode.startswith("cp.async") and any("[" in operand for operand in operands)
    is_jump = instruction.parts[0] == "bra"
    return Statement(
        opcode=opcode,
        text=instruction.text,
        defines=tuple(_REGISTER.findall(" ".join(operands[:first]))),
        uses=tuple(re.findall(r"%[\w.$-]+|\w+_param_\d+", " ".join(operands[first:]))),
        is_global_load=is_load or is_copy,
        targets=operands[-1:] if is_jump else (),
        falls_through=instruction.guard is not None or not (is_jump or instruction.parts[0] in ("ret", "exit", "trap")),
    )


def parse_llvm(llvm: str) -> Code:
    """The only kernel in an LLVM IR text for AMD."""
    head, body = re.findall(r"^define [^\n]*?amdgpu_kernel [^\n]*?\((.*)\)[^\n]*\{\n(.*?)^\}", llvm, re.M | re.S)[0]
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.split(" !dbg")[0].strip().rstrip(",")
        if label := re.match(r'"?([\w.$-]+)"?:(\s|$)', line):
            labels["%" + label[1]] = len(statements)
        elif line and not line.startswith(";"):
            result, separator, right = line.partition(" = ")
            if not separator:
                result, right = "", line
            words = right.split()
            called = re.search(r"@([\w.]+)\(", right)
            opcode = called[1] if called else words[0]
            targets = tuple(re.findall(r"label (%[\w.$-]+)", right))
            on_chip = "addrspace(3)" in right or "addrspace(5)" in right
            statements.append(
                Statement(
                    opcode=opcode,
                    text=line,
                    defines=tuple(_REGISTER.findall(result)),
                    uses=tuple(_REGISTER.findall(right)),
                    # Buffer and global loads straight into LDS name addrspace(3), too.
                    is_global_load=(opcode == "load" and not on_chip)
                    or bool(re.search(r"(buffer|global).*load", opcode)),
                    targets=targets,
                    falls_through=words[0] not in ("br", "ret", "switch", "unreachable"),
                )
            )
    return Code(statements, labels, re.findall(r"%[\w.]+(?=,|$)", head))


def parse_amdgcn(assembly: str) -> Code:
    """The only kernel in an AMD assembly text, without its data flow."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in assembly.split("s_code_end")[0].split(".section\t.rodata")[0].splitlines():
        text = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.LBB\d+_\d+):", text):
            labels[label[1]] = len(statements)
        elif found := re.match(r"([a-z]\w+)(?:\s|$)", text):
            targets = tuple(re.findall(r"\.LBB\d+_\d+", text))
            always = found[1] in ("s_branch", "s_endpgm")
            statements.append(Statement(found[1], text, targets=targets, falls_through=not always))
    return Code(statements, labels, [])
