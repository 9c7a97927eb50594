"""The price of a plan, in microseconds, and of torch's kernel beside it: what "auto" chooses by.

    price = launches + T x max(waves x step, bytes / bandwidth), of forward and, in training, backward

A wave is as many programs, or clusters of them, as the device holds at once; of a cooperative grid, a launch of a part
of the batch. What all candidates do alike, before and after the loop (x_gates, dW_hh), is in none. Where a step's time
comes from is said of each price:

    measured     on that architecture (fastrnn/tuned/<arch>.json), for a full tile of 16 bits or of the same dtype
    simulated    cycles of prices.json, between whose sizes is a line, over the clock and what the simulator is too
                 short by on an H100; sm_90's where an architecture has none. `python -m bench.prices --simulate`
    reckoned     torch's: what it was measured to take at B = 16 on an H100, or its products at the device's rate

Plain tables read on import, and arithmetic: torch.compile traces what plans. No figure is of AMD's, nor of the
interpreter: there is no price there, and "auto" takes the first tier that fits.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..device import DeviceSpec
from . import tuning
from .kernel_plan import KernelPlan, Request, saved_bytes

LAUNCH_US = 5.0  # assumed: from a launch to its first step, W_hh read


class Board(NamedTuple):
    """The figures of a board that a price needs. device.py names the board."""

    ghz: float
    tflops: float  # dense products in 16 bits, summed in fp32, as mma reaches it; in tf32 half
    fp32_tflops: float
    bytes_us: float  # of device memory a microsecond, in units of 1e6
    cycles_of: str  # the architecture whose simulated cycles it takes


# Products, memory and boost clocks of NVIDIA's data sheets and whitepapers; the H100's clock as it ran while it was
# measured (bench/measured/). mma reaches 65% of the dense peak there (Luo et al., arXiv:2402.13499), taken for sm_100.
BOARDS = {
    "sm_80": Board(1.410, 312, 19.5, 2.04, "sm_80"),
    "sm_86": Board(1.695, 71, 35.6, 0.94, "sm_80"),
    "sm_89": Board(2.520, 165, 82.6, 1.01, "sm_80"),
    "sm_90": Board(1.980, 989 * 0.65, 66.9, 3.35, "sm_90"),
    "sm_100": Board(1.965, 2250 * 0.65, 75.0, 8.0, "sm_100"),
    "sm_120": Board(2.407, 209, 104.8, 1.79, "sm_90"),
}
FILE = tuning.FOLDER.with_name("planning") / "prices.json"
TABLE: dict[str, Any] = json.loads(FILE.read_text())


class Price(NamedTuple):
    """The price of one candidate of a plan."""

    backend: str
    us: float  # of all steps and passes
    source: str  # of a step's time: "measured", "simulated" or "reckoned"
    steps: int = 1

    def __str__(self) -> str:
        return f"{self.backend} {self.us / self.steps:,.3g} ({self.source})"


def of_all(price: Price) -> float:
    """Return the microseconds by which candidates are sorted."""
    return price.us


class Work(NamedTuple):
    """How much is to be run."""

    steps: int = 1
    training: bool = True
    num_layers: int = 1

    @property
    def passes(self) -> tuple[str, ...]:
        return tuning.PASSES if self.training else tuning.PASSES[:1]


def form_of(kernel: KernelPlan) -> str:
    """Return the form by which prices.json has cycles, beside cell, dtype and H."""
    dialect = "" if kernel.dialect == "Gluon" else "tile "
    if len(kernel.grid) > 2:
        return f"{dialect}grid {kernel.block_b}x{kernel.units}"
    return f"{dialect}ctas={kernel.ctas}" + (f" {kernel.block_b} rows" if kernel.block_b != 16 else "")


def dtype_of(request: Request) -> str:
    """A dtype of prices.json: float16 is taken for bfloat16."""
    return "bfloat16" if request.dtype.itemsize == 2 else f"float32-{request.precision}"


def simulated_cycles(kernel: KernelPlan, request: Request) -> tuple[float, float] | None:
    """Return the simulated cycles of a step, forward and backward; None if the table has nothing like it."""
    board = BOARDS.get(request.spec.arch)
    if board is None:
        return None
    dtype = dtype_of(request._replace(precision=kernel.precision))
    cell = "rnn_tanh" if request.gates == 1 else "gru" if request.gates <= 3 else "lstm"
    points = None
    for arch in (board.cycles_of, "sm_90"):
        points = points or TABLE["cycles"].get(f"{arch} {dtype} {cell} {form_of(kernel)}")
    if points is None:
        return None
    H = request.H if len(kernel.grid) > 2 else request.padded
    more = max(1.0, request.gates / 4)
    return more * between(points, H, 1), more * between(points, H, 2)


def between(points: Sequence[Sequence[float]], H: int, column: int) -> float:
    """A column of (H, cycles, cycles): on a line between two sizes, at least the first, past the last in proportion."""
    before = points[0]
    for point in points:
        if point[0] >= H:
            if point is before or before[0] >= H:
                return point[column]
            share = (H - before[0]) / (point[0] - before[0])
            return before[column] + share * (point[column] - before[column])
        before = point
    return before[column] * H / before[0]


def step_of(kernel: KernelPlan, request: Request) -> tuple[float, float, str] | None:
    """Return microseconds of a step of one wave, forward and backward, and where they come from."""
    cell = "rnn_tanh" if request.gates == 1 else request.cell
    like = request._replace(cell=cell, H=request.padded if len(kernel.grid) < 3 else request.H)
    like = like._replace(dtype=torch.bfloat16) if request.dtype == torch.float16 else like
    known = tuning.of(request.spec.arch).us.get(tuning.kernel_key(like, kernel))
    if known is not None:
        return known[0], known[1], "measured"
    cycles = simulated_cycles(kernel, request)
    if cycles is None:
        return None
    ghz = BOARDS[request.spec.arch].ghz
    short = TABLE["error"]["grid" if len(kernel.grid) > 2 else f"ctas={kernel.ctas}"]
    return cycles[0] / (1 + short[0]) / ghz / 1e3, cycles[1] / (1 + short[1]) / ghz / 1e3, "simulated"


def waves_of(kernel: KernelPlan, spec: DeviceSpec) -> int:
    """How many times the device is filled, one after the other."""
    return kernel.parts * -(-math.prod(kernel.grid) // max(1, spec.at_once(kernel.ctas)))


def moved_us(request: Request, which: str, training: bool) -> float:
    """Return the microseconds in which device memory moves a step's tensors."""
    saved, units = saved_bytes(request, 1), request.B * request.recurrences * request.H * request.dtype.itemsize
    moved = units * (request.gates + (1 if which == "forward" else 2)) + (saved if training else 0)
    return moved / BOARDS[request.spec.arch].bytes_us / 1e6


