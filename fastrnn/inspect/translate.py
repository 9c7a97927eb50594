"""Translate the PTX of one kernel to C: each instruction a loop over the lanes of a warp, each basic block a function.

Registers are arrays [register][lane] of their width in a Warp (machine.h); floats are kept as their bits.
"""

from .instructions import instruction_in_c
from .operands import Operands
from .ptx import Instruction, Kernel, publishes

CHUNK = 150  # instructions in one C function: gcc's time grows faster than a function's length


def translate(kernel: Kernel) -> str:
    """Return the C source of `step`, which runs a warp for a number of blocks; machine.h goes before it."""
    functions, cases = [], []
    for number, block in enumerate(kernel.blocks):
        straight = [i for i in block if not _is_control(i)]
        calls = []
        for start in range(0, len(straight), CHUNK):
            name = f"block_{number}_{start // CHUNK}"
            lines = [f"  {instruction_in_c(kernel, i)}  // {i.line}" for i in straight[start : start + CHUNK]]
            functions.append(f"static void {name}(Warp *w, uint32_t m) {{\n" + "\n".join(lines) + "\n}")
            calls.append(f"{name}(w, m);")
        cases.append(f"  case {number}: {' '.join(calls)}\n{_control(kernel, number, block)}")
    return "\n".join(functions) + STEP.replace("CASES", "\n".join(cases))


STEP = """
static int step(Warp *w, int quantum) {
  for (; quantum > 0; quantum--) {
    if (!w->alive) return DONE;
    int b = 1 << 30;
    for (int l = 0; l < 32; l++) if ((w->alive >> l & 1) && w->block[l] < b) b = w->block[l];
    uint32_t m = 0;
    for (int l = 0; l < 32; l++) if ((w->alive >> l & 1) && w->block[l] == b) m |= 1u << l;
    M->executed[b]++;
    switch (b) {
CASES
    }
  }
  return RUNS;
}
"""


def _is_control(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("bra", "ret", "exit", "bar.", "barrier.cluster"))


def _control(kernel: Kernel, number: int, block: list[Instruction]) -> str:
    """What follows a block: the next one, a branch, a barrier or the end."""
    onward = f"L w->block[l] = {number + 1};"
    before = ""
    last = block[-1] if block and _is_control(block[-1]) else None
    if last is not None and last.opcode.startswith("barrier.cluster.arrive"):
        before = f"w->ordered = {int(publishes(block))}; "
    if last is None or last.opcode.startswith("barrier.cluster.arrive"):
        return f"    {before}{onward} break;"
    if last.opcode in ("ret", "exit"):
        if last.guard:
            raise NotImplementedError(f"PTX line {last.line}: {last.text}")
        return "    w->alive &= ~m; break;"
    if last.opcode.startswith("bra"):
        target = kernel.labels[last.operands[-1]]
        if last.guard is None:
            return f"    L w->block[l] = {target}; break;"
        taken = Operands(kernel, last).guard()
        return f"    L w->block[l] = {taken} ? {target} : {number + 1}; break;"
    if last.opcode.startswith("barrier.cluster.wait"):
        state = "AT_CLUSTER_BARRIER"
    elif last.opcode in ("bar.sync", "bar.sync.aligned") and last.operands == ("0",):
        state = "AT_BARRIER"
    else:
        raise NotImplementedError(f"PTX line {last.line}: {last.text}")
    whole = f'if (m != w->alive) fail({last.line}, "a barrier that not all lanes of a warp reach");'
    return f"    {before}{onward} {whole} return {state};"
