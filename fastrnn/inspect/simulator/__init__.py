"""The time of a step by simulation of one multiprocessor, from a kernel's machine code; nothing here is measured.

Two passes. The first (warps) runs the integer code of all warps from the kernel's entry, so that each access to memory
has its addresses: banks that are met twice, sectors, lines, whose shared memory in a cluster. The second
(multiprocessor) takes what the warps ran, cycle by cycle, through schedulers, pipes, scoreboards, the stages of an
access to memory, barriers and fences. What a figure is, and who published it, is one table (figures).

    decode          operands, results and pipe of an instruction; a cubin's parameters
    integers        what integer instructions compute
    registers       of all warps, read and written
    warps           the first pass
    accesses        what an access costs, from its addresses
    figures         cycles, bytes a cycle, and their sources, by architecture
    multiprocessor  the second pass: schedulers, pipes, scoreboards
    memory          queue, address stage, data stage, L1, L2, distributed shared memory
    barriers        the program's barrier, the cluster's, fences, the grid's counter
    events          a calendar, and resources that serve one thing at a time
    simulate        both passes, and what they say of a step
    what_if         a step with one resource free
    timeline        a step, warp by warp, as text and as a picture

Not modelled: misses of the instruction cache, banks of registers, address translation, other multiprocessors' traffic.
Beside two published times of another library's kernel a simulation of this kind, outside this repository, was 19 and 8%
too short (ERROR). docs/performance.md has what it is beside our own kernels' measured times: too short again.
"""

from .figures import BASE, borrowed, table

ERROR = (
    "simulated, not measured: a simulation of this kind gave two published times of FlashRNN's kernel 19 and 8% too "
    "short; beside our kernels on an H100: docs/performance.md"
)


def note(arch: str) -> str:
    """Return the caution that goes with every simulated time of an architecture."""
    others = len(borrowed(arch))
    return (
        ERROR
        if arch == BASE
        else f"{ERROR}; {others} of its {len({name for name, *_ in table()})} figures are {BASE}'s"
    )
