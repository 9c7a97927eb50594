"""The rule of clusters: two accesses to the same shared memory, one of them from another thread block of the cluster,
one of them a write and one a read, have a cluster barrier between them; so has an access and its target's exit.

All thread blocks of a cluster run the same code from one cluster barrier to the next. So the rule holds if, from no
barrier, two such accesses are reached without passing the next one. What a block does between arriving at a barrier and
its wait belongs to both sides. A relaxed arrival orders nothing without a fence (ptx.publishes), and `bar.sync` only
the warps of one block.

Addresses are compared by range (addresses.py). Where a buffer is chosen by a loop counter, the code is followed with
the counter's low bits known: the states of the search are (basic block, what such registers hold).

Not seen: mbarriers, bulk copies and products that read shared memory themselves; `cp.async` counts where it is issued;
two writes at once, since blocks may each write a slice of another's tile.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import addresses, ptx
from .addresses import ANY, SPECIAL, WORD, Value
from .ptx import Instruction

STATES_A_BLOCK = 32  # more, and the loop's counter is unknown
SHARED = re.compile(r"(ld|st|atom|red)\b.*\.shared\b|ldmatrix|stmatrix|(st|red)\.async|cp\.async\.c[ag]\.shared")
READS, WRITES = ("ld", "ldmatrix", "atom", "red"), ("st", "stmatrix", "atom", "red", "cp")


@dataclass(frozen=True)
class Access:
    """An instruction's bytes [start, end) of its own block's shared memory, or of another's."""

    instruction: Instruction
    remote: bool
    reads: bool
    writes: bool
    start: int
    end: int

    def conflicts(self, other: "Access") -> bool:
        """Whether one writes what the other reads."""
        one_writes = (self.reads and other.writes) or (self.writes and other.reads)
        return self is not other and one_writes and self.start < other.end and other.start < self.end


@dataclass
class _State:
    accesses: list[Access] = field(default_factory=list)
    barrier: str = ""  # that it ends in: "arrive", "wait" or none
    following: list[tuple] = field(default_factory=list)


def unguarded(text: str) -> list[tuple[Instruction, Instruction]]:
    """Return pairs of a PTX kernel's instructions that break the rule: a remote access, and one it is not ordered with.

    >>> ptx = ".visible .entry k() { st.shared.b32 [global_smem], %r1; ret; }"
    >>> unguarded(ptx)
    []
    """
    if "shared::cluster" not in text:
        return []
    kernel = ptx.parse(text)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", text)
    graph, entry = _Addresses(kernel, int(threads[1]) if threads else 1024).graph()
    starts = [(entry, "inside")]
    starts += [(after, "arrived") for s in graph.values() if s.barrier == "arrive" for after in s.following]
    found = {}
    for start in starts:
        epoch = list(_epoch(graph, start))
        for remote in epoch:
            for other in epoch if remote.remote else ():
                if remote.conflicts(other):
                    pair = remote.instruction, other.instruction
                    found[pair[0].line, pair[1].line] = pair
    return [found[lines] for lines in sorted(found)]


def _epoch(graph: dict[tuple, _State], start: tuple[tuple, str]) -> Iterator[Access]:
    """Accesses from a block's arrival at a cluster barrier, or its entry, to its wait at the next."""
    seen, todo = {start}, [start]
    while todo:
        at, phase = todo.pop()
        state = graph[at]
        yield from state.accesses
        if state.barrier == "arrive" and phase == "inside":
            phase = "arrived at the next"
        elif state.barrier == "wait" and phase == "arrived":
            phase = "inside"
        elif state.barrier == "wait" and phase != "inside":
            continue
        for node in ((after, phase) for after in state.following):
            if node not in seen:
                seen.add(node)
                todo.append(node)


