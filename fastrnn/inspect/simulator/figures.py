"""What one multiprocessor does in how many cycles: one table, a source for each figure, and whose figure it is.

No figure was fitted to a time of a whole kernel. Where nothing is published for an architecture, it has no figure of
its own and sm_90's is taken: `borrowed` names those. "Assumed" marks what nobody has published for any.

Sources:
    [G]   NVIDIA, CUDA C++ Programming Guide, table of arithmetic throughput
    [W]   NVIDIA's architecture whitepapers (A100, H100, RTX Blackwell); for tensor cores peak / clock / multiprocessors
    [F]   an NVIDIA moderator in its developer forum: L1's tag stage looks up "4 sets x 4 sectors" a cycle
          (forums.developer.nvidia.com/t/312884)
    [H]   Huerta et al. 2025, arXiv:2503.20481, with the configuration of their simulator (Ampere)
    [N]   github.com/gpzlx1/NV-Learning, Latency/results: H800 SXM, microbenchmarks whose machine code was checked
    [L]   Luo et al., arXiv:2402.13499 and 2501.12084: H800 PCIe
    [S]   Sun et al. 2022, arXiv:2206.02874: A100, tables 9 and 10
    [A]   Abdelkhalik et al. 2022, arXiv:2208.11174: A100
    [B]   Burtchell and Burtscher, IISWC 2024, logs of an A100, as quoted by others
    [C]   ClusterFusion, arXiv:2508.18850: H100
    [P]   the stall counts that ptxas leaves between independent instructions of a kind
    [J]   Jia et al. 2018, arXiv:1804.06826
"""

from dataclasses import dataclass, field, fields
from typing import Any

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
BASE = "sm_90"


def figure(meaning: str, value: float, source: str, **others: tuple[float, str]) -> Any:
    """A field of the table: sm_90's value with its source, and (value, source) of architectures with their own."""
    return field(metadata={"meaning": meaning, BASE: (value, source), **others})


