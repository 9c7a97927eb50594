"""Microseconds until a call returns, ours beside torch.nn's; and training steps captured and replayed as CUDA graphs.

python -m bench.host --out FILE
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

import fastrnn

from . import prepare
from .processes import Log, options
from .stages import Record

CALLS, WARM_UPS = 60, 8
STEPS = 10  # that are profiled
GRAPHS: list[tuple[str, int, dict[str, Any]]] = [
    ("LSTM", 64, {}), ("GRU", 256, {}), ("LSTM", 1024, {}), ("LSTM", 64, {"num_layers": 2, "bidirectional": True}),
]  # fmt: skip


def of_host(call: Callable[[], object], calls: int) -> float:
    """The median time of a call that nothing waits for."""
    times = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(min(WARM_UPS, calls) + calls):
        wait()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[-calls:]) * 1e6, 1)


def calls(cell: str, layers: int, dtype: str, device: str, count: int = CALLS) -> Record:
    """Ours and torch.nn's, without gradients and a training step."""
    found: Record = {}
    T, B, H = (16, 4, 64) if device == "cuda" else (2, 2, 8)
    for name, library in (("ours", fastrnn), ("nn", torch.nn)):
        module: Any = getattr(library, cell)(H, H, num_layers=layers).to(device, getattr(torch, dtype))
        x = torch.randn(T, B, H, device=device, dtype=getattr(torch, dtype))
        upstream = torch.randn_like(x)

        def step(module: Any = module, x: Any = x, upstream: Any = upstream) -> None:
            y, _ = module(x)
            y.backward(upstream)
            module.zero_grad()

        found[f"{name}_inference"] = of_host(torch.no_grad()(lambda m=module, x=x: m(x)), count)
        found[f"{name}_step"] = of_host(step, count)
    return found


def graph(cell: str, H: int, how: dict[str, Any]) -> Record:
    """Capture a training step, replay it twice on another input, and compare with a step that is not captured."""
    torch.manual_seed(0)
    module: Any = getattr(fastrnn, cell)(H, H, **how).to("cuda", torch.bfloat16)
    static = torch.randn(64, 4, H, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        y, _ = module(static)
        y.float().square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = step()
    gradients = [p.grad for p in module.parameters()]
    static.copy_(torch.randn_like(static))
    captured.replay()
    captured.replay()
    torch.cuda.synchronize()
    replayed = [t.clone() for t in (y, *gradients)]
    wanted = [step(), *(p.grad for p in module.parameters())]
    return {"equal": all(torch.equal(a, b) for a, b in zip(replayed, wanted, strict=True))}


def graphed_callables() -> Record:
    """torch.cuda.make_graphed_callables on a layer."""
    module = fastrnn.LSTM(64, 64).to("cuda", torch.bfloat16)
    x = torch.randn(16, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, _ = torch.cuda.make_graphed_callables(module, (x,))(x)  # type: ignore[arg-type]
    y.sum().backward()
    torch.cuda.synchronize()
    return {"ok": True}


def by_operator() -> Record:
    """Host time of training steps by operator, from torch's profiler: the largest."""
    from torch.profiler import ProfilerActivity, profile

    module, x = fastrnn.LSTM(64, 64).to("cuda"), torch.randn(16, 4, 64, device="cuda")
    for _ in range(2):  # the first warms up
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
            for _ in range(STEPS):
                y, _ = module(x)
                y.sum().backward()
            torch.cuda.synchronize()
    largest = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)[:25]
    return {f"host us in {STEPS} steps": {event.key: round(event.self_cpu_time_total, 1) for event in largest}}


def pieces(dry: bool) -> Iterator[tuple[Record, Callable[[], Record]]]:
    """(key, what is measured) of each."""
    dtypes = ("float32",) if dry else ("float32", "bfloat16")
    for dtype in dtypes:
        for cell in ("LSTM", "GRU")[: 1 if dry else 2]:
            for layers in (1,) if dry else (1, 2):
                how = (cell, layers, dtype, "cpu" if dry else "cuda", 2 if dry else CALLS)
                yield (
                    {"what": "host us", "dtype": f"torch.{dtype}", "cell": cell, "layers": layers},
                    (lambda how=how: calls(*how)),
                )
    if dry:
        return
    for cell, H, options_ in GRAPHS:
        yield {"what": "graph", "cell": cell, "H": H, "kw": str(options_)}, lambda g=(cell, H, options_): graph(*g)
    yield {"what": "make_graphed_callables"}, graphed_callables
    yield {"what": "profile"}, by_operator


def main() -> None:
    args = options(__doc__ or "").parse_args()
    warnings.simplefilter("ignore")
    log = Log(args.out, args.seconds)
    prepare.warm_up(args.dry_run)
    for key, measure in log.each(pieces(args.dry_run), lambda piece: piece[0]):
        try:
            found = measure()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
        log.add(key | found | {"triton": triton.__version__})


if __name__ == "__main__":
    main()
