"""The table of tiers, of which "auto" takes the cheapest (prices.py); a file of each tier's name plans its kernels."""

from collections.abc import Callable
from typing import NamedTuple

from . import cluster, cooperative, cpu, resident
from .kernel_plan import KernelPlan, Request


class Tier(NamedTuple):
    """One way to hold W_hh on chip."""

    plan: Callable[[Request], KernelPlan]
    why: str  # it is taken


# The fewest programs first: the order in which "auto" takes them where no price is known.
TIERS = {
    "resident": Tier(resident.resident, "W_hh fits one program"),
    "cluster": Tier(cluster.cluster, "a cluster of programs holds W_hh"),
    "cooperative": Tier(cooperative.cooperative, "its slices fit programs that run at once"),
}
# Backends that are kernels of ours.
KERNELS = (*TIERS, cpu.NAME)
