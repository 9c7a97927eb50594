"""What is installed, which device is here, and which backends it can run, with the reason where it cannot."""

import importlib.util
import platform
import shutil
from collections.abc import Iterator

import torch

from .. import __version__
from ..compat import interpreter, spills
from ..device import DeviceSpec
from ..planning.planner import plan
from ..planning.tiers import TIERS

# A size that each tier holds on every architecture: whether a tier can run at all, not how far it goes.
HELD = {"resident": 64, "cluster": 256, "cooperative": 256}


def diagnosis() -> Iterator[tuple[str, str]]:
    """Yield (what, what was found) of this machine, line by line."""
    yield "fastrnn", __version__
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'})"
    yield "triton", _triton()
    yield "gluon", gluon()
    yield "interpreter", "on (TRITON_INTERPRET=1): kernels run on CPU tensors" if interpreter.ENABLED else "off"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        yield "device", f"{found.name}, {found.multi_processor_count} multiprocessors"
    else:
        yield "device", "no GPU that torch can use"
    said: dict[str, str] = {}  # the tier that gave a reason first
    for tier in TIERS:
        found = usable(tier, device)
        first = said.setdefault(found, tier)
        yield f"backend {tier}", found if first == tier or found == "usable" else f"not usable, as {first}"
    yield "backend cpu", of_cpu()
    yield "backend torch", "usable"
    yield "backend reference", "usable"
    yield "inspect", _inspect()


def gluon() -> str:
    """Say which kernels in Gluon, Triton's lower-level dialect, the installed Triton compiles."""
    if importlib.util.find_spec("triton") is None:
        return "missing, as Triton"
    if spills.triton_version() < (3, 6):
        return "needs Triton 3.6 or newer; kernels in tile Triton take its place"
    return "usable" if spills.triton_version() >= (3, 8) else "usable, but for clusters: they need Triton 3.8 or newer"


def usable(tier: str, device: torch.device) -> str:
    """ "usable", or why a tier cannot run on a device.

    >>> usable("resident", torch.device("meta")).split(":")[0]
    'not usable'
    """
    if importlib.util.find_spec("triton") is None:
        return "not usable: Triton is missing (it comes with torch on Linux with a GPU, or pip install triton)"
    try:
        spec = DeviceSpec.of(device)
        plan("lstm", hidden_size=HELD[tier], batch_size=1, dtype=torch.float16, device=spec, backend=tier)
    except (NotImplementedError, ValueError) as reason:
        return f"not usable: {reason}"
    return "usable"


def of_cpu() -> str:
    """ "usable", or why the backend for CPU tensors cannot run.

    >>> of_cpu().split(":")[0] in ("usable", "not usable")
    True
    """
    try:
        plan("gru", hidden_size=64, batch_size=1, dtype=torch.float32, device="cpu", backend="cpu")
    except (NotImplementedError, ValueError) as reason:
        return f"not usable: {reason}"
    return "usable"


def _inspect() -> str:
    missing = []
    if importlib.util.find_spec("triton") is None:
        missing.append("Triton, to compile")
    if importlib.util.find_spec("rich") is None:
        missing.append("rich, for tables (pip install rich)")
    if shutil.which("gcc") is None:
        missing.append("gcc, for --execute")
    return f"missing: {'; '.join(missing)}" if missing else "usable"


def _triton() -> str:
    """The version of the Triton that is imported: a folder on the path, unpacked by hand, has no metadata."""
    try:
        import triton
    except ImportError:
        return "missing"
    return triton.__version__
