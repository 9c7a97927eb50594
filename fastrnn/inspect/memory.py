"""What a call takes of a device's memory, by torch's own allocators: no sampling, nothing missed between."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Memory:
    """The bytes that a call allocates beyond what was allocated before it."""

    peak: int  # the most at any time in it
    kept: int  # what is still allocated after it, results included
    allocations: int  # how many it made


def memory_of(call: Callable[[], Any], device: torch.device) -> tuple[Any, Memory]:
    """A call's result, and what it allocated: on CUDA by the allocator's counters, on a CPU by torch.profiler's events.

    On a CPU, what a library allocates past torch's allocator is not in it (oneDNN's scratchpads, numpy in Triton's
    interpreter).

    >>> import torch
    >>> from fastrnn.inspect.memory import memory_of
    >>> _, memory = memory_of(lambda: torch.ones(1024).exp(), torch.device("cpu"))
    >>> memory.kept, memory.peak, memory.allocations
    (4096, 8192, 2)
    """
    gc.collect()  # what others have left in cycles would count as freed by the call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        count = _count(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return result, Memory(peak, torch.cuda.memory_allocated(device) - before, _count(device) - count)
    # acc_events: without it torch up to 2.12 warns of cycles, of which there is one.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = call()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = kept = 0
    for _, change in changes:
        kept += change
        peak = max(peak, kept)
    return result, Memory(peak, kept, sum(change > 0 for _, change in changes))


def _count(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("allocation.all.allocated", 0)
