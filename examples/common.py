"""What the examples share: arguments, an optimizer step, a progress bar, files that are written whole, and Ctrl-C."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import matplotlib.style
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # a bare checkout runs too, without an installed fastrnn

import fastrnn
from fastrnn.planning.planner import BACKENDS

matplotlib.use("Agg")
matplotlib.style.use("fastrnn.figures")

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
    """Make a parser with the arguments of all examples; doc is the example's docstring."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    help = "threads on the CPU; more than one gains little on small tensors"
    made.add_argument("--threads", type=positive, default=1, help=help)
    made.add_argument("--backend", choices=BACKENDS, default="auto")
    made.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments. Sets torch's seed and threads by them."""
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
    """Make one optimizer step, with the gradient's norm clipped to clip, and return the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss.item()


def progress(*args: Any, **kwargs: Any) -> Any:
    """Return tqdm's bar. In a log, which keeps every redraw, it is a line every ten seconds and one at the end."""
    return tqdm(*args, **kwargs, file=sys.stderr if sys.stderr.isatty() else Log(sys.stderr))


class Log:
    """A file for tqdm where the output is no terminal."""

    SECONDS = 10

    def __init__(self, file: TextIO) -> None:
        self.file, self.bar, self.written = file, "", time.monotonic()

    def write(self, text: str) -> None:
        self.bar = text.strip() or self.bar
        ends = text == "\n"  # tqdm writes this when a bar closes
        if self.bar and (ends or time.monotonic() - self.written >= self.SECONDS):
            self.file.write(f"{self.bar}\n")
            self.bar, self.written = "", time.monotonic()

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to. Only when the block ends without an error, the new file replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")  # keeps the suffix, by which writers choose a format
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
        figure.savefig(part)


def run(main: Callable[[], None]) -> None:
    """Run main. Ctrl-C ends it with one line and status 130; main writes its files last, so nothing is half written."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
