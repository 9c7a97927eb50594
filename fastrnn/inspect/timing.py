"""A quick look at the time of a step: six bounds, from the machine code of its loop (NVIDIA). Nothing is measured.

A step takes at least the longest of

    chain           one warp's stall cycles + 14 for each wait on a scoreboard
    issue           instructions * warps / 4 schedulers
    special         exponentials, reciprocals, tanh.approx: results / 16 a cycle
    tensor cores    multiply-adds of all warps / what the multiprocessor's tensor cores do a cycle
    shared memory   bytes / 128 a cycle
    L2              bytes of global loads and stores / 64 a cycle

and, in the cooperative tier, a grid barrier comes on top, kept apart: its figure is the least certain of all. Kernels
that poll the state meet there once in a round of steps, and have a share of it. But their code of that meeting counts
as if each step ran it: their chain is too long by it, up to three times. The simulator runs what a step runs.

The 14 fits two published times of another library's LSTM forward (FlashRNN's Triton kernel, H100, B=16, bf16): its
step loops have 1289 stalls and 126 waits at H=64, 3151 and 216 at H=128, and take 1.94 and 3.15 us: 16.8 and 11.0
cycles a wait at 1.755 GHz. A wait counts the same whatever it waits for; the model is off by 10% and 12% on those two.

Other sources: special functions a cycle from the table of instruction throughputs in NVIDIA's CUDA C++ Programming
Guide (16 from compute capability 8.0 on); four schedulers, 128 bytes of shared memory a cycle and multiply-adds a cycle
from NVIDIA's architecture whitepapers (A100, GA102, Ada, H100, Blackwell); 64 bytes of L2 a cycle and multiprocessor
from Jia et al. 2018 (arXiv:1804.06826) and later microbenchmarks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import sass
from .compile import Launch
from .sass import Instruction

CYCLES_A_WAIT = 14
SCHEDULERS = 4
SPECIAL_A_CYCLE = 16
SHARED_BYTES_A_CYCLE = 128
L2_BYTES_A_CYCLE = 64


@dataclass(frozen=True)
class Rates:
    """Figures of one architecture that only the model needs, for the board that device.py names."""

    ghz: float
    multiply_adds: int  # 16-bit with fp32 sums, a cycle and multiprocessor
    grid_barrier_us: float


# Boost clocks from the product pages (H100: that of the published times above). Multiply-adds: dense 16-bit peak with
# fp32 sums / boost clock / multiprocessors / 2, from the whitepapers; mma.sync reaches less on sm_90 and sm_100.
# Grid barrier: public notes and microbenchmarks, 0.5 to 2 us on A100, about 1 us on H100, 0.8 to 1.2 us on B300 (taken
# for sm_100); none was found for the others, which get the H100's.
RATES = {
    "sm_80": Rates(1.410, 1024, 1.25),
    "sm_86": Rates(1.695, 256, 1.0),
    "sm_89": Rates(2.520, 256, 1.0),
    "sm_90": Rates(1.755, 2048, 1.0),
    "sm_100": Rates(1.965, 4096, 1.0),
    "sm_120": Rates(2.407, 256, 1.0),
}


@dataclass(frozen=True)
class Modelled:
    """A step's modelled cost in cycles; the barrier, in cycles at the clock, is not among the bounds."""

    stalls: int
    waits: int
    bounds: dict[str, int]
    barrier: int
    clock_ghz: float

    @property
    def cycles(self) -> int:
        return max(self.bounds.values())

    @property
    def limit(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def us(self) -> float:
        return (self.cycles + self.barrier) / self.clock_ghz / 1000


def modelled(launch: Launch) -> Modelled | None:
    """The model for a compiled launch; None on AMD, for which there is none."""
    if launch.spec.is_amd:
        return None
    _, loop = sass.parse(sass.disassemble(launch.asm["cubin"]))
    rates = RATES[launch.spec.arch]
    stalls, waits = sum(i.stall for i in loop), sum(i.waits for i in loop)
    meets = "exchange.counters" in launch.arguments  # a grid barrier needs a counter
    steps = (launch.constants["FORM"].ROUND or 1) if meets else 1  # from one to the next
    return Modelled(
        stalls=stalls,
        waits=waits,
        bounds=bounds(loop, launch.warps, rates.multiply_adds),
        barrier=round(rates.grid_barrier_us * rates.ghz * 1000 / steps) if meets else 0,
        clock_ghz=rates.ghz,
    )


def chain(stalls: int, waits: int) -> int:
    """Cycles of one warp: what it waits for the next instruction, and for results of variable latency.

    >>> chain(1289, 126)
    3053
    """
    return stalls + CYCLES_A_WAIT * waits


def bounds(loop: Sequence[Instruction], warps: int, multiply_adds: int) -> dict[str, int]:
    """Cycles that each resource needs for a step of a program that is alone on its multiprocessor."""
    lanes = 32 * warps
    return {
        "chain": chain(sum(i.stall for i in loop), sum(i.waits for i in loop)),
        "issue": round(len(loop) * warps / SCHEDULERS),
        "special": round(sum(i.opcode.startswith("MUFU") for i in loop) * lanes / SPECIAL_A_CYCLE),
        "tensor cores": round(sum(multiply_adds_of(i.opcode) for i in loop) * warps / multiply_adds),
        "shared memory": round(sum(_bytes(i.opcode, _SHARED) for i in loop) * lanes / SHARED_BYTES_A_CYCLE),
        "L2": round(sum(_bytes(i.opcode, _GLOBAL) for i in loop) * lanes / L2_BYTES_A_CYCLE),
    }


_SHARED, _GLOBAL = re.compile(r"(LDS|STS|LDSM|STSM)\b"), re.compile(r"(LDG|STG|LDGSTS)\b")


def _bytes(opcode: str, memory: re.Pattern[str]) -> int:
    """Bytes that one lane moves; those that are masked off count, lanes that share a word count apart."""
    name = memory.match(opcode)
    if name is None:
        return 0
    if name[1] in ("LDSM", "STSM"):  # 8x8 matrices of 16-bit numbers: 4 bytes a lane each
        matrices = re.search(r"\.M\w*88\.([24])", opcode)
        return 4 * int(matrices[1]) if matrices else 4
    width = re.search(r"\.(128|64|U8|S8|U16|S16)\b", opcode)
    if width is None:
        return 4
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
    # Shared memory has banks of 4 bytes: narrower accesses take as long.
    return int(width[1]) // 8 if width[1].isdigit() else narrow[width[1]] if memory is _GLOBAL else 4


def multiply_adds_of(opcode: str) -> int:
    """Multiply-adds of a warp's tensor-core instruction, in 16-bit ones: tf32 runs at half their rate.

    >>> multiply_adds_of("HMMA.16816.F32.BF16"), multiply_adds_of("HMMA.1688.F32.TF32")
    (2048, 2048)
    """
    shape = re.match(r"HMMA\.(16)(8)(16|8|4)\b|HGMMA\.(\d+)x(\d+)x(\d+)", opcode)
    if shape is None:
        return 0
    m, n, k = (int(size) for size in shape.groups() if size)
    four_warps = opcode.startswith("HGMMA")
    return m * n * k * (2 if "TF32" in opcode else 1) // (4 if four_warps else 1)
