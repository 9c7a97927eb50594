"""How a layer's time and memory grow with the length of the sequence: `python -m fastrnn profile`.

For each length, one forward and backward: time a step, tokens a second, memory at the peak of each pass, bytes that are
kept for backward a step, and what part of the speed of light it is:

    least time = max(flops / fastest product, bytes / fastest copy) of this device, both measured here just before

of the products of both passes, and of input, output, parameters and their gradients, each moved once. It knows nothing
of the chain from step to step, which is what a recurrence waits for: where B and H are small it is far away.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from ..compat import profiling
from ..nn import modules
from ..planning.arguments import check_checkpoint_every, check_heads, expect
from ..planning.planner import BACKENDS
from .measure import WARM_UPS
from .memory import memory_of

DTYPES = ("float32", "bfloat16", "float16")
LEAST_RUNS, MOST_RUNS, SECONDS = 3, 21, 3.0
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = 1 << 28


@dataclass(frozen=True)
class Request:
    """A stack of layers on sequences of one length."""

    cell: str
    hidden_size: int
    batch_size: int
    seq_len: int
    input_size: int
    num_layers: int = 1
    directions: int = 1
    dtype: str = "float32"
    backend: str = "auto"
    checkpoint_every: int | None = None
    device: str = "cpu"
    num_heads: int = 1

    def __post_init__(self) -> None:
        expect("cell", self.cell, tuple(CELLS))
        expect("backend", self.backend, BACKENDS)
        expect("dtype", self.dtype, DTYPES)
        expect("directions", self.directions, (1, 2))
        for name in ("hidden_size", "batch_size", "seq_len", "input_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive int; got {getattr(self, name)}")
        check_checkpoint_every(self.checkpoint_every)
        check_heads(self.num_heads, self.hidden_size)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected cpu, since torch finds no GPU here; got 'cuda'")

    def layer(self) -> Any:
        name, *nonlinearity = self.cell.upper().split("_")
        options: dict[str, Any] = {"nonlinearity": nonlinearity[0].lower()} if nonlinearity else {}
        return getattr(modules, name)(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bidirectional=self.directions == 2,
            backend=self.backend,
            checkpoint_every=self.checkpoint_every,
            num_heads=self.num_heads,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            **options,
        )

    def runs_on(self) -> str:
        """The backend, after the plan of "auto"; NotImplementedError, saying why, where one cannot run."""
        shape = self.seq_len, self.batch_size, self.input_size
        like = torch.empty((), device=self.device, dtype=getattr(torch, self.dtype))
        return self.layer().plan(like.expand(shape)).backend

    @property
    def flops(self) -> int:
        """Return the flops of the products of forward and backward, which has twice as many, without recomputation."""
        H, D, L = self.hidden_size, self.directions, self.num_layers
        columns = self.input_size + (L - 1) * D * H + L * H // self.num_heads
        return 3 * 2 * self.seq_len * self.batch_size * D * CELLS[self.cell].gates * H * columns

    def bytes_moved(self, parameters: int) -> int:
        """Return the bytes moved at least: input, parameters and output forward; gradients and input backward."""
        features = 3 * self.input_size + 3 * self.directions * self.hidden_size
        elements = self.seq_len * self.batch_size * features + 3 * parameters
        return elements * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Profile:
    """Time and memory of one forward and backward; bytes leave out parameters, input and the output's gradient."""

    backend: str  # that ran
    asked: str  # as which it was asked for
    checkpoint_every: int | None
    seq_len: int
    forward_us_per_step: float
    backward_us_per_step: float
    tokens_per_second: float  # of both passes; a token is a step of a row
    forward_peak_bytes: int
    backward_peak_bytes: int  # what forward kept included
    kept_bytes_per_step: float  # between the passes, output apart
    light_fraction: float | None  # of the least time in what it took

    @property
    def name(self) -> str:
        name = self.asked if self.asked == self.backend else f"{self.asked} ({self.backend})"
        return name if self.checkpoint_every is None else f"{name}, every {self.checkpoint_every}"


