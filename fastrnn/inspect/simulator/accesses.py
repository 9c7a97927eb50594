"""What a warp's access to memory costs, from the addresses of its lanes: banks, sectors and lines, whose memory.

Addresses come for several warps at once, [warps, lanes]. A program's shared memory begins at its rank in the cluster
times 2^24, by a generic address in a window that SR_SWINHI gives.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .decode import SHARED, Op

Array = Any  # of numpy
U = np.uint64
BANKS, BANK_BYTES, SECTOR_BYTES, LINE_SECTORS = 32, 4, 32, 4
RANK_BITS = 24  # of an address of shared memory, below the rank
SHARED_WINDOW = 0x7E000000  # the upper word of a generic address of shared memory; any number that no pointer has
POINTER_BITS = 36  # of a made-up pointer, below the number of its parameter


@dataclass(frozen=True)
class Access:
    """One access of a warp. If no lane takes part, it has 0 bytes."""

    bytes: int
    wavefronts: int = 0  # passes through the banks: shared memory only
    remote: float = 0.0  # the part of the bytes that is in other programs' shared memory
    by_address: bool = False  # shared memory by an address of the cluster, one's own or not
    sectors: int = 0  # of global memory
    lines: tuple[int, ...] = ()
    parameter: int = -1  # the pointer that it is at

    @property
    def is_shared(self) -> bool:
        return self.wavefronts > 0


NOTHING = Access(0)


def accesses(op: Op, addresses: Array, lanes: Array, rank: int) -> list[Access]:
    """Return the access of each warp."""
    if op.name in SHARED:
        return _shared(op, addresses, lanes, rank)
    if op.name in ("LD", "ST"):
        first = addresses[np.arange(len(addresses)), lanes.argmax(axis=1)]
        if (first >> U(32) == SHARED_WINDOW).all():
            return _shared(op, addresses & U(0xFFFFFFFF), lanes, rank)
    return _global(op, addresses, lanes)


def _shared(op: Op, addresses: Array, lanes: Array, rank: int) -> list[Access]:
    elsewhere = (addresses >> U(RANK_BITS) != rank) & lanes
    counts, others = lanes.sum(axis=1), elsewhere.sum(axis=1)
    passes = wavefronts(op, addresses & U((1 << RANK_BITS) - 1), lanes)
    by_address = op.name not in SHARED
    return [
        Access(int(n) * op.width, int(p), float(o / n), by_address) if n else NOTHING
        for n, o, p in zip(counts, others, passes, strict=True)
    ]


def wavefronts(op: Op, addresses: Array, lanes: Array) -> Array:
    """Count passes through the banks: 32 lanes by 4 bytes, 16 by 8, 8 by 16; ldmatrix has 8 rows a matrix."""
    warps = len(addresses)
    if op.name in ("LDSM", "STSM"):
        matrices = op.width // 4
        addresses, lanes = addresses[:, : 8 * matrices], np.ones((warps, 8 * matrices), bool)
        group, words = 8, 4
    else:
        group, words = {16: 8, 8: 16}.get(op.width, 32), max(1, op.width // BANK_BYTES)
    touched = (addresses // U(BANK_BYTES))[:, :, None] + np.arange(words, dtype=np.uint64)
    on = np.repeat(lanes[:, :, None], words, axis=2)
    rows = -1, group * words  # a row is what may pass at once
    return most_distinct(touched.reshape(rows), on.reshape(rows), BANKS).reshape(warps, -1).sum(axis=1)


def most_distinct(numbers: Array, on: Array, classes: int) -> Array:
    """Return for each row how many different numbers at most are equal modulo classes.

    >>> int(most_distinct(np.array([[0, 32, 32, 1]]), np.ones((1, 4), bool), 32)[0])
    2
    """
    numbers = np.where(on, numbers, U(1 << 62)).astype(np.int64)
    ordered = np.sort(numbers, axis=1)
    new = np.ones_like(ordered, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    new &= ordered != 1 << 62
    row = np.arange(len(ordered))[:, None]
    counted = np.bincount((row * classes + ordered % classes)[new], minlength=len(ordered) * classes)
    return counted.reshape(-1, classes).max(axis=1)


def _global(op: Op, addresses: Array, lanes: Array) -> list[Access]:
    found = []
    for of_warp, on in zip(addresses, lanes, strict=True):
        of_warp = of_warp[on]
        if not len(of_warp):
            found.append(NOTHING)
            continue
        ends = np.concatenate((of_warp, of_warp + U(op.width - 1)))
        sectors = np.unique(ends // U(SECTOR_BYTES))
        lines = tuple(np.unique(sectors // U(LINE_SECTORS)).tolist())
        parameter = int(of_warp[0]) >> POINTER_BITS
        found.append(Access(len(of_warp) * op.width, sectors=len(sectors), lines=lines, parameter=parameter))
    return found