def price_of_kernel(backend: str, kernel: KernelPlan, request: Request, work: Work) -> Price | None:
    """Return the price of a plan; None if no time of a step is known."""
    step = step_of(kernel, request)
    if step is None or request.spec.arch not in BOARDS:
        return None
    waves, us = waves_of(kernel, request.spec), 0.0
    for which, of_step in zip(work.passes, step[:2], strict=False):
        us += kernel.parts * LAUNCH_US + work.steps * max(waves * of_step, moved_us(request, which, work.training))
    return Price(backend, us, step[2], work.steps)


def cheapest(plans: Sequence[KernelPlan], request: Request) -> KernelPlan:
    """Return the cheapest of one tier's plans in training. Without prices: the first with the fewest launches."""
    best, least = plans[0], math.inf
    for plan in plans:  # torch.compile traces no min with a key
        if plan.parts < best.parts:
            best = plan
    for plan in plans:
        price = price_of_kernel("", plan, request, Work())
        if price is not None:
            us = price.us - len(tuning.PASSES) * plan.parts * LAUNCH_US  # of a step of many
            if us < least:
                best, least = plan, us
    return best


def is_persistent(request: Request, which: str, num_layers: int) -> bool:
    """Whether torch has cuDNN run one kernel for all steps.

    Source: torch, aten/src/ATen/native/cudnn/RNN.cpp (2.13), get_algo, use_rnn_persist_small_h,
    use_persist_common_heuristics and use_persist_device_heuristics; the input is taken to be a multiple of 128. It asks
    small kernels for bfloat16 too, but an H100 was measured to launch there step by step (bench/measured/).
    """
    of_rnn = request.gates == 1
    small = {"forward": 384 if of_rnn else 192, "backward": 256 if of_rnn else 128}[which]
    if request.dtype == torch.bfloat16:
        return False
    if small >= request.H:
        return True
    fits = num_layers == 1 and request.D == 1 and request.H <= 1024 and request.H % 128 == 0
    runs = request.spec.multiprocessors >= 98 and request.spec.arch != "sm_86" and request.gates != 3
    batch = request.B % 8 == 0 and request.B <= 128 and not (of_rnn and request.B >= 96 and request.H >= 896)
    return request.dtype == torch.float16 and fits and runs and batch


def price_of_torch(request: Request, work: Work) -> Price | None:
    """Return the price of torch's own kernel, which is cuDNN's."""
    board = BOARDS.get(request.spec.arch)
    if board is None:
        return None
    tf32 = board.tflops / 2 if request.precision == "tf32" else board.fp32_tflops
    rate = board.tflops if request.dtype.itemsize == 2 else tf32
    products = 2 * request.B * request.recurrences * request.gates * request.H**2 / rate / 1e6
    like = request._replace(B=16, D=1, cell="rnn_tanh" if request.gates == 1 else request.cell)
    measured = tuning.of(request.spec.arch).us.get(tuning.torch_key(like))
    us = 0.0
    for number, which in enumerate(work.passes):
        moved = moved_us(request, which, work.training)
        persistent = is_persistent(request, which, work.num_layers)
        known = measured if persistent == is_persistent(like, which, 1) else None
        if persistent:
            rows = -(-request.B // 16) * request.D  # assumed: of tiles as ours, each multiprocessor has one
            waves = -(-rows // request.spec.multiprocessors)
            step = known[number] if known else between(TABLE["torch"]["persistent"], request.H, number + 1)
            us += LAUNCH_US + work.steps * max(waves * step, products, moved)
        else:
            launched = known[number] if known else TABLE["torch"]["launched"][number]
            us += work.steps * max(request.D * launched, products + moved)
    return Price("torch", us, "reckoned", work.steps)
