"""Memory that calls use again: what only backward, or only the call itself, will read.

The system hands out fresh pages at the price of a fault each, which zeroes 4 KiB: of a layer of 64 units more than its
arithmetic takes. So blocks that nobody reads any more are kept for the next call of the same sizes, KEPT bytes of them.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT = 64 << 20
_idle: dict[int, Tensor] = {}  # by address, the last used last


class _Block:
    """An array of numpy's around a tensor, which comes back when nobody has it any more."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.__array_interface__: dict[str, Any] = {
            "shape": (memory.numel(),), "typestr": "|u1", "data": (memory.data_ptr(), False), "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        _idle[self.memory.data_ptr()] = self.memory
        while sum([memory.numel() for memory in list(_idle.values())]) > KEPT:
            _idle.pop(next(iter(_idle)), None)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor, unwritten, whose memory is used again; NaN where torch fills what it allocates with them."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype)
    for address in [address for address, memory in list(_idle.items()) if memory.numel() == size]:
        found = _idle.pop(address, None)
        if found is not None:  # another thread may have it
            break
    else:
        found = torch.empty(size, dtype=torch.uint8)
    return torch.from_numpy(np.asarray(_Block(found))).view(dtype).view(shape)


def forget() -> None:
    """Give back what is kept for later calls."""
    _idle.clear()
