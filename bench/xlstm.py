"""Time xlstm's sLSTM cell by its own code and by ours, in milliseconds: forward, and with all gradients.

    python -m bench.xlstm --out FILE    512 units in 4 heads, T = 1024, B = 16

Where there is a GPU, on that, in bfloat16, beside its loop in torch and beside its CUDA kernels, which nvcc compiles at
first use; else on a CPU, in float32, T = 64, beside its loop. The input is the gates' products, as the cell takes it.
"""

import copy
from collections.abc import Iterator

import torch

import fastrnn

from . import clients, clock
from .clients import Call, Pair
from .processes import Log

SIZES = {"T": 1024, "B": 16, "H": 512, "heads": 4}  # its kernels' sizes are TiRex's, so that nvcc compiles them once
ON_CPU = SIZES | {"T": 64}
DRY = {"T": 5, "B": 2, "H": 16, "heads": 2}


def calls(sizes: dict[str, int], backend: str, which: str, device: str) -> dict[str, Call]:
    """One pass of both cells, with the same weights."""
    if backend == "cuda":
        clients.needs_nvcc()
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = sLSTMCellConfig(sizes["H"], sizes["heads"], backend=backend, recurrent_weight_init="standard")
    theirs = sLSTMCell(config).to(device, dtype)
    # Nothing that was compiled is copied: convert makes a class of this cell's ours, and leaves its parameters.
    ours = fastrnn.convert(copy.copy(theirs))
    x = torch.randn(sizes["B"], sizes["T"], 4 * sizes["H"], device=device, dtype=dtype, requires_grad=which == "train")
    dy = torch.randn(sizes["B"], sizes["heads"], sizes["T"], sizes["H"] // sizes["heads"], device=device, dtype=dtype)

    def call(cell: torch.nn.Module) -> clients.Results:
        if which == "train":
            return torch.autograd.grad(cell(x)[0], [x, *cell.parameters()], dy)
        with torch.no_grad():
            return (cell(x)[0],)

    return {"ours": lambda: call(ours), "theirs": lambda: call(theirs)}


def pairs(dry: bool) -> Iterator[Pair]:
    device = clients.device(dry)
    sizes = DRY if dry else SIZES if device == "cuda" else ON_CPU
    for backend in ("vanilla", "cuda") if device == "cuda" else ("vanilla",):
        for which in ("fwd", "train"):
            key = {"client": "xlstm", "theirs": backend, "on": device, "pass": which, **sizes}
            yield Pair(key, lambda how=(sizes, backend, which, device): calls(*how))


def main() -> None:
    args = clients.options(__doc__ or "").parse_args()
    log = Log(args.out, args.seconds)
    timer = clock.EventClock() if clients.device(args.dry_run) == "cuda" else clock.WallClock()
    clients.measure(log, pairs(args.dry_run), args, timer)


if __name__ == "__main__":
    main()
