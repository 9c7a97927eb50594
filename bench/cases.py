"""The table of what is timed: the tests' cases, sweeps over H, B and T, what the kernels add, and published cases."""

from collections.abc import Iterator

from tests.support.cases import CASES, CELLS, Case

from .published import PUBLISHED
from .workload import Workload

NETWORKS = ("lstm", "gru", "rnn_tanh")
# Each sweep in fp32 over few steps, of which a CPU runs the small ones, and in bf16 over many.
SIZES = (("float32", 64), ("bfloat16", 1024))
# Floating-point operations of a forward pass that a CPU is given: a tenth of a second of it, or a few.
MOST_FLOPS_ON_CPU = 2.5e9


def _table() -> Iterator[Workload]:
    for cell in CELLS:
        for case in CASES:
            yield Workload("tests", cell, case)
    for dtype, T in SIZES:
        for cell in ("lstm", "gru"):
            for B in (16, 64):
                yield Workload("ragged", cell, Case(T, B, 128, 1), dtype, kind="ragged")
                yield Workload("ragged", cell, Case(T, B, 128, 2), dtype, kind="ragged")
                yield Workload("reset", cell, Case(T, B, 128, 1), dtype, kind="reset")
    for dtype, T in SIZES:
        for cell in NETWORKS:
            for H in (32, 64, 128, 256, 512, 768, 1024, 2048):
                yield Workload("over H", cell, Case(T, 16, H, 1), dtype)
        for cell in NETWORKS:
            for B in (1, 4, 16, 64, 256):
                yield Workload("over B", cell, Case(T, B, 128, 1), dtype)
    for dtype, lengths in (("float32", (16, 64, 256, 1024)), ("bfloat16", (256, 1024, 4096, 16384))):
        for T in lengths:
            yield Workload("over T", "lstm", Case(T, 16, 128, 1), dtype)
    for dtype, T in SIZES:
        for cell in NETWORKS:
            yield Workload("stacked", cell, Case(T, 16, 128, 1), dtype, layers=4)
            yield Workload("bidirectional", cell, Case(T, 16, 128, 2), dtype)
    for cell in ("lstm", "slstm"):
        yield Workload("heads", cell, Case(SIZES[0][1], 16, 32, 1), SIZES[0][0], heads=4)
    for H in (64, 128, 256, 768):  # the LSTM of these sizes is among the published cases
        yield Workload("heads", "slstm", Case(1024, 16, H, 1), "bfloat16", heads=768 // H)
    yield from PUBLISHED


TABLE = tuple(_table())


def runs_on_cpu(workload: Workload) -> bool:
    """Whether a row is in the part of the table that a CPU is given."""
    return workload.dtype == "float32" and workload.flops <= MOST_FLOPS_ON_CPU


def table(device: str) -> tuple[Workload, ...]:
    """The rows for a device: all on a GPU."""
    return tuple(w for w in TABLE if device != "cpu" or runs_on_cpu(w))
