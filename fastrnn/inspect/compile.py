"""Compile for any architecture without a GPU: the launcher runs as it would on one, up to the launch itself.

`launches(spec)` puts a stand-in in place of Triton's driver, so that whatever fastrnn launches inside the block is
compiled for spec, from the launcher's own arguments, and handed on as a Launch instead of being run:

    with launches(DeviceSpec.named("sm_90")) as found:
        fastrnn.ops.recurrence("gru", x_gates, W_hh, b_hh, h_0, None, backend="resident")
    found[0].asm["ptx"]

`compile_problem` does this for a Problem, with tensors of its own. Triton caches compiled kernels, on disk. Where
kernels are interpreted (TRITON_INTERPRET=1) there is nothing to compile: use a process of its own.

Triton's internals used (the active driver, JITFunction.run, CompiledKernel.asm and .metadata) were read in 3.9.0.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..cells import CELLS
from ..compat import interpreter
from ..device import DeviceSpec
from ..ops import launch
from ..ops.schema import Args, BackwardArgs
from ..planning.kernel_plan import Request
from ..planning.planner import Plan, plan, torch_precision

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Launch:
    """A kernel compiled for a launch that a stand-in took the place of."""

    name: str  # "forward" or "backward"
    spec: DeviceSpec
    asm: Mapping[str, Any]  # ttir, ttgir, llir, ptx and cubin, or amdgcn and hsaco
    grid: tuple[int, int, int]
    warps: int
    ctas: int  # in a cluster
    shared_bytes: int  # dynamic, a program
    arguments: dict[str, Tensor | int]  # by dotted names, in the kernel's order: what is not None or a constant
    constants: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A recurrence to compile: sizes, and which kernel; the seed is that of the tensors."""

    cell: str
    hidden_size: int
    batch_size: int = 16
    seq_len: int = 3
    directions: int = 1
    dtype: torch.dtype = torch.bfloat16
    arch: str = "sm_90"
    backend: str = "auto"
    precision: str = "ieee"
    num_heads: int = 1
    seed: int = 0

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec.named(self.arch)

    @property
    def request(self) -> Request:
        """Return the request that the planner gets."""
        sizes = (self.hidden_size // self.num_heads, self.batch_size, self.directions, self.num_heads)
        return Request(self.cell, *sizes, self.dtype, self.precision, self.spec)

    def plan(self) -> Plan:
        """The plan; raises as `fastrnn.plan` does, and NotImplementedError where "auto" takes torch's own kernel."""
        chosen = plan(
            self.cell,
            hidden_size=self.hidden_size,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            directions=self.directions,
            dtype=self.dtype,
            device=self.spec,
            backend=self.backend,
            precision=self.precision,
            num_heads=self.num_heads,
        )
        if chosen.kernel is None:
            raise NotImplementedError(chosen.why)
        return chosen

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """Make random inputs of both passes: standard normal, but W_hh and b_hh as torch.nn initializes them."""
        generator = torch.Generator().manual_seed(self.seed)
        cell, N = CELLS[self.cell], self.num_heads
        T, B, D, H, G, P = (
            self.seq_len, self.batch_size, self.directions, self.hidden_size, cell.gates, len(cell.states),
        )  # fmt: skip
        R, K, of_states = D * N, H // N, cell.state_dtype(self.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        def uniform(*shape: int) -> Tensor:
            return ((2 * torch.rand(shape, generator=generator) - 1) / H**0.5).to(device, self.dtype)

        made = {
            "x_gates": normal(T, B, R, G, K),
            "W_hh": uniform(R, G * K, K),
            "b_hh": uniform(R, G * K),
            "state_0": normal(P, D, B, H).tanh().to(of_states),
            "dy": normal(T, B, R, K),
            "d_finals": normal(P, D, B, H).to(of_states),
        }
        if "n" in cell.states:  # a sum of what is positive
            made["state_0"][cell.states.index("n")].abs_().add_(0.5)
        return made


@dataclass(frozen=True)
class Compiled:
    """A problem's plan, its launches by pass, and what the launcher returned: values only if the launches were run."""

    plan: Plan
    launches: dict[str, Launch]
    tensors: dict[str, Tensor]
    outputs: dict[str, Tensor]


def compile_problem(
    problem: Problem, passes: tuple[str, ...] = PASSES, run: Callable[[Launch], object] | None = None
) -> Compiled:
    """Compile forward, and backward if it is asked for, through the launcher; run, if given, executes each launch.

    Raises as `Problem.plan` does.
    """
    planned = problem.plan()
    tensors = problem.tensors()
    with launches(problem.spec, run, problem.precision) as found:
        outputs = call_forward(problem.cell, tensors, planned.backend)
        if "backward" in passes:
            outputs |= call_backward(problem.cell, tensors, outputs, planned.backend, needs_sums=run is not None)
    return Compiled(planned, {launch.name: launch for launch in found}, tensors, outputs)


def call_forward(cell: str, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The launcher's forward on a problem's tensors, its outputs by name."""
    inputs: dict[str, Any] = {name: tensors[name] for name in ("x_gates", "W_hh", "b_hh", "state_0")}
    return launch.forward(Args(**inputs, cell=cell, save=True, backend=backend, heads=_heads(tensors)))._asdict()


def call_backward(
    cell: str, tensors: dict[str, Tensor], outputs: dict[str, Tensor], backend: str, needs_sums: bool
) -> dict[str, Tensor]:
    """The launcher's backward after its forward, gradients by name; needs_sums asks for dW_hh and db_hh too."""
    inputs: dict[str, Any] = {name: tensors[name] for name in ("dy", "d_finals", "W_hh", "state_0")}
    kept: dict[str, Any] = {name: outputs[name] for name in ("y", "saved", "steps")}
    args = BackwardArgs(
        **inputs, **kept, d_steps=None, cell=cell, needs_dW=needs_sums, needs_db=needs_sums, backend=backend,
        heads=_heads(tensors),
    )  # fmt: skip
    return launch.backward(args)._asdict()


def _heads(tensors: dict[str, Tensor]) -> int:
    return tensors["state_0"].shape[-1] // tensors["W_hh"].shape[-1]


def members(name: str, given: Any) -> Iterator[tuple[str, Any]]:
    """What a kernel's parameter holds, by dotted names: of a group of pointers each of them."""
    if not isinstance(given, tuple):
        yield name, given
        return
    for field, member in zip(getattr(given, "_fields", range(len(given))), given, strict=True):
        yield from members(f"{name}.{field}", member)


@contextmanager
def launches(
    spec: DeviceSpec, run: Callable[[Launch], object] | None = None, precision: str | None = None
) -> Iterator[list[Launch]]:
    """Compile for spec what is launched inside the block, on CPU tensors; run, if given, executes each launch."""
    if interpreter.ENABLED:
        raise RuntimeError("kernels are interpreted here (TRITON_INTERPRET=1): compile them in another process")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from . import resources

    family, arch = ("hip", spec.arch) if spec.is_amd else ("cuda", int(spec.arch.removeprefix("sm_")))
    target = GPUTarget(family, arch, spec.warp_size)
    stand_in: Any = SimpleNamespace(
        get_current_device=lambda: spec.arch,  # the key of Triton's cache of compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    found: list[Launch] = []
    compile_and_launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled: Any = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        if not warmup:
            given = dict(zip(self.arg_names, args, strict=False)) | options
            programs = (*grid, 1, 1)
            fixed = {name for name, kind in compiled.src.signature.items() if kind == "constexpr"}
            passed = [pair for name in self.arg_names if name not in fixed for pair in members(name, given[name])]
            stopped = Launch(
                name=self.__name__,
                spec=spec,
                asm=compiled.asm,
                grid=(programs[0], programs[1], programs[2]),
                warps=compiled.metadata.num_warps,
                ctas=compiled.metadata.num_ctas,
                shared_bytes=compiled.metadata.shared,
                arguments={name: value for name, value in passed if value is not None},
                constants={name: given[name] for name in self.arg_names if name in fixed},
            )
            found.append(stopped)
            if run is not None:
                run(stopped)
        return compiled

    with (
        mock.patch.object(driver, "_active", stand_in),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(DeviceSpec, "of", lambda _: spec),
        mock.patch("fastrnn.compat.spills.spilled_registers", lambda compiled: resources.spill_bytes(compiled.asm)),
        mock.patch("fastrnn.planning.planner.torch_precision", lambda: precision or torch_precision()),
    ):
        yield found
