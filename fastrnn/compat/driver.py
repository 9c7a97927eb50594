"""The GPU's driver, through Triton: how many clusters it runs at once, and which launches it refuses.

A driver refuses a launch if the GPU is smaller than its architecture allows (a MIG slice, fewer multiprocessors).
Nothing has run then. A named backend raises the error; backend="auto" plans again without that kernel.

Of Triton this uses driver.active.utils.load_binary and cuOccupancyMaxActiveClusters, OutOfResources, and the texts of
errors, as read in 3.6 to 3.9.
"""

import functools
from typing import Any

import torch

# The texts of CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, INVALID_CLUSTER_SIZE and LAUNCH_OUT_OF_RESOURCES. Triton's
# RuntimeErrors have no codes.
_REFUSALS = (
    "too many blocks in cooperative launch",
    "cluster misconfiguration",
    "too many resources requested for launch",
)
# An empty kernel, only loaded. Architectures after sm_90 compile it too.
_PROBE = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry probe() { ret; }\n"

# The reasons of refused launches, by `key`. The planner reads this, and torch.compile traces the planner: so there are
# only plain values.
refused: dict[tuple, str] = {}


class LaunchRefusedError(RuntimeError):
    """The GPU's driver refused to launch a kernel, and nothing has run. The message names the backend and the reason.

    A named backend raises it, and so do backward passes and code of torch.compile. In forward calls `backend="auto"`
    takes another kernel instead.

    Examples:
        >>> import torch, fastrnn
        >>> lstm = fastrnn.LSTM(8, 16, backend="reference")
        >>> try:
        ...     output, state = lstm(torch.randn(5, 2, 8))
        ... except fastrnn.LaunchRefusedError:
        ...     output, state = fastrnn.revert(lstm)(torch.randn(5, 2, 8))
    """


def refusal(error: Exception) -> str | None:
    """The error's text if it means that a launch was refused; None for any other error."""
    from triton.runtime.errors import OutOfResources

    said = str(error)
    if isinstance(error, OutOfResources) or (
        isinstance(error, RuntimeError) and any(text in said for text in _REFUSALS)
    ):
        return said.removeprefix("Triton Error [CUDA]: ")
    return None


def key(cell: str, H: int, dtype: torch.dtype, kernel: Any, spec: Any) -> tuple:
    """What a refusal is remembered by: the device, and the grid and tiles of the KernelPlan."""
    programs = (kernel.dialect, kernel.precision, kernel.block_b, kernel.units, kernel.warps, kernel.ctas, kernel.grid)
    return (spec.arch, spec.board, spec.multiprocessors, cell, H, str(dtype), *programs)


def refuse(error: Exception, backend: str, cell: str, H: int, dtype: torch.dtype, kernel: Any, spec: Any) -> None:
    """If the error says that the driver refused a launch, remember that and raise LaunchRefusedError."""
    said = refusal(error)
    if said is None:
        return
    clusters = f"clusters of {kernel.ctas}, " if kernel.ctas > 1 else ""
    why = f"{spec.board} refused {kernel.programs} programs ({clusters}{kernel.warps} warps each): {said}"
    refused[key(cell, H, dtype, kernel, spec)] = why
    raise LaunchRefusedError(f"backend={backend!r}: {why}; backend='auto' runs another kernel from now on") from error


# torch.compile cannot trace this, so it takes the result as a constant. The cache is inside, because torch.compile
# looks through a cache outside.
@torch.compiler.assume_constant_result
def clusters_at_once(device: int, shared_bytes: int, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """How many clusters of each size a GPU runs at once, as (size, clusters). () if its driver does not say.

    Each program takes all the shared memory of a multiprocessor, so no two programs share one.
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
