"""A step with one resource at a time made free: what it would give to use less of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .figures import Figures, figures
from .simulate import Kernel, simulate

UNBOUNDED = 1e9  # bytes a cycle
FREED: dict[str, Callable[[Figures], dict[str, Any]]] = {
    "tensor cores": lambda f: {"tensor": 0},
    "special functions": lambda f: {"special": 0},
    "latency of special functions": lambda f: {"special_latency": f.alu},
    "integer and fp32 pipes": lambda f: {"alu": 0, "fma": 0, "uniform": 0},
    "bandwidth of shared memory": lambda f: {
        "shared_bytes": UNBOUNDED, "wavefront_latency": 0, "address": 1, "link": UNBOUNDED
    },
    "latency of shared memory": lambda f: {"shared_latency": 8},
    "barriers of a program": lambda f: {"barrier": 0, "barrier_warp": 0},
    "fences": lambda f: {"fence_device": 1, "fence_shared": 1, "fence_block": 1},
    "barrier of a cluster": lambda f: {"cluster_barrier": 0},
    "distributed shared memory": lambda f: {"dsmem_latency": f.shared_latency, "dsmem_bytes": UNBOUNDED},
    "device memory: inputs in L2": lambda f: {"hbm_latency": f.l2_latency},
    "L2 and device memory": lambda f: {"hbm_latency": f.l1_latency, "l2_latency": f.l1_latency},
    "bandwidth of L2": lambda f: {"l2_bytes": UNBOUNDED},
}  # fmt: skip


def what_if(kernel: Kernel, arch: str, *, programs: int = 1) -> dict[str, float]:
    """Return the cycles of a step with each resource free in turn, the shortest first."""
    known = figures(arch)
    found = {
        name: simulate(kernel, arch, programs=programs, of=replace(known, **changes(known))).cycles
        for name, changes in FREED.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))
