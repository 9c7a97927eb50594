"""What the planner must know of a device: a table of architectures, and the device at hand.

Sources: the table of technical specifications per compute capability in NVIDIA's CUDA C++ Programming Guide (13.0), the
product pages of the boards named, and AMD's CDNA2, CDNA3 and CDNA4 instruction set guides. The table has the number of
multiprocessors of one common board. `DeviceSpec.of` takes the real device's.
"""

from dataclasses import dataclass, replace

import torch

from .compat import driver, interpreter
from .compat.cached import cached

CLUSTERS = (2, 4, 8, 16)  # programs of a cluster


@dataclass(frozen=True)
class DeviceSpec:
    """One architecture, as a kernel sees it."""

    arch: str
    board: str
    multiprocessors: int  # SMs, or compute units on AMD
    shared_bytes: int  # the most shared memory (LDS) that one program can have
    register_bytes: int  # registers of one multiprocessor
    warp_size: int
    cluster_limit: int  # the most programs in one thread-block cluster; 1 without clusters
    has_tf32: bool
    clusters: tuple[tuple[int, int], ...] = ()  # (size, how many run at once), where known

    def at_once(self, ctas: int) -> int:
        """How many clusters of a size run at once, with one program on each multiprocessor.

        >>> from fastrnn.device import DeviceSpec
        >>> DeviceSpec.named("sm_90").at_once(8)
        15
        """
        return dict(self.clusters).get(ctas, self.multiprocessors // ctas)

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @staticmethod
    def named(arch: str) -> "DeviceSpec":
        """The spec of an architecture by name.

        >>> from fastrnn.device import DeviceSpec
        >>> DeviceSpec.named("sm_90").shared_bytes
        232448
        """
        if arch not in SPECS:
            raise ValueError(f"device: expected one of {', '.join(SPECS)}; got {arch!r}")
        return SPECS[arch]

    @staticmethod
    def of(device: torch.device) -> "DeviceSpec":
        """The spec of a device: a GPU, or the interpreter for CPU tensors where TRITON_INTERPRET=1."""
        if device.type == "cpu" and interpreter.ENABLED:
            return SPECS["interpreter"]
        if device.type != "cuda":
            raise NotImplementedError(
                f"a kernel for {device.type} tensors is missing: Triton's kernels run on GPUs (CUDA or ROCm). In "
                "Triton's interpreter they run on CPU tensors, if TRITON_INTERPRET=1 is set before fastrnn is imported"
            )
        return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cached
def _of_gpu(index: int) -> DeviceSpec:
    """The spec of a GPU: the figures of its family, replaced by its own where the driver has them."""
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{found.major}{found.minor}"
        if arch not in SPECS:  # sm_87, 103, 121: take the family's first; its shared memory is read below
            arch = f"sm_{found.major}0"
    if arch not in SPECS:
        raise NotImplementedError(f"fastrnn does not know {arch} ({found.name}); it knows {', '.join(SPECS)}")
    spec = replace(SPECS[arch], board=found.name, multiprocessors=found.multi_processor_count)
    if spec.is_amd:
        return spec
    shared = getattr(found, "shared_memory_per_block_optin", spec.shared_bytes)
    sizes = tuple(size for size in CLUSTERS if size <= spec.cluster_limit)
    clusters = driver.clusters_at_once(index, shared, sizes) if sizes else ()
    if not clusters and spec.multiprocessors == SPECS[arch].multiprocessors:  # the board of the table
        clusters = spec.clusters
    return replace(spec, shared_bytes=shared, clusters=clusters)


def _nvidia(
    arch: str,
    board: str,
    multiprocessors: int,
    shared_kib: int,
    cluster_limit: int = 1,
    clusters: tuple[tuple[int, int], ...] = (),
) -> DeviceSpec:
    limits = (multiprocessors, shared_kib * 1024, 256 * 1024, 32, cluster_limit)
    return DeviceSpec(arch, board, *limits, has_tf32=True, clusters=clusters)


def _amd(arch: str, board: str, multiprocessors: int, shared_kib: int) -> DeviceSpec:
    return DeviceSpec(arch, board, multiprocessors, shared_kib * 1024, 512 * 1024, 64, 1, has_tf32=False)


SPECS = {
    spec.arch: spec
    for spec in (
        _nvidia("sm_80", "A100", 108, 163),
        _nvidia("sm_86", "RTX 3090", 82, 99),
        _nvidia("sm_89", "RTX 4090", 128, 99),
        # An H100's driver reports these clusters (bench/measured/). They are fewer than 132 / size, because a
        # cluster stays in one group of multiprocessors.
        _nvidia("sm_90", "H100 SXM", 132, 227, cluster_limit=16, clusters=((8, 15), (16, 7))),
        _nvidia("sm_100", "B200", 148, 227, cluster_limit=16),
        _nvidia("sm_120", "RTX 5090", 170, 99, cluster_limit=8),
        _amd("gfx90a", "MI250X, one die", 110, 64),
        _amd("gfx942", "MI300X", 304, 64),
        _amd("gfx950", "MI355X", 256, 160),
        # The interpreter computes with numpy on the CPU. Nothing is on chip, so nothing limits a kernel.
        DeviceSpec("interpreter", "Triton's interpreter", 1 << 20, 1 << 62, 1 << 62, 32, 1, has_tf32=False),
    )
}
