"""The random numbers of zoneout, in torch. They equal those of kernels/zoneout.py, bit by bit.

Philox 4x32-10 takes a seed as its key and a place as its counter: the unit among all of a layer's, and the slot. A
layer's noise is one int64 tensor. It has the seed and, for each direction, how many slots come before those of a call,
because kernels count the slots of a chunk of time from zero.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; triton.language.philox.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Return the first of Philox's four 32-bit numbers, as int64.

    >>> import torch
    >>> from fastrnn.noise import philox
    >>> zero = torch.tensor(0)
    >>> hex(philox(zero, zero, zero, zero).item())  # of the paper's own test
    '0x6627e8d5'
    """
    k0, k1, c3 = seed & _LOW, (seed >> 32) & _LOW, torch.zeros_like(c0)
    for _ in range(10):
        # These are unsigned 64-bit products. int64 wraps around to the same bits.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0


def stays(noise: Tensor, p: float, slots: Tensor, units: Tensor) -> Tensor:
    """Which units (R, K) keep their h at which slots (..., R): bool (..., R, K)."""
    slots = slots[..., None]
    numbers = philox(noise[0], units.expand(*slots.shape[:-1], -1), slots & _LOW, (slots >> 32) & _LOW)
    return (numbers >> 8).float() * 2.0**-24 < torch.tensor(p, dtype=torch.float32, device=numbers.device)


def draw(layers: int, directions: int, device: torch.device) -> list[Tensor]:
    """Draw the noise of each layer of a call."""
    seeds = torch.randint(0, 2**63 - 1, (layers, 1), device=device)
    return list(torch.nn.functional.pad(seeds, (0, directions)))


def of_times(noise: Tensor, starts: Sequence[int]) -> Tensor:
    """The noise from a later time on. starts has the slots to skip in each direction."""
    return torch.cat((noise[:1], *(noise[1 + d : 2 + d] + start for d, start in enumerate(starts))))
