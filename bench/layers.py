"""Measure whole layers beside torch.nn's (cuDNN) in milliseconds, in one process, after our kernels were compiled.

    python -m bench.layers bfloat16 float16 float32 segments shapes --out FILE

T = 1024. float32 is torch's default for RNNs, tf32. forward is without gradients, train with those of the input and
all parameters. Ragged batches are packed for torch.nn, and with resets its rows are cut into episodes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton

from fastrnn import plan
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import launches
from tests.support.cases import Case

from . import prepare
from .adapters import IMPLEMENTATIONS, Built, ours
from .processes import Log, options
from .stages import Record
from .workload import Data, Workload

T = 1024
NAMES = {"ours": "fastrnn auto", "nn": "torch.nn"}
Rows = list[Workload]


def _over_h(dtype: str, sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> Rows:
    return [Workload("layers", cell, Case(T, 16, H, 1), dtype) for H in sizes for cell in ("lstm", "gru")]


def _bf16(cell: str, B: int, H: int, D: int = 1, **how: Any) -> Workload:
    return Workload("layers", cell, Case(T, B, H, D), "bfloat16", **how)


GROUPS: dict[str, Rows] = {
    "float16": _over_h("float16"),
    "bfloat16": _over_h("bfloat16"),
    "float32": _over_h("float32", (64, 128, 256, 512)),
    "segments": [
        *(_bf16("lstm", 64, 128, kind=kind) for kind in ("ragged", "reset")),
        *(_bf16("gru", 32, 512, kind=kind) for kind in ("ragged", "reset")),
        _bf16("lstm", 64, 256, 2, layers=2, kind="ragged"),
    ],
    "shapes": [
        *(_bf16("lstm", B, H) for B in (64, 256) for H in (128, 512)),
        _bf16("lstm", 16, 2048), _bf16("gru", 16, 2048), _bf16("rnn_tanh", 16, 256), _bf16("rnn_tanh", 16, 1024),
        _bf16("lstm", 16, 256, layers=4), _bf16("lstm", 16, 256, 2),
    ],
}  # fmt: skip
DRY = [Workload("layers", "gru", Case(4, 2, 8, 1), "float32", kind="ragged")]


def key(workload: Workload) -> Record:
    _, B, H, D = workload.shape
    name = workload.nn()[0]
    found = {"cell": name, "H": H, "B": B, "T": workload.shape.T, "dtype": workload.dtype, "layers": workload.layers}
    return found | {"bi": D == 2, "kind": workload.kind}


def call_of(built: Built, data: Data, which: str) -> Callable[[], object]:
    """A forward pass without gradients, or with those of the input and all parameters."""
    if which == "fwd":
        return torch.no_grad()(lambda: built.call(data.input))
    input = data.input.detach().requires_grad_()
    return lambda: torch.autograd.grad(built.call(input), [input, *built.leaves], data.dy)


def compiled(workload: Workload, arch: str) -> str | None:
    """Compile what our layer launches; the tier, or None where torch's kernel runs or something fails."""
    T, B, H, D = workload.shape
    short = Workload(**{**vars(workload), "shape": Case(4, B, H, D)})
    try:
        data = Data(short, "cpu")
        sizes = {"hidden_size": H, "batch_size": B, "seq_len": T, "directions": D}
        tier = plan(workload.cell, **sizes, dtype=data.input.dtype, device=arch).backend
        with launches(DeviceSpec.named(arch)):
            built = ours(tier)(data)
            for which in ("fwd", "train"):
                call_of(built, data, which)()
    except Exception:  # it is compiled where it is measured, and fails there
        return None
    return tier


def timed(workload: Workload, dry: bool) -> Record:
    """Return both libraries' times, and ours over torch.nn's."""
    found: Record = {}
    data = Data(workload, "cpu" if dry else "cuda")
    for short, name in NAMES.items():
        try:
            built = IMPLEMENTATIONS[name](data)
            found |= {f"{short}_{which}": prepare.median_ms(call_of(built, data, which)) for which in ("fwd", "train")}
        except Exception as error:
            found[f"{short}_error"] = f"{type(error).__name__}: {str(error)[:300]}"
    for which in ("fwd", "train"):
        ours, nn = (found.get(f"{short}_{which}") for short in NAMES)
        if ours and nn:
            found[f"x_{which}"] = round(nn / ours, 2)
    return found


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("groups", nargs="+", choices=list(GROUPS), help="dtypes, or segments, or shapes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    log = Log(args.out, args.seconds)
    chosen = DRY if args.dry_run else [w for group in args.groups for w in GROUPS[group]]
    todo = [w for w in chosen if log.lacks(key(w))]
    arch = "sm_90" if args.dry_run else prepare.spec(False).arch
    prepare.warm_up(args.dry_run)
    with prepare.side_by_side(compiled, [(w, arch) for w in todo]) as tiers:
        for workload in log.each(todo, key):
            tier = next(tiers)
            found = timed(workload, args.dry_run)
            log.add(key(workload) | {"backend": tier} | found | {"triton": triton.__version__})


if __name__ == "__main__":
    main()
