"""Which kernel runs a recurrence, in which tiles, and why: pure functions from shapes and a DeviceSpec to a Plan.

Every threshold is what compiled without spilling for all nine architectures in Triton 3.9.0; tests/test_codegen.py
compiles the table again. Cycles are modelled, not measured (`python -m bench.cross_compile`).
"""

import functools
from dataclasses import dataclass

import torch

from .device import DeviceSpec
from .reference import GATES

BACKENDS = ("auto", "torch", "reference", "resident")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KIB = 1024


@dataclass(frozen=True)
class KernelPlan:
    """How a persistent kernel is launched: tiles, warps, programs, and where W_hh stays."""

    dialect: str
    block_b: int
    block_h: int
    warps: int
    max_registers: int | None  # a thread; None leaves it to the compiler
    programs: int
    precision: str  # of fp32 products, as Triton's input_precision: "ieee" or "tf32"
    weight_bytes: int  # of W_hh in one program, padding included
    weight_place: str
    shared_bytes: int  # upper bound for one program
    saved_bytes: int  # kept for backward


@dataclass(frozen=True)
class Plan:
    """What would run: a backend, the reason, and the kernel's launch if it is one of ours."""

    cell: str
    hidden_size: int
    batch_size: int
    seq_len: int
    directions: int
    dtype: torch.dtype
    device: str
    backend: str
    why: str
    kernel: KernelPlan | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"T={self.seq_len}, B={self.batch_size}, H={self.hidden_size}"
        rows = {"why": self.why}
        if k := self.kernel:
            directions = f"{self.directions} direction{'s' if self.directions > 1 else ''}"
            rows |= {
                "kernel": f"{k.dialect}, {k.warps} warps a program, forward and backward",
                "programs": f"{k.programs} (batch tiles of {k.block_b} rows x {directions})",
                "on chip": f"{_kib(k.weight_bytes)} of W_hh in {k.weight_place}; {_kib(k.shared_bytes)} shared in all",
                "products": f"{k.precision if self.dtype == torch.float32 else dtype}, summed in fp32",
                "saved": f"{_kib(k.saved_bytes)} for backward, nothing for inference",
            }
        head = f"{self.cell}, {shape}, {dtype}, on {self.device}: backend {self.backend}"
        return "\n".join([head, *(f"  {key:<9} {value}" for key, value in rows.items())])


def _kib(size: int) -> str:
    return f"{size / KIB:,.0f} KiB" if size < 1024 * KIB else f"{size / KIB**2:,.1f} MiB"


def plan(
    cell: str,
    *,
    hidden_size: int,
    batch_size: int,
    seq_len: int = 1,
    directions: int = 1,
    dtype: torch.dtype = torch.float32,
    device: "str | torch.device | DeviceSpec | None" = None,
    backend: str = "auto",
    precision: str | None = None,
    needs: tuple[str, ...] = (),
) -> Plan:
    """Say which kernel would run a recurrence, in which tiles, and why; no GPU is needed.

    cell is "lstm", "gru", "rnn_tanh" or "rnn_relu"; hidden_size (H), batch_size (B), seq_len (T) and directions (D, 1
    or 2) are those of one layer; device is an architecture ("sm_90", "gfx942"), a torch device, or None for the
    current GPU; precision is "ieee" or "tf32" for float32 and defaults to torch's own setting for RNNs; needs names
    features that the call uses beside a plain recurrence. Sizes in the Plan are bytes.

    Raises ValueError for an unknown cell, backend, device or a size below 1, and NotImplementedError, naming what is
    missing, if backend="resident" cannot run this; "auto" then plans torch's own kernel and keeps the reason, as it
    does for CPU tensors.

    >>> import torch, fastrnn
    >>> print(fastrnn.plan("lstm", hidden_size=128, batch_size=64, seq_len=1000, dtype=torch.bfloat16, device="sm_90"))
    lstm, T=1000, B=64, H=128, bfloat16, on sm_90: backend resident
      why       W_hh fits one program: 128 KiB of at most 227 KiB
      kernel    tile Triton, 16 warps a program, forward and backward
      programs  4 (batch tiles of 16 rows x 1 direction)
      on chip   128 KiB of W_hh in shared memory; 160 KiB shared in all
      products  bfloat16, summed in fp32
      saved     78.1 MiB for backward, nothing for inference
    """
    _expect("cell", cell, tuple(GATES))
    _expect("backend", backend, BACKENDS)
    _expect("precision", precision, ("ieee", "tf32", None))
    _expect("directions", directions, (1, 2))
    for name, size in (("hidden_size", hidden_size), ("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive int, got {size!r}")
    where = device.arch if isinstance(device, DeviceSpec) else str(device or "the current GPU")
    problem = functools.partial(Plan, cell, hidden_size, batch_size, seq_len, directions, dtype)
    if backend == "reference" and needs:
        raise NotImplementedError(f"backend='reference' with {' and '.join(needs)} is missing")
    if backend in ("torch", "reference"):
        return problem(where, backend, "asked for")
    if backend == "auto" and where == "cpu":
        return problem(where, "torch", "CPU tensors take torch's own kernel")
    try:
        if needs:
            raise NotImplementedError(f"a kernel with {' and '.join(needs)} is missing")
        spec = _spec(device)
        if dtype not in KERNEL_DTYPES:
            raise NotImplementedError(f"a kernel for {dtype} is missing; there are float32, bfloat16 and float16")
        precision = precision or torch_precision()
        kernel = _resident(cell, hidden_size, batch_size, seq_len, directions, dtype, precision, spec)
    except NotImplementedError as missing:
        if backend == "auto":
            return problem(where, "torch", str(missing))
        raise NotImplementedError(f"backend={backend!r}: {missing}") from None
    limit = _weight_limit(spec, dtype, kernel.precision)[0]
    why = f"W_hh fits one program: {_kib(kernel.weight_bytes)} of at most {_kib(limit)}"
    if spec.arch == "interpreter":
        why = "Triton's interpreter holds any W_hh"
    return problem(spec.arch, "resident", why, kernel)


def _expect(name: str, got: object, allowed: tuple) -> None:
    if got not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}; got {got!r}")