class _Addresses:
    """Values of the registers that shared addresses derive from, and the kernel's states under them."""

    def __init__(self, kernel: ptx.Kernel, threads: int) -> None:
        self.kernel = kernel
        self.special = SPECIAL | {"%tid.x": Value(0, (1 << (threads - 1).bit_length()) - 1)}
        definitions: dict[str, list[Instruction]] = {}
        instructions = [i for block in kernel.blocks for i in block]
        for i in instructions:
            for register in _results(i):
                definitions.setdefault(register, []).append(i)
        needed: set[str] = set()
        todo = [r for i in instructions if SHARED.match(i.opcode) for r in re.findall(r"%\w+", _place(i))]
        while todo:
            register = todo.pop()
            if register not in needed:
                needed.add(register)
                todo += [r for i in definitions.get(register, ()) for r in _sources(i)]
        # Registers that hold one value, whatever the step, and the others.
        self.stable: dict[str, Value] = {}
        size = -1
        while size != len(self.stable):
            size = len(self.stable)
            for register in needed - self.stable.keys():
                first, *others = definitions.get(register, [None])
                if first and not others and not first.guard and all(r in self.stable for r in _sources(first)):
                    self.stable[register] = self._result(first, {})
        # Of these, whether one has several definitions, as a loop's counter has.
        self.changing = {r: len(definitions[r]) > 1 for r in needed - self.stable.keys() if r in definitions}

    def graph(self) -> tuple[dict[tuple, _State], tuple]:
        """States by (block, values of changing registers), and the first; as exact as keeps them few."""
        masks = [0]
        for block in self.kernel.blocks:
            for i in block:
                if i.parts[0] == "and" and i.operands[0] in self.changing:
                    masks += [c.base for c in map(addresses.constant, i.operands) if c]
        entry = (0, frozenset())
        for low in (WORD, (1 << max(masks).bit_length()) - 1, 0):
            graph: dict[tuple, _State] = {}
            todo = [entry]
            while todo and (not low or len(graph) <= STATES_A_BLOCK * len(self.kernel.blocks)):
                at = todo.pop()
                if at not in graph:
                    graph[at] = self._state(*at, low)
                    todo += graph[at].following
            if not todo:
                break
        return graph, entry

    def _state(self, number: int, known: frozenset, low: int) -> _State:
        block, values, state = self.kernel.blocks[number], dict(known), _State()
        for i in block:
            if i.parts[0] in ("ret", "exit"):  # takes the memory away
                state.accesses.append(Access(i, False, True, True, 0, WORD + 1))
            elif SHARED.match(i.opcode):
                state.accesses.append(self._access(i, values))
            for register in _results(i):
                if register in self.changing:
                    value = self._result(i, values)
                    if i.guard:
                        value = addresses.hull(value, values.get(register, ANY))
                    values[register] = addresses.truncated(value, low) if self.changing[register] else value
        last = block[-1] if block else None
        name = last.opcode if last else ""
        if name.startswith("barrier.cluster.wait"):
            state.barrier = "wait"
        elif name.startswith("barrier.cluster.arrive") and ptx.publishes(block):
            state.barrier = "arrive"
        after = [number + 1] if last is None or last.guard or last.parts[0] not in ("bra", "ret", "exit") else []
        if last and last.parts[0] == "bra":
            after.append(self.kernel.labels[last.operands[-1]])
        state.following = [(n, frozenset(values.items())) for n in after if n < len(self.kernel.blocks)]
        return state

    def _access(self, i: Instruction, values: dict[str, Value]) -> Access:
        register, _, offset = _place(i).strip("[] ").replace(" ", "").partition("+")
        place = addresses.binary("add", self._value(register, values), addresses.constant(offset or "0") or ANY)
        name = i.parts[0]
        size = 16  # a row of a matrix, and the most that a copy moves
        if name in ("ld", "st", "atom", "red"):
            width = next((int(part[1:]) for part in i.parts if re.fullmatch(r"v\d", part)), 1)
            size = width * ptx.size_of(i.parts[-1])
        remote = "shared::cluster" in i.opcode
        return Access(i, remote, name in READS, name in WRITES, *addresses.extent(place, size))

    def _result(self, i: Instruction, values: dict[str, Value]) -> Value:
        if i.operands[0].startswith("{") or i.parts[0].startswith(("ld", "atom", "shfl")):
            return ANY
        return addresses.result(i, [self._value(operand, values) for operand in i.operands[1:]])

    def _value(self, operand: str, values: dict[str, Value]) -> Value:
        known = self.special.get(operand) or values.get(operand) or self.stable.get(operand)
        return known or addresses.constant(operand) or ANY


def _place(i: Instruction) -> str:
    """The operand that is an address in shared memory: of a copy, that it goes to."""
    return next(operand for operand in i.operands if operand.startswith("["))


def _results(i: Instruction) -> list[str]:
    """Registers that an instruction writes: its first operand, if that is not an address."""
    return re.findall(r"%\w+", i.operands[0]) if i.operands and not i.operands[0].startswith("[") else []


def _sources(i: Instruction) -> list[str]:
    """Registers that an address may come from: not through memory."""
    if i.parts[0].startswith(("ld", "atom", "shfl")):
        return []
    return [
        r for r in re.findall(r"%[\w.]+", " ".join(i.operands[1:])) if r not in SPECIAL and not r.startswith("%tid")
    ]
