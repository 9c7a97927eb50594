"""A pass of tiles of the batch, by as many threads as torch is told to use (torch.set_num_threads).

Tiles need nothing of one another, and their results do not depend on how the batch is divided. llvmlite's functions
leave Python's lock open while they run, so that Python's own threads do. After a fork the child makes threads of its
own.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

ROWS = 32  # of a tile at most: more do not share a panel of W_hh for long
LEAST = 12_000_000  # multiplications of a pass that are worth a thread: a tenth of a millisecond
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


class Pass(NamedTuple):
    """Sizes of a pass: steps, recurrences, sequences, multiplications of a step, and a row's scratch elements."""

    T: int
    R: int
    B: int
    work: int
    scratch: int


def run(call: Callable, addresses: int, sizes: Pass, dtype: torch.dtype) -> None:
    T, R, B, work, scratch = sizes
    threads = max(1, min(torch.get_num_threads(), T * work // LEAST))
    rows = B if threads == 1 else -(-B * R // threads)
    rows = max(1, min(ROWS, rows, B))
    tiles = [(r, first, min(rows, B - first)) for r in range(R) for first in range(0, B, rows)]
    size = rows * scratch + 64
    if threads == 1 or len(tiles) == 1:
        memory = torch.empty(size, dtype=dtype)
        for tile in tiles:
            call(addresses, T, B, *tile, _aligned(memory))
        return

    def one(tile: tuple[int, int, int]) -> None:
        memory = torch.empty(size, dtype=dtype)
        call(addresses, T, B, *tile, _aligned(memory))

    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "fastrnn")
    for _ in _pools[threads].map(one, tiles):
        pass


def _aligned(memory: torch.Tensor) -> int:
    return -(-memory.data_ptr() // 64) * 64
