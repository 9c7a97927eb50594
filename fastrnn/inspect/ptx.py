"""Read the PTX of one kernel: parameters, registers, basic blocks of instructions.

Source: NVIDIA's PTX ISA 9.0; of it, what Triton 3.6 to 3.9 emits for fastrnn's kernels.
"""

import re
from dataclasses import dataclass, field

ENDS_BLOCK = ("bra", "ret", "exit", "bar", "barrier.cluster.wait")


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd3+8];` at a line of the PTX, from a place in the kernel's source."""

    opcode: str
    operands: tuple[str, ...]  # a vector is one operand: "{%r1, %r2}"
    guard: str | None  # the predicate register
    guard_negated: bool
    line: int
    source: str  # file:line, or ""
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    """One entry function."""

    name: str
    parameters: dict[str, tuple[int, str]] = field(default_factory=dict)  # name: (offset, type)
    parameter_bytes: int = 0
    registers: dict[str, int] = field(default_factory=dict)  # prefix ("rd"): how many
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)  # of a block's first instruction


def size_of(type_: str) -> int:
    """Return the bytes of a PTX type such as b32 or bf16x2."""
    bits = re.search(r"(\d+)(x2)?$", type_)
    assert bits is not None, type_
    return int(bits[1]) // 8 * (2 if bits[2] else 1)


FENCE = "fence.release.sync_restrict::shared::cta.cluster"  # of what this program wrote to its shared memory, alone
_WRITES_SHARED = re.compile(r"(st|atom|red)\b.*\.shared\b|stmatrix|(st|red)\.async|cp\.async")


def publishes(block: list[Instruction]) -> bool:
    """Whether an arrival at the cluster barrier, which ends a block, publishes what is in shared memory.

    A plain arrival is a release. A relaxed one orders nothing, unless a fence comes before it in the block, and no
    write to shared memory after the fence.
    """
    *before, arrival = block
    if "relaxed" not in arrival.parts:
        return True
    last = next((i for i in reversed(before) if i.opcode == FENCE or _WRITES_SHARED.match(i.opcode)), None)
    return last is not None and last.opcode == FENCE


def parse(ptx: str) -> Kernel:
    """The kernel of a PTX module with one entry."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx))
    header = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if header is None:
        raise ValueError("expected PTX with an .entry, got none")
    kernel = Kernel(header[1])
    for parameter in header[2].split(","):
        words = parameter.split()
        size = size_of(words[1])
        offset = -(-kernel.parameter_bytes // size) * size
        kernel.parameters[words[-1]] = (offset, words[1][1:])
        kernel.parameter_bytes = offset + size
    source = ""
    # Debugging information has labels of its own, which nothing jumps to: they begin no block.
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\$?\w+)", ptx))
    body_start = ptx.count("\n", 0, header.end()) + 1
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.split("//")[0].strip()
        if number <= body_start or text in ("", "{", "}"):
            continue
        if text.startswith(".section"):  # debugging information, to the end
            break
        if place := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            source = f"{files.get(place[1], '?').rsplit('/', 1)[-1]}:{place[2]}"
        elif registers := re.match(r"\.reg\s+\.\w+\s+%(\w+)<(\d+)>", text):
            kernel.registers[registers[1]] = int(registers[2])
        elif not text.startswith("."):
            if (label := re.match(r"(\$?\w+):\s*(.*)", text)) is not None:
                text = label[2]
                if label[1] in targets:
                    _begin_block(kernel, label[1])
            if text:
                _add(kernel, text.removesuffix(";"), number, source)
    return kernel


def _begin_block(kernel: Kernel, label: str) -> None:
    if kernel.blocks[-1]:
        kernel.blocks.append([])
    kernel.labels[label] = len(kernel.blocks) - 1


def _add(kernel: Kernel, text: str, line: int, source: str) -> None:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    if match is None:
        raise NotImplementedError(f"PTX line {line}: {text}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+(?:\|[^,\s]+)?", match[4])
    instruction = Instruction(match[3], tuple(operands), match[2], match[1] == "!", line, source, text)
    kernel.blocks[-1].append(instruction)
    if instruction.opcode.startswith(ENDS_BLOCK):
        kernel.blocks.append([])