def _spec(device: "str | torch.device | DeviceSpec | None") -> DeviceSpec:
    if isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str) and device.startswith(("sm_", "gfx")):
        return DeviceSpec.named(device)
    if device is None and not torch.cuda.is_available():
        raise ValueError("device: expected an architecture such as 'sm_90', since there is no GPU here; got None")
    return DeviceSpec.of(torch.device(device or "cuda"))


def torch_precision() -> str:
    """Triton's input_precision for fp32 recurrent products: torch's own setting for RNNs ("tf32" unless changed).

    Source: torch.backends.cudnn.rnn.fp32_precision, before torch 2.9 torch.backends.cudnn.allow_tf32.
    """
    setting = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    allowed = torch.backends.cudnn.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "ieee"


def _weight_limit(spec: DeviceSpec, dtype: torch.dtype, precision: str) -> tuple[int, str]:
    """The most bytes of W_hh that one program holds without spilling, and where."""
    if spec.arch == "interpreter":
        return spec.shared_bytes, "arrays"
    if spec.is_amd:  # an operand of a product stays in registers; above 64 KiB (LSTM, H=128) 200 and more spill
        return 64 * KIB, "registers"
    if dtype == torch.float32 and precision == "ieee":  # FMA products: GRU at H=128 (192 KiB) spills 880 bytes
        return min(64 * KIB, spec.shared_bytes), "shared memory"
    return spec.shared_bytes, "shared memory"


@functools.lru_cache(maxsize=1024)
def _resident(
    name: str, H: int, B: int, T: int, D: int, dtype: torch.dtype, precision: str, spec: DeviceSpec
) -> KernelPlan:
    try:
        from .kernels.cells import CELLS
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"fastrnn's kernels are written in Triton, which is missing here ({error})") from None
    cell, gates = CELLS[name], GATES[name]
    # Tensor cores take at least 16 rows. A batch tile of 32 was modelled at 1.6 times the cycles of 16 (LSTM, H=64,
    # sm_90, 2848 against 1745) and spilled at H=128: more programs serve a large batch.
    block_b = 16
    block_h = max(16, 1 << (H - 1).bit_length())  # tile Triton's ranges are powers of two
    precision = precision if spec.has_tf32 else "ieee"
    weight_bytes = gates * block_h**2 * dtype.itemsize
    # Beside W_hh, layout conversions pass through shared memory: at most one operand tile a gate.
    tiles = max(2, gates) * block_b * block_h * 4
    limit, place = _weight_limit(spec, dtype, precision)
    # On its way to registers W_hh passes through shared memory gate by gate, before the loop.
    shared_bytes = tiles + weight_bytes if place == "shared memory" else max(tiles, weight_bytes // gates)
    if weight_bytes > limit or shared_bytes > spec.shared_bytes:
        raise NotImplementedError(
            f"W_hh does not fit one program: {_kib(weight_bytes)} at H={H} (padded to {block_h}) of at most "
            f"{_kib(limit)} in {place} on {spec.arch}; the tiers that split W_hh over programs are missing"
        )
    # Modelled for sm_90, LSTM, bf16: at H=64 16 warps take 1745 cycles a step and 8 take 2131; at H=32 1807 and 1790.
    # AMD's four SIMDs hold 512 registers a lane at 4 warps, and 8 spill.
    warps = 4 if spec.is_amd else 16 if block_h >= 64 else 8
    # Left alone, ptxas keeps registers for a second program: it then spills 8 to 16 bytes of some fp32 kernels (FMA
    # products, and the small RNNs). Given all but 8 registers a thread it spills none of those, but 8 to 32 bytes of
    # the LSTM and GRU on tensor cores, which it leaves alone otherwise.
    fills_file = dtype == torch.float32 and (precision == "ieee" or gates == 1) and not spec.is_amd
    max_registers = min(255, spec.register_bytes // (4 * spec.warp_size * warps)) - 8
    return KernelPlan(
        dialect="tile Triton",
        block_b=block_b,
        block_h=block_h,
        warps=warps,
        max_registers=max_registers if fills_file else None,
        programs=-(-B // block_b) * D,
        precision=precision,
        weight_bytes=weight_bytes,
        weight_place=place,
        shared_bytes=shared_bytes,
        saved_bytes=T * B * D * H * (cell.saved + cell.has_c) * dtype.itemsize,
    )
