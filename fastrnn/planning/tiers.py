"""The table of tiers, and the order in which "auto" tries them; a file of each tier's name plans its kernels."""

from collections.abc import Callable
from typing import NamedTuple

from . import cluster, cooperative, resident
from .kernel_plan import KernelPlan, Request


class Tier(NamedTuple):
    """One way to hold W_hh on chip."""

    plan: Callable[[Request], KernelPlan]
    why: str  # it is taken


# The fewest programs first.
TIERS = {
    "resident": Tier(resident.resident, "W_hh fits one program"),
    "cluster": Tier(cluster.cluster, "a cluster of programs holds W_hh"),
    "cooperative": Tier(cooperative.cooperative, "its slices fit programs that run at once"),
}


def in_order(request: Request) -> dict[str, str]:
    """The tiers in the order in which "auto" tries them, and why each is taken.

    One program is the slower one where a cluster has a multiprocessor for each of its own. Measured (H100, bf16, B=16,
    us a step forward and backward): LSTM, H=128, 1.02 and 0.75 by clusters of four, 1.53 and 1.28 by one program; GRU
    0.83 and 0.70, 1.21 and 1.05. Other architectures, float32 and smaller sizes were not measured.
    """
    order = {tier: TIERS[tier].why for tier in TIERS}
    measured = request.spec.arch == "sm_90" and request.dtype.itemsize == 2
    if measured and request.gates > 1 and 64 < request.H <= 128:
        try:
            of_cluster = cluster.cluster(request)
        except NotImplementedError:
            return order
        if cluster.run_at_once(of_cluster, request.spec):
            del order["cluster"]
            return {"cluster": "a cluster of programs takes less time than one that holds all of W_hh"} | order
    return order
