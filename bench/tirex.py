"""Time a forecast by TiRex's architecture with random weights, by its own code and by ours, in milliseconds.

    python -m bench.tirex --out FILE    its size (12 blocks of 512 units in 4 heads), a context of 2048 weeks

Where there is a GPU, on that, in autocast's bfloat16, beside its loop in torch and beside xlstm's CUDA kernels, which
nvcc compiles at first use; else on a CPU, in float32, beside its loop. The series is statsmodels' co2, every week from
1958 to 2001; B series end 0, 1, 2... weeks before the last. Times are of the whole forecast, result on the CPU. No
weights are loaded: `load_model` is tirex-ts's.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor

import fastrnn

from . import clients, clock
from .clients import Call, Pair
from .processes import Log

CONTEXT, HORIZON, PATCH = 2048, 32, 32
QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
DRY = {"units": 16, "heads": 2, "blocks": 1, "context": 128}


def architecture(
    units: int = 512, heads: int = 4, blocks: int = 12, context: int = CONTEXT, backend: str = "torch"
) -> torch.nn.Module:
    """A TiRex of random weights; its constructor leaves those of its sLSTM layers as they were in memory."""
    from tirex import TiRexZero

    sizes = {"num_blocks": blocks, "embedding_dim": units, "num_heads": heads}
    patches = {"input_patch_size": PATCH, "output_patch_size": PATCH, "input_ff_dim": 2 * units}
    model = TiRexZero(backend, {**patches, "quantiles": QUANTILES, "block_kwargs": sizes}, train_ctx_len=context)
    for name, parameter in model.named_parameters():
        if ".slstm_layer." in name and "group_norm" not in name:
            torch.nn.init.normal_(parameter, std=1.0 if "_bias_" in name else (units / heads) ** -0.5)
    return model.eval()


def series(B: int, context: int = CONTEXT) -> Tensor:
    """(B, context) parts per million of carbon dioxide, missing weeks interpolated."""
    from statsmodels.datasets import co2

    weeks = torch.tensor(co2.load_pandas()["data"]["co2"].interpolate().to_numpy(), dtype=torch.float32)
    return torch.stack([weeks[len(weeks) - context - b : len(weeks) - b] for b in range(B)])


def forecast(model: torch.nn.Module, past: Tensor, halved: bool = False) -> Tensor:
    """Quantiles (B, HORIZON, 9); halved in autocast's bfloat16."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16) if halved else contextlib.nullcontext():
        quantiles, _ = model.forecast(context=past, prediction_length=HORIZON)  # type: ignore[operator]
    return quantiles


def calls(B: int, backend: str, device: str, sizes: dict[str, int]) -> dict[str, Call]:
    """Return both forecasts, with the same weights."""
    if backend == "cuda":
        clients.needs_nvcc()
    theirs = architecture(**sizes, backend=backend).to(device)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    past, halved = series(B, sizes.get("context", CONTEXT)), device == "cuda"
    return {"ours": lambda: (forecast(ours, past, halved),), "theirs": lambda: (forecast(theirs, past, halved),)}


def pairs(dry: bool) -> Iterator[Pair]:
    device, sizes = clients.device(dry), DRY if dry else {}
    for backend in ("torch", "cuda") if device == "cuda" else ("torch",):
        for B in (2,) if dry else (1, 16):
            key = {"client": "tirex", "theirs": backend, "on": device, "B": B}
            yield Pair(key, lambda how=(B, backend, device, sizes): calls(*how))


def main() -> None:
    args = clients.options(__doc__ or "").parse_args()
    log = Log(args.out, args.seconds)
    clients.measure(log, pairs(args.dry_run), args, clock.WallClock())


if __name__ == "__main__":
    main()
