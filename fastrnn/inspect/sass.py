"""NVIDIA machine code: registers and stack of a cubin, its instructions with their control codes, and the step loop.

The upper word of each 16-byte instruction (compute capability 7 and up) holds, from bit 41 on, stall cycles in 4 bits,
a bit for yielding, in 3 bits each the scoreboard that its result and that its operands' reads release (7: none), and
six bits for the scoreboards that it waits on. Source: Jia et al. 2018 (arXiv:1804.06826), section 2.1.
"""

import functools
import re
import tempfile
from dataclasses import dataclass

from . import programs
from .flow import Statement, longest_loop

SCOREBOARDS = 6


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction."""

    text: str
    opcode: str  # with its modifiers, without its guard
    stall: int  # cycles before the warp's next instruction can issue
    awaits: tuple[int, ...]  # scoreboards: results of instructions of variable latency
    releases: int | None  # the scoreboard that its own result releases
    releases_read: int | None  # and that the reading of its operands does
    target: int | None  # the instruction that it may jump to, by its place in the code

    @property
    def waits(self) -> bool:
        return bool(self.awaits)


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in the order of the text, and which of them are the step loop: the longest."""

    instructions: list[Instruction]
    loop: list[int]


@functools.lru_cache(maxsize=16)
def tool(cubin: bytes, name: str, *flags: str) -> str:
    """Run one of the NVIDIA tools that come with Triton on a cubin, and return what it prints."""
    path = programs.nvidia_tool(name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return programs.run([path, *flags, file.name], "machine code")


def disassemble(cubin: bytes) -> str:
    """Return the cubin's SASS with control codes, as text."""
    return tool(cubin, "nvdisasm", "-c", "-hex")


def usage(cubin: bytes) -> dict[str, int]:
    """Return registers and stack bytes (spilled registers) of a thread, and bytes of static shared memory."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool(cubin, "cuobjdump", "-res-usage"))
    assert found is not None
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": int(found[3])}


def parse(sass: str) -> tuple[list[Instruction], list[Instruction]]:
    """Return all instructions, and those of the step loop, which is the longest loop."""
    code = read(sass)
    return code.instructions, [code.instructions[i] for i in code.loop]


def read(sass: str) -> Code:
    """The only kernel in a text of `disassemble`."""
    found: list[tuple[str, int]] = []  # text and control bits
    labels: dict[str, int] = {}
    text = ""
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif lower := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/", line):
            text = lower[1]
        elif text and (upper := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            found.append((text, int(upper[1], 16) >> 41))
            text = ""
    instructions: list[Instruction] = []
    statements: list[Statement] = []
    for text, control in found:
        guard, opcode = re.match(r"(@\S+\s+)?(\S+)", text).groups()  # type: ignore[union-attr]
        target = re.search(r"`\((\.L_x_\d+)\)", text) if opcode.startswith("BRA") else None
        instructions.append(
            Instruction(
                text,
                opcode,
                stall=control & 15,
                awaits=tuple(board for board in range(SCOREBOARDS) if control >> 11 + board & 1),
                releases=_scoreboard(control >> 5),
                releases_read=_scoreboard(control >> 8),
                target=labels[target[1]] if target else None,
            )
        )
        always = guard is None and (opcode in ("EXIT", "RET") or re.fullmatch(r"BRA\s+`\(.*\)", text) is not None)
        targets = (target[1],) if target else ()
        statements.append(Statement(opcode, text, targets=targets, falls_through=not always))
    return Code(instructions, longest_loop(statements, labels))


def _scoreboard(field: int) -> int | None:
    return field & 7 if field & 7 < SCOREBOARDS else None