@dataclass(frozen=True)
class Figures:
    """Figures of one architecture. A latency is the cycles from an instruction's issue to that of its first user."""

    # How long a pipe of one of the four schedulers is taken by a warp's instruction.
    alu: float = figure("integer, logic, compare, select", 2, "16 lanes [G]; 2.09 measured [N]; [P]")
    fma: float = figure("fp32, on each pipe that has it", 2, "16 lanes [G]; IMAD, which has one pipe, 2.07 [N]")
    fma_pipes: float = figure("pipes for fp32", 2, "128 lanes a multiprocessor [G]; 1.10 a cycle [N]",
                              sm_80=(1, "64 lanes a multiprocessor [G]"))  # fmt: skip
    uniform: float = figure("the uniform datapath", 2, "[P]; [H]")
    special: float = figure("special functions", 8, "16 a cycle and multiprocessor [G]; 8.3 [N]; [P]")
    special_queue: float = figure("instructions that may wait before that unit", 1, "assumed: a latch")
    tensor: float = figure("mma m16n8k16 in 16 bits", 6, "[P]; 65.3% of the dense peak, 6.1 [L]",
                           sm_80=(8, "1024 multiply-adds a cycle [W]; [P]"),
                           sm_120=(32, "256 multiply-adds a cycle with fp32 sums [W]"))  # fmt: skip
    # Latencies.
    special_latency: float = figure("ex2, tanh, lg2, rcp", 18, "[A]; sine with its multiply 22.97 [N]")
    shared_latency: float = figure("shared memory, one wavefront", 23, "23.00 [N]; A100 23.1 [S]")
    wavefront_latency: float = figure("and each further one", 2, "ldmatrix x1, x2, x4: 23.1, 25.1, 29.3 [S]")
    l1_latency: float = figure("L1", 32, "[N], [L]")
    l2_latency: float = figure("L2", 280, "272 to 284, its near part 266, its far one 300 [N]; 258 and 414 [L]")
    hbm_latency: float = figure("device memory", 670, "654 to 693 [N]; 479 [L]")
    dsmem_latency: float = figure("another program's shared memory", 203, "191, 206, 203, 202 in 2, 4, 8, 16 [N]; [C]")
    dsmem_own_latency: float = figure("one's own by a cluster address", 32, "32 [N]; 33 [L]")
    shuffle_latency: float = figure("a shuffle", 26, "26.0 [N]")
    register_latency: float = figure("a special register", 20, "assumed: about 20 on architectures before")
    constant_latency: float = figure("the constant bank at an address in a register", 62, "59 to 63 [N]")
    atomic_latency: float = figure("an atomic that returns", 270, "268 or 515, by its address [N]")
    mbarrier_latency: float = figure("an arrival at, or a try of, an mbarrier", 23, "46 for both [N]")
    # The way of an access to memory.
    queue: float = figure("accesses that a scheduler hands on before it stalls", 5, "[H], table 1")
    address: float = figure("an access in the address stage, at least", 4, "8 lanes a cycle [H]; STS 4.14 apart [N]")
    link: float = figure("bytes a cycle from a scheduler and back", 64, "512 bits [H]; STG.64 8.11 apart [N]")
    buffer: float = figure("cycles of work that may wait for the data stage", 16, "assumed")
    shared_bytes: float = figure("bytes a cycle of shared memory", 128, "[L]; [W]")
    tag_sets: float = figure("lines that L1 looks up a cycle, if their numbers differ modulo this", 4,
                             "[F]; which sets is assumed: the line's number modulo 4")  # fmt: skip
    l2_bytes: float = figure("bytes a cycle and multiprocessor to L2, and from it", 64, "[W]; [J]")
    dsmem_bytes: float = figure("bytes a cycle of distributed shared memory", 16,
                                "3.3 TB/s of all multiprocessors are 14 of each [L], [C]")  # fmt: skip
    # Synchronisation.
    barrier: float = figure("bar.sync", 12, "14.2 with one warp [N]", sm_80=(21, "23 with one warp [B]"))
    barrier_warp: float = figure("and each warp that arrives", 2, "23, 25, 29, 37, 53, 85 of 1 to 32 warps [B]")
    fence_block: float = figure("a fence for a program", 8, "8.25 [N]")
    fence_device: float = figure("a fence for the device", 680, "669 alone, 686 in a cluster's barrier [N]",
                                 sm_80=(764, "[B]"))  # fmt: skip
    fence_shared: float = figure("a fence of shared memory alone", 20, "assumed")
    cluster_barrier: float = figure("a cluster's barrier, relaxed, two programs of a warp", 73, "74.7 [N]")
    reduction_travel: float = figure("until a reduction has counted in L2", 200, "half of an atomic [N], about")
    reduction_each: float = figure("between reductions at one address", 1, "assumed")
    branch: float = figure("a taken branch, to the warp's next issue", 10, "assumed")


def figures(arch: str) -> Figures:
    """Return the figures of an architecture; NotImplementedError, with those there are, if none are published.

    >>> figures("sm_80").tensor, figures("sm_90").tensor
    (8, 6)
    """
    if arch not in ARCHS:
        raise NotImplementedError(
            f"simulation of {arch} is missing: there are figures of a multiprocessor for {', '.join(ARCHS)}"
        )
    return Figures(**{one.name: one.metadata.get(arch, one.metadata[BASE])[0] for one in fields(Figures)})


def borrowed(arch: str) -> list[str]:
    """Return the names of the figures that an architecture takes from sm_90.

    >>> "tensor" in borrowed("sm_80"), "tensor" in borrowed("sm_100")
    (False, True)
    """
    figures(arch)
    return [one.name for one in fields(Figures) if arch not in one.metadata]


def table() -> list[tuple[str, str, str, float, str]]:
    """Return of each figure its name, meaning, architecture, value and source."""
    return [
        (one.name, one.metadata["meaning"], arch, *one.metadata[arch])
        for one in fields(Figures)
        for arch in ARCHS
        if arch in one.metadata
    ]