class Run:
    """A request's layer with its tensors, ready to run."""

    def __init__(self, request: Request) -> None:
        self.request, self.device = request, torch.device(request.device)
        torch.manual_seed(0)
        self.layer = request.layer()
        like = {"device": request.device, "dtype": getattr(torch, request.dtype)}
        T, B = request.seq_len, request.batch_size
        self.input = torch.randn(T, B, request.input_size, requires_grad=True, **like)
        self.upstream = torch.randn(T, B, request.directions * request.hidden_size, **like)
        self.leaves = [self.input, *self.layer.parameters()]

    def forward(self) -> Tensor:
        with profiling.named("forward"):
            return self.layer(self.input)[0]

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        with profiling.named("backward"):
            return torch.autograd.grad(y, self.leaves, self.upstream)

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of forward and of backward: medians of several runs."""
        found: list[tuple[float, float]] = []
        started = time.perf_counter()
        for run in range(WARM_UPS + MOST_RUNS):
            clock = _clock(self.device)
            y = self.forward()
            between = clock()
            self.backward(y)
            whole = clock()
            del y
            if run >= WARM_UPS or self.device.type == "cpu":  # a CPU has no clock to warm up
                found.append((between, whole - between))
            if len(found) >= LEAST_RUNS and time.perf_counter() - started > SECONDS:
                break
        return statistics.median(f for f, _ in found), statistics.median(b for _, b in found)

    def memory(self) -> tuple[int, int, int]:
        """Return bytes: at the peak of forward, at the peak of backward, and kept between them beside the output."""
        y, forward = memory_of(self.forward, self.device)
        _, backward = memory_of(lambda: self.backward(y), self.device)
        output = y.untyped_storage().nbytes()
        return forward.peak, forward.kept + backward.peak, forward.kept - output

    def trace(self, file: Path) -> None:
        """Write one forward and backward as a Chrome trace by torch.profiler, which Perfetto reads too."""
        file.touch()  # torch's profiler only prints that it cannot
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.backward(self.forward())
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            self.backward(self.forward())
        profiler.export_chrome_trace(str(file))

    def nvtx(self) -> None:
        """Run one forward and backward with every range given to NVTX, for Nsight."""
        if self.device.type != "cuda":
            raise ValueError(f"nvtx: expected a CUDA device; got {self.device}")
        with torch.autograd.profiler.emit_nvtx():
            self.backward(self.forward())
            torch.cuda.synchronize()


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds since now; on CUDA by events, of which only asking waits."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        start.record()

        def elapsed() -> float:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            now.synchronize()
            return start.elapsed_time(now) / 1000

        return elapsed
    began = time.perf_counter()
    return lambda: time.perf_counter() - began


@dataclass(frozen=True)
class Light:
    """The most that a device does, measured on it: products of a dtype, and a copy, each the best of several."""

    flops_per_second: float
    bytes_per_second: float

    @staticmethod
    def of(device: str, dtype: str) -> "Light":
        like: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
        n = GEMM_SIZE[device]
        a, source = torch.randn(n, n, **like), torch.empty(COPIED_BYTES, dtype=torch.int8, device=device)
        product, target = torch.empty_like(a), torch.empty_like(source)
        gemm = _best(lambda: torch.mm(a, a, out=product), device)
        copy = _best(lambda: target.copy_(source), device)
        return Light(2 * n**3 / gemm, 2 * COPIED_BYTES / copy)

    def least_seconds(self, flops: int, bytes_moved: int) -> float:
        return max(flops / self.flops_per_second, bytes_moved / self.bytes_per_second)


def _best(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(WARM_UPS + 7):
        clock = _clock(torch.device(device))
        call()
        times.append(clock())
    return min(times)


def profile(request: Request, light: Light | None = None) -> Profile:
    """Run a request: time, memory and, if light is given, what part of the speed of light it is."""
    run = Run(request)
    peaks = run.memory()
    forward, backward = run.seconds()
    T = request.seq_len
    fraction = None
    if light is not None:
        parameters = sum(p.numel() for p in run.layer.parameters())
        fraction = light.least_seconds(request.flops, request.bytes_moved(parameters)) / (forward + backward)
    return Profile(
        backend=request.runs_on(),
        asked=request.backend,
        checkpoint_every=request.checkpoint_every,
        seq_len=T,
        forward_us_per_step=forward / T * 1e6,
        backward_us_per_step=backward / T * 1e6,
        tokens_per_second=T * request.batch_size / (forward + backward),
        forward_peak_bytes=peaks[0],
        backward_peak_bytes=peaks[1],
        kept_bytes_per_step=peaks[2] / T,
        light_fraction=fraction,
    )


def profiles(request: Request, lengths: Sequence[int], compare: Sequence[str] = ()) -> list[Profile]:
    """A request at several lengths, and after each what other backends take for it, without checkpoints."""
    wanted = []
    for T in lengths:
        one = replace(request, seq_len=T)
        wanted += [one, *(replace(one, backend=backend, checkpoint_every=None) for backend in compare)]
    wanted = list(dict.fromkeys(wanted))
    for one in wanted:  # before the first takes its time
        one.runs_on()
    light = Light.of(request.device, request.dtype)
    return [profile(one, light) for one in wanted]


def table(found: Sequence[Profile]) -> str:
    """Return a table for people, with a line for each profile."""
    head = f"{'T':>8} {'backend':<22}{'us a step: forward':>19}{'backward':>11}{'tokens/s':>13}"
    head += f"{'peak MiB: forward':>19}{'backward':>11}{'kept B a step':>15}{'of light':>10}"
    lines = [head]
    for p in found:
        light = "unknown" if p.light_fraction is None else f"{p.light_fraction:.1%}"
        line = f"{p.seq_len:>8} {p.name:<22}{p.forward_us_per_step:>19,.2f}{p.backward_us_per_step:>11,.2f}"
        line += f"{p.tokens_per_second:>13,.0f}{p.forward_peak_bytes / 2**20:>19,.2f}"
        line += f"{p.backward_peak_bytes / 2**20:>11,.2f}{p.kept_bytes_per_step:>15,.0f}{light:>10}"
        lines.append(line)
    return "\n".join(lines)


def plot(found: Sequence[Profile], file: Path) -> None:
    """Time a step and memory at the peak over T, by backend; RuntimeError without matplotlib."""
    try:
        from matplotlib import style
    except ImportError:
        raise RuntimeError("a plot needs matplotlib: pip install matplotlib") from None
    with style.context("fastrnn.figures"):
        _drawn(found).savefig(file)


def _drawn(found: Sequence[Profile]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(p.name for p in found):
        of_one = [p for p in found if p.name == name]
        lengths = [p.seq_len for p in of_one]
        time_axes.plot(lengths, [p.forward_us_per_step + p.backward_us_per_step for p in of_one], "o-", label=name)
        memory_axes.plot(lengths, [p.backward_peak_bytes / 2**20 for p in of_one], "o-", label=name)
    time_axes.set(xlabel="T", ylabel="us a step, both passes", xscale="log")
    memory_axes.set(xlabel="T", ylabel="MiB at the peak", xscale="log", yscale="log")
    time_axes.legend()
    return figure


def as_dict(found: Profile) -> dict[str, Any]:
    """Return a profile with stable keys, for programs."""
    return asdict(found)
