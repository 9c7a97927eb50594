"""Choose the kernel, its tiles and its launch for a recurrence, and say why: a pure function of sizes and a device."""

import functools
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec

import torch

from ..cells import CELLS
from ..compat import driver
from ..device import SPECS, DeviceSpec
from . import cluster, cpu, tuning
from .arguments import as_int, check_checkpoint_every, check_clips, check_heads, check_share, expect
from .kernel_plan import GridTooLargeError, KernelPlan, Request, saved_bytes
from .plans import Plan
from .prices import Work, of_all, price_of_kernel, price_of_torch
from .tiers import KERNELS, TIERS

# What torch.backends.cudnn.rnn.fp32_precision asks, behind 1.4 us of Python (torch 2.13); torch.compile knows that one.
_PRECISION = getattr(torch._C, "_get_fp32_precision_getter", None)
# Asked on import: torch.compile cannot trace the question before torch 2.12.
_HAS_TRITON = find_spec("triton") is not None
BACKENDS = ("auto", "torch", "reference", *KERNELS)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Steps, for each layer of a stack, of the shortest chunk that a wavefront runs. Python issues a layer's chunk in 0.25
# ms forward and 0.7 backward (measured with stubs for kernels, one core of a Xeon, torch 2.13), and kernels are
# modelled at 1 to 3 us a step: with shorter chunks the streams would wait for Python. A chunk also reads W_hh again.
CHUNK_STEPS_PER_LAYER = 256
# Of the least price: within it the fewest programs are taken, since prices are no more exact.
NEAR = 1.05


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
    num_layers: int = 1,
    checkpoint_every: int | None = None,
    num_heads: int = 1,
    clip_grad_state: float | None = None,
    clip_state: float | None = None,
    zoneout: float = 0.0,
    training: bool = True,
) -> Plan:
    """Return the kernel that would run for a layer, its tiles, and the reason. No GPU is needed.

    Args:
        cell (str): "lstm", "gru", "rnn_tanh", "rnn_relu", "slstm", or a cell that `fastrnn.cells.register` added.
        hidden_size (int): H, the units of one layer.
        batch_size (int): B, in sequences.
        seq_len (int): T, in time steps. Prices depend on it, because a launch costs less a step over many steps.
        directions (int): D, 1 or 2.
        dtype (torch.dtype): The dtype to compute in. Kernels take float32, bfloat16 and float16.
        device (str | torch.device | DeviceSpec | None): An architecture ("sm_90", "gfx942"), a torch device, or None
            for the current GPU.
        backend (str): "auto" takes the cheapest of the tiers that can run and of torch's own kernel, or the first tier
            where no price is known. CPU tensors take "cpu" or torch's, by measured price. The other values are
            those of `fastrnn.LSTM`.
        precision (str | None): "ieee" or "tf32" for products of float32. None is torch's setting for RNNs.
        num_layers (int): The number of stacked layers, which may run as a wavefront.
        checkpoint_every (int | None): As in `fastrnn.LSTM`.
        num_heads (int): N, a divisor of H. Heads are recurrences of H / N units. D * N of them run in one launch.
        clip_grad_state (float | None): As in `fastrnn.LSTM`.
        clip_state (float | None): As in `fastrnn.LSTM`.
        zoneout (float): As in `fastrnn.LSTM`.
        training (bool): Whether the price includes backward.

    Returns:
        Plan: The backend, the reason, and the kernel's launch. Sizes are in bytes. Prices are microseconds of T steps,
            measured, simulated or reckoned.

    Raises:
        ValueError: A name is unknown, a size is below 1, or one batch tile has more programs than the device runs at
            once.
        NotImplementedError: A named backend cannot run this. The message names what is missing.

    For cells that torch lacks, and for heads, clips and zoneout, "auto" takes "reference" in place of "torch", or
    "cpu" on CPU tensors.

    Examples:
        >>> import torch, fastrnn
        >>> sizes = {"hidden_size": 128, "batch_size": 64, "seq_len": 1000}
        >>> print(fastrnn.plan("lstm", **sizes, dtype=torch.bfloat16, device="sm_80"))
        lstm, T=1000, B=64, H=128, bfloat16, on sm_80: backend resident
          why       W_hh fits one program
          kernel    Gluon, 8 warps a program
          programs  8 = 8 batch tile(s) of 8 rows x 1 direction(s)
          on chip   128 KiB of W_hh a program in registers and shared memory; shared memory: 152 KiB of 163 KiB
          math      products of bfloat16, summed in fp32; activations: tanh.approx
          saved     78.1 MiB for backward, nothing for inference
          price     us a step, forward and backward: resident 2.31 (simulated), ..., torch 29.5 (reckoned)
    """
    expect("cell", cell, tuple(CELLS))
    expect("backend", backend, BACKENDS)
    expect("precision", precision, ("ieee", "tf32", None))
    expect("directions", directions, (1, 2))
    hidden_size, batch_size, seq_len, num_layers, directions, checkpoint_every, num_heads = map(
        as_int, (hidden_size, batch_size, seq_len, num_layers, directions, checkpoint_every, num_heads)
    )
    sizes = {"hidden_size": hidden_size, "batch_size": batch_size, "seq_len": seq_len, "num_layers": num_layers}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive int, got {size!r}")
    check_heads(num_heads, hidden_size)
    check_clips(clip_grad_state=clip_grad_state, clip_state=clip_state)
    check_share("zoneout", zoneout)
    check_checkpoint_every(checkpoint_every)
    where = device.arch if isinstance(device, DeviceSpec) else str(device or "the current GPU")
    steps = min(seq_len, checkpoint_every or seq_len)  # of one launch that saves for backward
    problem = functools.partial(
        Plan, cell, hidden_size, batch_size, seq_len, directions, dtype, num_layers=num_layers,
        checkpoint_every=checkpoint_every, num_heads=num_heads, training=training,
    )  # fmt: skip
    clips = clip_grad_state is not None or clip_state is not None
    lacks = {f"for the cell {cell!r}": not CELLS[cell].of_torch, "with heads": num_heads > 1, "that clips": clips,
             "with zoneout": bool(zoneout)}  # fmt: skip
    lacking = next((what for what, is_so in lacks.items() if is_so), "")
    of_torch = not lacking
    if backend == "torch" and not of_torch:
        raise NotImplementedError(f"backend='torch': torch has no kernel {lacking}")
    if backend in ("torch", "reference"):
        return problem(where, backend, "asked for")
    fallback = "torch" if of_torch else "reference"
    if backend == cpu.NAME:
        cpu.spec(dtype, None if device is None else where)
        return problem("cpu", backend, "asked for")
    if backend == "auto" and where == "cpu":
        sizes_on_cpu = seq_len, batch_size, hidden_size
        return problem(where, *cpu.choose(cell, sizes_on_cpu, dtype, lacking, training=training))
    try:
        if not _HAS_TRITON:
            raise NotImplementedError("fastrnn's kernels are written in Triton, which is missing here")
        spec = _spec(device)
        if dtype not in KERNEL_DTYPES:
            raise NotImplementedError(f"a kernel for {dtype} is missing; there are float32, bfloat16 and float16")
        precision = precision or torch_precision()
        reasons = {}
        sizes = (hidden_size // num_heads, batch_size, directions, num_heads)
        request = Request(cell, *sizes, dtype, precision, spec)
        work = Work(seq_len, training, num_layers)
        kernels, candidates = {}, []
        for tier in TIERS if backend == "auto" else (backend,):
            try:
                kernels[tier] = kernel_for(request, tier)
                if backend == "auto" and driver.refused:
                    why_not = driver.refused.get(driver.key(cell, hidden_size, dtype, kernels[tier], spec))
                    if why_not is not None:
                        del kernels[tier]
                        raise NotImplementedError(why_not)
                candidates.append(price_of_kernel(tier, kernels[tier], request, work))
            except (NotImplementedError, GridTooLargeError) as reason:
                if backend != "auto":
                    hint = _more_heads(hidden_size, request, (backend,))
                    raise type(reason)("; ".join([reason.args[0], *hint])) from None
                reasons[tier] = f"{tier}: {reason.args[0]}"  # torch.compile joins no text of an exception itself
        priced = [price for price in candidates if price is not None]
        if backend == "auto" and of_torch and (priced or not kernels):
            priced += [price for price in [price_of_torch(request, work)] if price is not None]
        priced.sort(key=of_all)
        if kernels:
            near = [price.backend for price in priced if price.us <= NEAR * priced[0].us] or list(kernels)
            tier = next(name for name in (*TIERS, "torch") if name in near)
            if not priced and backend == "auto" and of_torch and kernels[tier].parts > 1:
                reasons[tier] = f"{tier}: takes {kernels[tier].parts} launches, and no price of it is known"
                tier = "torch"
            against = []
            for name in (*TIERS, "torch"):
                if name == tier:
                    break
                against.append(reasons.get(name, f"{name}: takes more time"))
            if tier == "torch":
                return problem(where, tier, "; ".join(against), prices=tuple(priced))
            why = "; ".join([*(against if backend == "auto" else ()), TIERS[tier].why])
            kernel = replace(kernels[tier], saved_bytes=saved_bytes(request, steps))
            found = problem(spec.arch, tier, why, kernel, prices=tuple(priced))
            chunk, order = _wavefront(found, spec)
            return replace(found, wavefront=chunk, order=order)
        why = "; ".join([*reasons.values(), *_more_heads(hidden_size, request, TIERS)])
        return problem(where, fallback, why, prices=tuple(priced))
    except (NotImplementedError, GridTooLargeError) as reason:
        if backend == "auto":
            return problem(where, fallback, str(reason))
        raise type(reason)(f"backend={backend!r}: {reason}") from None


def _more_heads(H: int, request: Request, tiers: Iterable[str]) -> list[str]:
    """The fewest heads, more than those that no tier holds, of which one does: as a hint, where W_hh is in heads."""
    for N in range(request.N + 1, H + 1 if request.N > 1 else 0):
        if H % N == 0:
            for tier in tiers:
                try:
                    kernel_for(request._replace(H=H // N, N=N), tier)
                except (NotImplementedError, GridTooLargeError):
                    continue
                return [f"heads of {H // N} units would fit: num_heads={N}"]
    return []


def kernel_for(request: Request, tier: str) -> KernelPlan:
    """How a tier's kernel is launched for a request; raises NotImplementedError, naming what is missing."""
    return tuning.ordered(TIERS[tier].plan(request), request)


def _wavefront(found: Plan, spec: DeviceSpec) -> tuple[int | None, str]:
    """Steps of a chunk if a stack should run as a wavefront, None if not, and why; reckoned, not measured."""
    L, T, kernel = found.num_layers, found.seq_len, found.kernel
    assert kernel is not None
    if L == 1:
        return None, ""
    if found.directions == 2:
        return None, "a bidirectional layer needs all of the one below"
    if spec.arch == "interpreter":
        return None, "the interpreter has no streams"
    # A program has a multiprocessor to itself; a cooperative launch must, since its programs wait for each other.
    if not cluster.run_at_once(kernel, spec, L):
        clustered = f" in clusters of {kernel.ctas}" if kernel.ctas > 1 else ""
        many = f"{L} x {kernel.programs} programs{clustered}"
        return None, f"{many} do not fit {spec.multiprocessors} multiprocessors at once"
    shortest = CHUNK_STEPS_PER_LAYER * L
    # Filling and draining takes L - 1 chunks: an eighth of the time, unless chunks would be too short.
    chunks = max(1, min(8 * (L - 1), T // shortest))
    K = found.checkpoint_every or -(-T // chunks)
    if found.checkpoint_every and shortest > K:
        return None, f"chunks of {K} steps are over before Python has issued the others; {shortest} would do"
    steps = T + (L - 1) * K
    if steps * 5 > L * T * 4:
        return None, f"it would take {steps} steps of time instead of {L * T}, too little for more launches"
    return K, f"{steps} steps of time instead of {L * T}, not measured"


def _spec(device: "str | torch.device | DeviceSpec | None") -> DeviceSpec:
    if isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str) and device.startswith(("sm_", "gfx")):
        return DeviceSpec.named(device)
    if device is None and not torch.cuda.is_available():
        raise ValueError("device: expected an architecture such as 'sm_90', since there is no GPU here; got None")
    try:
        found = torch.device(device or "cuda")
    except RuntimeError:
        raise ValueError(
            f"device: expected an architecture ({', '.join(SPECS)}) or a torch device; got {device!r}"
        ) from None
    return DeviceSpec.of(found)


def torch_precision() -> str:
    """Return the precision of fp32 recurrent products by torch's setting for RNNs ("tf32" unless changed).

    Source: torch.backends.cudnn.rnn.fp32_precision, before torch 2.9 torch.backends.cudnn.allow_tf32.
    """
    if _PRECISION is not None and not torch.compiler.is_compiling():
        setting = _PRECISION("cuda", "rnn")
    else:
        setting = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    allowed = torch.backends.cudnn.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "ieee"
