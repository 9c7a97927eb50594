"""Compile the planned kernels for any architecture without a GPU, and say what the compiler made of them.

    python -m bench.cross_compile --arch sm_90 gfx942 --cell lstm --hidden 64 128 --dtype bfloat16

The launcher runs as it would on a GPU, with its real arguments, up to the launch itself. Printed for each pass:

    registers, spilled, shared      registers and bytes of stack (AMD: spilled registers) a thread, bytes a program
    loads, polls                    global loads in the time loop, from the TTGIR: the step's inputs and the exchanged
                                    state, never W_hh; of these, loads of a barrier's counter
    cycles                          modelled, NVIDIA: stall counts + 14 * scoreboard waits of the step loop in the SASS

14 fits two published H100 figures of another library's LSTM forward (FlashRNN: 1.94 us a step at H=64, 3.15 us at
H=128, B=16, bf16). It is a model: nothing here was timed.

Triton's internals used (the active driver, JITFunction.run, CompiledKernel.asm) were read in 3.9.0.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fastrnn import launch, plan
from fastrnn.device import SPECS, DeviceSpec
from fastrnn.reference import GATES

PASSES = ("forward", "backward")


def compile_kernel(
    arch: str,
    backend: str,
    cell: str,
    hidden_size: int,
    batch_size: int,
    dtype: torch.dtype,
    which: str,
    precision: str,
) -> dict:
    """One row: what compiling this pass of the planned kernel for arch gave; NotImplementedError if none is planned."""
    spec = DeviceSpec.named(arch)
    chosen = plan(
        cell,
        hidden_size=hidden_size,
        batch_size=batch_size,
        dtype=dtype,
        device=spec,
        backend=backend,
        precision=precision,
    )
    planned = chosen.kernel
    if planned is None:
        raise NotImplementedError(chosen.why)
    compiled, exchanged = _compile(spec, chosen.backend, cell, hidden_size, batch_size, dtype, which, precision)
    row = {
        "arch": arch, "backend": chosen.backend, "cell": cell, "hidden": hidden_size, "batch": batch_size,
        "dtype": str(dtype).removeprefix("torch."), "pieces": exchanged, "programs": planned.programs,
        "polls": 2 * planned.spin_on_load * (chosen.backend == "cooperative"),
        "precision": planned.precision, "pass": which, "warps": planned.warps, "units": planned.units,
        "shared": compiled.metadata.shared, "shared_planned": planned.shared_bytes,
        "loads": _loads_in_loop(compiled.asm["ttgir"]),
    }  # fmt: skip
    return row | (_amd(compiled.asm["amdgcn"]) if spec.is_amd else _nvidia(compiled.asm["cubin"]))


def _compile(
    spec: DeviceSpec, backend: str, cell: str, H: int, B: int, dtype: torch.dtype, which: str, precision: str
) -> tuple[Any, int]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    family, arch = ("hip", spec.arch) if spec.is_amd else ("cuda", int(spec.arch.removeprefix("sm_")))
    target = GPUTarget(family, arch, spec.warp_size)
    stand_in: Any = SimpleNamespace(
        get_current_device=lambda: spec.arch,  # the key of Triton's cache of compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    driver.set_active(stand_in)
    kernels: list[tuple[Any, int]] = []  # and the pieces in which the exchanged state is multiplied
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernels.append((run(self, *args, warmup=True, **kwargs), len(kwargs.get("K_TILES", ()))))
        return kernels[-1][0]

    def spilled(compiled) -> int:
        return (_amd(compiled.asm["amdgcn"]) if spec.is_amd else _usage(compiled.asm["cubin"]))["spilled"]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    G, has_c = GATES[cell], cell == "lstm"
    h_0, c_0, W_hh = tensor(1, B, H), tensor(1, B, H) if has_c else None, tensor(1, G * H, H)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(DeviceSpec, "of", lambda _: spec),
        mock.patch("fastrnn.compiler.spilled_registers", spilled),
        mock.patch("fastrnn.planner.torch_precision", lambda: precision),
    ):
        outputs = launch.forward(cell, tensor(3, B, 1, G, H), W_hh, tensor(1, G * H), h_0, c_0, True, backend)
        if which == "backward":
            y, h_n, c_n, saved, c = outputs
            launch.backward(cell, y, h_n, c_n if has_c else None, W_hh, h_0, c_0, y, saved, c, False, False, backend)
    return kernels[-1]


def _loads_in_loop(ttgir: str) -> int:
    """tt.load operations inside the time loop (tiles, each with as many instructions as its layout takes)."""
    indent, loads = None, 0
    for line in ttgir.splitlines():
        depth = len(line) - len(line.lstrip())
        if indent is None and "scf.for" in line:
            indent = depth
        elif indent is not None and depth <= indent and line.strip().startswith("}"):
            indent = None
        elif indent is not None and re.search(r"tt\.load|buffer_load", line):
            loads += 1
    return loads


def _amd(assembly: str) -> dict[str, int]:
    def count(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    # Scalar registers spill to lanes of vector registers, not to memory: not counted.
    spilled = count("vgpr_spill_count")
    return {"registers": count("vgpr_count"), "spilled": spilled, "tensor_core": assembly.count("v_mfma")}


def _tool(cubin: bytes, tool: str, *flags: str) -> str:
    """What one of the NVIDIA tools that come with Triton says of a cubin."""
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *flags, file.name], capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> dict[str, int]:
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool(cubin, "cuobjdump", "-res-usage"))
    assert usage is not None
    return {"registers": int(usage[1]), "spilled": int(usage[2])}


def _nvidia(cubin: bytes) -> dict[str, int]:
    sass = _tool(cubin, "nvdisasm", "-c", "-hex")
    instructions, stalls, waits = _step_loop(sass)
    return _usage(cubin) | {
        "tensor_core": len(re.findall(r"\bHMMA|\bHGMMA", sass)),
        "loop_instructions": instructions, "cycles": stalls + 14 * waits,
    }  # fmt: skip


def _step_loop(sass: str) -> tuple[int, int, int]:
    """Instructions, stall counts and scoreboard waits of the longest loop, from the SASS control codes.

    The upper word of each 16-byte instruction holds them: stall cycles in 4 bits from bit 41, and from bit 52 six
    bits for the scoreboards that it waits on.
    """
    controls: list[tuple[int, bool]] = []
    labels: dict[str, int] = {}
    longest = (0, 0, 0)
    pending = ""
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(controls)
        elif start := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/", line):
            pending = start[1]
        elif pending and (upper := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            control = int(upper[1], 16) >> 41
            controls.append((control & 15, bool(control >> 11 & 63)))
            branch = re.search(r"BRA.*`\(\.(L_x_\d+)\)", pending)
            if branch and branch[1] in labels:
                loop = controls[labels[branch[1]] :]
                longest = max(longest, (len(loop), sum(s for s, _ in loop), sum(w for _, w in loop)))
            pending = ""
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=[a for a in SPECS if a != "interpreter"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cell", nargs="+", default=list(GATES))
    parser.add_argument("--hidden", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--precision", nargs="+", default=["ieee", "tf32"], help="of float32")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    for arch, cell, hidden, dtype in itertools.product(args.arch, args.cell, args.hidden, args.dtype):
        for precision, which in itertools.product(args.precision if dtype == "float32" else ["ieee"], PASSES):
            if precision == "tf32" and not DeviceSpec.named(arch).has_tf32:
                continue
            try:
                row = compile_kernel(
                    arch, args.backend, cell, hidden, args.batch, getattr(torch, dtype), which, precision
                )
            except (NotImplementedError, ValueError) as missing:
                row = {"arch": arch, "cell": cell, "hidden": hidden, "dtype": dtype, "missing": str(missing)}
            print(json.dumps(row) if args.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
