"""Measured on this machine: TiRex's architecture, random weights, forecasts a real series by its own loop and by ours.

    python -m bench.tirex                 its size (12 blocks of 512 units in 4 heads), a context of 2048 weeks
    python -m bench.tirex --device cuda   the same on a GPU, in its bfloat16

The series is statsmodels' co2, every week from 1958 to 2001; B series end 0, 1, 2... weeks before the last. Times are
of the whole forecast, medians of rounds in which each runs once. No weights are loaded: `load_model` is tirex-ts's.
"""

import argparse
import contextlib
import copy
import statistics
import time
import warnings

import torch
from torch import Tensor

import fastrnn

CONTEXT, HORIZON, PATCH = 2048, 32, 32
QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def architecture(units: int = 512, heads: int = 4, blocks: int = 12, context: int = CONTEXT) -> torch.nn.Module:
    """A TiRex of random weights; its constructor leaves those of its sLSTM layers as they were in memory."""
    from tirex import TiRexZero

    sizes = {"num_blocks": blocks, "embedding_dim": units, "num_heads": heads}
    patches = {"input_patch_size": PATCH, "output_patch_size": PATCH, "input_ff_dim": 2 * units}
    model = TiRexZero("torch", {**patches, "quantiles": QUANTILES, "block_kwargs": sizes}, train_ctx_len=context)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other where others run, too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    theirs = architecture().to(args.device)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    where = f"{args.device}, threads: {args.threads}, torch {torch.__version__}"
    print(f"TiRex, {CONTEXT} weeks and {HORIZON} ahead, {where}")
    for B in (1, 16):
        past, seconds = series(B), {"tirex-ts": [], "fastrnn": []}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, model in (("tirex-ts", theirs), ("fastrnn", ours)):
                begin = time.perf_counter()
                forecast(model, past, halved=name == "fastrnn" and args.device == "cuda")  # copies to the CPU
                seconds[name].append(time.perf_counter() - begin)
        found = {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}
        print(f"B = {B}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in found.items()))


if __name__ == "__main__":
    main()
