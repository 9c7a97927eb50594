"""The GPU's driver, as Triton passes it on: how many clusters it runs at once, and which launches it refuses.

A launch is refused, and nothing has run, where the GPU is smaller than its architecture (a slice by MIG, fewer
multiprocessors). Who named the backend gets the error; backend="auto" plans again, without that kernel.

Of Triton this uses driver.active.utils.load_binary and cuOccupancyMaxActiveClusters, OutOfResources, and the texts of
errors, as read in 3.6 to 3.9.
"""

import functools
from typing import Any

import torch

# CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, INVALID_CLUSTER_SIZE and LAUNCH_OUT_OF_RESOURCES, of which Triton's
# RuntimeErrors have only the text.
_REFUSALS = (
    "too many blocks in cooperative launch",
    "cluster misconfiguration",
    "too many resources requested for launch",
)
# Does nothing; newer architectures compile it too.
_PROBE = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry probe() { ret; }\n"

# Why, by what `key` says of a launch. The planner reads it, and torch.compile traces the planner: plain values only.
refused: dict[tuple, str] = {}


class LaunchRefusedError(RuntimeError):
    """The driver refused to launch a kernel, which has not run; the message says which backend, and why."""


def refusal(error: Exception) -> str | None:
    """What an error says if it means that a launch was refused; None of any other."""
    from triton.runtime.errors import OutOfResources

    said = str(error)
    if isinstance(error, OutOfResources) or (
        isinstance(error, RuntimeError) and any(text in said for text in _REFUSALS)
    ):
        return said.removeprefix("Triton Error [CUDA]: ")
    return None


def key(cell: str, H: int, dtype: torch.dtype, kernel: Any, spec: Any) -> tuple:
    """What a refusal holds for: this grid of a KernelPlan, on such a device."""
    programs = (kernel.dialect, kernel.precision, kernel.block_b, kernel.units, kernel.warps, kernel.ctas, kernel.grid)
    return (spec.arch, spec.board, spec.multiprocessors, cell, H, str(dtype), *programs)


def refuse(error: Exception, backend: str, cell: str, H: int, dtype: torch.dtype, kernel: Any, spec: Any) -> None:
    """Remember a launch, and raise LaunchRefusedError, if the error says that the driver refused it."""
    said = refusal(error)
    if said is None:
        return
    clusters = f"clusters of {kernel.ctas}, " if kernel.ctas > 1 else ""
    why = f"{spec.board} refused {kernel.programs} programs ({clusters}{kernel.warps} warps each): {said}"
    refused[key(cell, H, dtype, kernel, spec)] = why
    raise LaunchRefusedError(f"backend={backend!r}: {why}; backend='auto' runs another kernel from now on") from error


# torch.compile cannot trace this, and takes what it once returned; an inner cache, since it looks through an outer one.
@torch.compiler.assume_constant_result
def clusters_at_once(device: int, shared_bytes: int, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """How many clusters of each size a GPU runs at once, as (size, clusters); () where its driver does not say.

    Each program takes all the shared memory of a multiprocessor, and so has it to itself.
    """
    return _clusters_at_once(device, shared_bytes, sizes)


@functools.cache
def _clusters_at_once(device: int, shared_bytes: int, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    try:
        from triton.runtime import driver

        utils: Any = driver.active.utils  # type: ignore[attr-defined]
        with torch.cuda.device(device):
            _, function, *_ = utils.load_binary("probe", _PROBE, shared_bytes, device)
            return tuple((size, utils.cuOccupancyMaxActiveClusters(function, shared_bytes, size)) for size in sizes)
    except (AttributeError, ImportError, RuntimeError, TypeError):
        return ()
