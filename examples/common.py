"""What the examples share: arguments, one step of descent, files that are written whole or not at all, and Ctrl-C."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # of a bare checkout, where nothing is installed

import fastrnn
from fastrnn.planning.planner import BACKENDS

matplotlib.use("Agg")

LAYERS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """With the arguments that every example takes; doc is the example's docstring."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    help = "of the CPU; more gain little on small tensors, and wait for each other where cores are shared"
    made.add_argument("--threads", type=positive, default=1, help=help)
    made.add_argument("--backend", choices=BACKENDS, default="auto")
    made.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; torch takes seed and threads from them."""
    args = made.parse_args(argv)
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        made.error(
            f"--device {args.device}: expected cpu"
            + (" or cuda" if torch.cuda.is_available() else ", since torch sees no GPU here")
        )
    if args.out.exists() and not args.out.is_dir():
        made.error(f"--out {args.out}: expected a folder, got a file")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    return args


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 1.0) -> float:
    """One step down the loss, the gradient's norm at most clip; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss.item()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` once it is all there; what was there before stays if it never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")  # ends as path does: writers go by the suffix
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_json(found: object, path: Path) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")


def save_figure(figure: Figure, path: Path) -> None:
    with whole(path) as part:
        figure.savefig(part, dpi=120)


def run(main: Callable[[], None]) -> None:
    """main(), which writes when all is computed: Ctrl-C ends it in one line, and with status 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
