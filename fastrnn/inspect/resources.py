"""What a compiled launch uses: registers, memories, tensor cores, and what its time loop loads and waits for.

NVIDIA: counts from the machine code, the time loop's loads and barriers from the PTX. AMD: counts from the assembly's
metadata and text, the time loop from the LLVM IR.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..device import DeviceSpec
from . import cluster, flow, sass
from .compile import Launch

# Matrix instructions of the two vendors; the first are NVIDIA's for compute capability 7, 9.0 and 10.0.
TENSOR_CORE = re.compile(r"HMMA\.\S+|[HIQ]GMMA\.\S+|U?TC\w*MMA\S*|v_s?mfmac?_\w+")
# Warps and programs that a multiprocessor runs at most. Source: the technical specifications per compute capability in
# NVIDIA's CUDA C++ Programming Guide (13.0).
RESIDENT_LIMITS = {
    "sm_80": (64, 32), "sm_86": (48, 16), "sm_89": (48, 24), "sm_90": (64, 32), "sm_100": (64, 32), "sm_120": (48, 24),
}  # fmt: skip
# Shared memory that the system keeps of every program, from compute capability 8.0 on. Same source.
RESERVED_SHARED = 1024
# AMD, CDNA2 and up (instruction set guides, section "VGPRs"; https://rocm.docs.amd.com, "Occupancy"): a SIMD has 512
# registers a lane, handed out by 8, and runs at most 8 waves; a compute unit has 4 SIMDs.
AMD_SIMDS, AMD_REGISTERS, AMD_WAVES = 4, 512, 8


@dataclass(frozen=True)
class Resources:
    """What one kernel uses. A step is one pass through its time loop."""

    registers: int  # a thread
    accumulation_registers: int  # AMD's AGPRs, of these
    spill_bytes: int  # a thread
    shared_bytes: int  # a program, dynamic and static
    occupancy: int  # programs that fit a multiprocessor at once
    tensor_core_instructions: dict[str, int]  # by kind, in the whole kernel
    weight_global_loads: int  # loads of W_hh, in the whole kernel
    weight_global_loads_in_loop: int
    global_loads_in_loop: int  # of anything
    barriers_in_loop: int  # of a program's warps
    cluster_instructions_in_loop: int
    unguarded_remote_accesses: int  # of another program's shared memory, without the cluster barrier that orders them
    loop_instructions: int  # of the machine


def resources(launch: Launch) -> Resources:
    """Count what a compiled launch uses; ValueError if no time loop is found in its code."""
    code = flow.parse_llvm(launch.asm["llir"]) if launch.spec.is_amd else flow.parse_ptx(launch.asm["ptx"])
    # Forward's inputs.W_hh, backward's read.W_hh.
    loop, weight = code.step_loop(), [name.split(".")[-1] for name in launch.arguments].index("W_hh")
    if not loop:
        raise ValueError(f"expected a loop over time in the code of {launch.name}, found none")
    used = _amd(launch.asm["amdgcn"]) if launch.spec.is_amd else _nvidia(launch.asm["cubin"])
    static = used.pop("static_shared")
    shared = launch.shared_bytes + static
    return Resources(
        **used,
        spill_bytes=spill_bytes(launch.asm),
        shared_bytes=shared,
        occupancy=occupancy(launch.spec, used["registers"], launch.warps, shared),
        weight_global_loads=len(code.global_loads(weight, code.statements)),
        weight_global_loads_in_loop=len(code.global_loads(weight, loop)),
        global_loads_in_loop=sum(s.is_global_load for s in loop),
        barriers_in_loop=sum(
            bool(re.match(r"bar\.|barrier\.(cta\.)?sync|llvm\.amdgcn\.s\.barrier", s.opcode)) for s in loop
        ),
        cluster_instructions_in_loop=sum(bool(re.search(r"cluster|^mapa", s.opcode)) for s in loop),
        unguarded_remote_accesses=len({remote.line for remote, _ in cluster.unguarded(launch.asm.get("ptx", ""))}),
    )


def spill_bytes(asm: Mapping[str, Any]) -> int:
    """Return the bytes of registers that a thread keeps in memory: NVIDIA's stack, or AMD's spilled vector registers.

    AMD's scalar registers spill to lanes of vector registers, not to memory: not counted.
    """
    if "amdgcn" in asm:
        return 4 * _metadata(asm["amdgcn"], "vgpr_spill_count")
    return sass.usage(asm["cubin"])["stack"]


def occupancy(spec: DeviceSpec, registers: int, warps: int, shared_bytes: int) -> int:
    """Return how many programs one multiprocessor runs at once, by registers, shared memory and warps.

    >>> from fastrnn.device import DeviceSpec
    >>> occupancy(DeviceSpec.named("sm_90"), registers=64, warps=8, shared_bytes=100_000)
    2
    """
    if spec.is_amd:
        waves = min(AMD_WAVES, AMD_REGISTERS // (-(-registers // 8) * 8))
        by_memory = spec.shared_bytes // max(1, shared_bytes)
        return min(AMD_SIMDS * waves // warps, by_memory)
    most_warps, most_programs = RESIDENT_LIMITS[spec.arch]
    a_warp = -(-registers * spec.warp_size // 256) * 256  # registers are handed out by 256
    by_registers = spec.register_bytes // 4 // (a_warp * warps)
    by_memory = (spec.shared_bytes + RESERVED_SHARED) // (shared_bytes + RESERVED_SHARED)
    return min(by_registers, by_memory, most_warps // warps, most_programs)


def _nvidia(cubin: bytes) -> dict[str, Any]:
    usage = sass.usage(cubin)
    instructions, loop = sass.parse(sass.disassemble(cubin))
    kinds = Counter(i.opcode for i in instructions if TENSOR_CORE.match(i.opcode))
    # From compute capability 9.0 on, the cubin counts what the system keeps among its own.
    static = usage["shared"] - RESERVED_SHARED if usage["shared"] >= RESERVED_SHARED else usage["shared"]
    return {
        "registers": usage["registers"],
        "accumulation_registers": 0,
        "static_shared": static,
        "tensor_core_instructions": dict(sorted(kinds.items())),
        "loop_instructions": len(loop),
    }


def _amd(assembly: str) -> dict[str, Any]:
    return {
        "registers": _metadata(assembly, "vgpr_count"),
        "accumulation_registers": _metadata(assembly, "agpr_count"),
        "static_shared": _metadata(assembly, "group_segment_fixed_size"),
        "tensor_core_instructions": dict(sorted(Counter(TENSOR_CORE.findall(assembly)).items())),
        "loop_instructions": len(flow.parse_amdgcn(assembly).step_loop()),
    }


def _metadata(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert found is not None, name
    return int(found[1])
