"""Train a character-level language model on the English text that every Python carries (pydoc_data.topics).

    python examples/char_lm.py                          about a minute on 2 CPU cores, with torch's CPU kernel
    python examples/char_lm.py --device cuda            on the persistent Triton kernels, in bfloat16
    python examples/char_lm.py --cell gru --resume      continue an interrupted run, exactly

Bytes are tokens. The text is cut into --batch parallel streams, which are read in windows of --window bytes. The
recurrent state passes from window to window, and gradients stop there (truncated backpropagation through time). Without
a GPU, one training step also runs through the Triton kernels in the interpreter, and its loss and gradients are
compared.

--out gets checkpoint.pt, metrics.json and curve.png.
"""

import argparse
import math
import os
import pydoc_data.topics
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import LAYERS, descend, fraction, parse, parser, positive, progress, rate, save_figure, save_json, whole
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn

# A run continues a checkpoint exactly only if these agree.
CONFIG = (
    "cell",
    "hidden",
    "embedding",
    "layers",
    "dropout",
    "batch",
    "window",
    "lr",
    "clip",
    "eval_every",
    "seed",
    "dtype",
)


class CharLM(nn.Module):
    def __init__(self, rnn: nn.Module, embedding: int, hidden: int) -> None:
        """rnn takes (T, B, embedding) and a state or None, and returns (T, B, hidden) and the next state."""
        super().__init__()
        self.embed = nn.Embedding(256, embedding)
        self.rnn: Any = rnn
        self.head = nn.Linear(hidden, 256)

    def forward(self, bytes_in: Tensor, state):
        """bytes_in (T, B) to logits (T, B, 256)."""
        y, state = self.rnn(self.embed(bytes_in), state)
        return self.head(y), state


def detach(state):
    if state is None:
        return None
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def load_streams(batch: int, window: int) -> tuple[Tensor, Tensor]:
    """Load training and validation bytes as (length, batch). Every column is a piece of contiguous text."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    split = int(0.9 * len(data))

    def streams(part: Tensor) -> Tensor:
        length = len(part) // batch
        if length < window + 1:
            raise SystemExit(
                f"--batch {batch} x --window {window} needs more text than the {len(part)} bytes there are"
            )
        return part[: length * batch].view(batch, length).T.contiguous()

    return streams(data[:split]), streams(data[split:])


def window_at(streams: Tensor, index: int, window: int) -> tuple[Tensor, Tensor, bool]:
    """Return inputs and targets of a window, and whether it is the first of a pass over the text."""
    windows = (len(streams) - 1) // window
    start = (index % windows) * window
    return streams[start : start + window], streams[start + 1 : start + window + 1], start == 0


class Trainer:
    """Everything that a checkpoint holds: model, optimizer, carried state, step and history."""

    config = CONFIG

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.step, self.state, self.history = args, 0, None, []
        self.model = CharLM(self.network(), args.embedding, args.hidden).to(args.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.train, self.valid = (s.to(args.device) for s in load_streams(args.batch, args.window))

    def network(self) -> nn.Module:
        args = self.args
        options = {"num_layers": args.layers, "dropout": args.dropout, "backend": args.backend}
        return LAYERS[args.cell](args.embedding, args.hidden, **options)

    def loss(self, inputs: Tensor, targets: Tensor, state):
        """Return the mean cross entropy in bits per byte, and the state after the window."""
        kind = torch.device(self.args.device).type
        with torch.autocast(kind, getattr(torch, self.args.dtype), enabled=self.args.dtype != "float32"):
            logits, state = self.model(inputs, state)
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / math.log(2), state

    def train_step(self) -> float:
        inputs, targets, first = window_at(self.train, self.step, self.args.window)
        loss, state = self.loss(inputs, targets, None if first else self.state)
        bits = descend(self.optimizer, loss, self.args.clip)
        self.state = detach(state)
        self.step += 1
        return bits

    @torch.no_grad()
    def validate(self) -> float:
        self.model.eval()
        losses, state = [], None
        for i in range((len(self.valid) - 1) // self.args.window):
            inputs, targets, _ = window_at(self.valid, i, self.args.window)
            loss, state = self.loss(inputs, targets, state)
            losses.append(loss.item())
        self.model.train()
        return sum(losses) / len(losses)

    def save(self, path: Path) -> None:
        checkpoint = {
            "config": {key: getattr(self.args, key) for key in self.config},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "step": self.step,
            "history": self.history,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        with whole(path) as part:
            torch.save(checkpoint, part)

    def load(self, path: Path) -> None:
        if not path.exists():
            raise SystemExit(f"--resume: there is no checkpoint at {path}")
        checkpoint = torch.load(path, map_location=self.args.device, weights_only=True)
        for key, value in checkpoint["config"].items():
            if getattr(self.args, key) != value:
                raise SystemExit(f"--resume: the checkpoint has --{key} {value}, got {getattr(self.args, key)}")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.state, self.step, self.history = checkpoint["state"], checkpoint["step"], checkpoint["history"]
        torch.set_rng_state(checkpoint["rng"].cpu())
        if self.args.device != "cpu":
            torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["cuda_rng"]])


def train(trainer: Trainer, out: Path) -> bool:
    """Train to --steps. Return False if Ctrl-C stopped it. The current step is finished first."""
    args, interrupted = trainer.args, []

    def on_interrupt(*_: object) -> None:
        if interrupted:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        interrupted.append(True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with progress(total=args.steps, initial=trainer.step, desc=f"train {args.cell}", unit="step") as bar:
            while trainer.step < args.steps and not interrupted:
                bits = trainer.train_step()
                bar.update()
                bar.set_postfix_str(f"{bits:.3f} bits/char")
                if trainer.step % args.eval_every == 0 or trainer.step == args.steps:
                    trainer.history.append({"step": trainer.step, "train": bits, "valid": trainer.validate()})
                    bar.write(
                        f"step {trainer.step:5d}  validation {trainer.history[-1]['valid']:.4f} bits per character"
                    )
                    trainer.save(out / "checkpoint.pt")
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        trainer.save(out / "checkpoint.pt")
        print(f"interrupted after step {trainer.step}; the same command with --resume continues exactly")
    return not interrupted


def plot(history: list[dict]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    steps = [h["step"] for h in history]
    axes.plot(steps, [h["train"] for h in history], color="C7", label="training window")
    axes.plot(steps, [h["valid"] for h in history], marker="o", label="validation")
    axes.set(xlabel="step", ylabel="bits per character", title="Character-level language model")
    axes.grid()
    axes.legend()
    return figure


@torch.no_grad()
def sample(trainer: Trainer, length: int, temperature: float = 0.7, prompt: bytes = b"The ") -> str:
    """Write text after the prompt with the model."""
    device = trainer.args.device
    generator = torch.Generator().manual_seed(trainer.args.seed)
    trainer.model.eval()
    written, state = bytearray(prompt), None
    inputs = torch.tensor(list(prompt), device=device).unsqueeze(1)
    for _ in range(length):
        logits, state = trainer.model(inputs, state)
        choice = torch.multinomial((logits[-1, 0].float().cpu() / temperature).softmax(0), 1, generator=generator)
        written.append(int(choice))
        inputs = choice.to(device).unsqueeze(1)
    return written.decode(errors="replace")


def check_kernels(args: argparse.Namespace) -> None:
    """Run one training step of the trained model on torch's kernel and on the persistent ones. They must agree."""
    args.window, args.batch, args.dtype = 8, 4, "float32"
    trainer = Trainer(args)
    trainer.model.load_state_dict(torch.load(args.out / "checkpoint.pt", weights_only=True)["model"])
    inputs, targets, _ = window_at(trainer.train, 0, args.window)
    results = {}
    for backend in ("torch", "resident"):
        trainer.model.rnn.backend = backend
        trainer.model.zero_grad()
        loss, _ = trainer.loss(inputs, targets, None)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        results[backend] = loss.item(), gradient
    (loss, gradient), (loss_kernel, gradient_kernel) = results["torch"], results["resident"]
    off = ((gradient - gradient_kernel).abs().max() / gradient.abs().max()).item()
    print(f"one training step, {args.window} bytes x {args.batch} streams, float32:")
    print(f"  torch's CPU kernel                  loss {loss:.6f} bits per character")
    print(f"  Triton kernels in the interpreter   loss {loss_kernel:.6f} bits per character")
    print(f"  largest difference of a gradient    {off:.1e} of the largest gradient")
    # fp32 has 7 digits. Sums over 8 steps and 4 streams lose less than two of them.
    if not (abs(loss - loss_kernel) < 1e-5 * loss and off < 1e-5):
        raise SystemExit("the Triton kernels disagree with torch")
    print("  they agree")


def add_training(made: argparse.ArgumentParser, steps: int, eval_every: int) -> None:
    """Add the arguments of a Trainer, except those of the network. The numbers are defaults."""
    made.add_argument("--hidden", type=positive, default=128)
    made.add_argument("--batch", type=positive, default=32, help="parallel streams of text")
    made.add_argument("--window", type=positive, default=64, help="bytes between gradient cuts")
    made.add_argument("--steps", type=positive, default=steps)
    made.add_argument("--lr", type=rate, default=4e-3)
    made.add_argument("--clip", type=rate, default=1.0, help="largest norm of the gradient")
    made.add_argument("--eval-every", type=positive, default=eval_every)
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the products (default: bfloat16 on a GPU)"
    )
    made.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")


def with_dtype(args: argparse.Namespace) -> argparse.Namespace:
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def arguments() -> argparse.Namespace:
    made = parser(__doc__, "runs/char_lm")
    made.set_defaults(threads=torch.get_num_threads())  # torch's choice, which the times above were measured with
    made.add_argument("--cell", choices=list(LAYERS), default="lstm")
    made.add_argument("--embedding", type=positive, default=64)
    made.add_argument("--layers", type=positive, default=1)
    made.add_argument("--dropout", type=fraction, default=0.0, help="dropout between layers")
    add_training(made, steps=3000, eval_every=500)
    made.add_argument("--sample", type=int, default=400, help="characters to write at the end")
    made.add_argument(
        "--check-kernels", action="store_true", help="only compare the kernels on the checkpoint in --out"
    )
    return with_dtype(parse(made))


def main() -> None:
    args = arguments()
    if args.check_kernels:
        check_kernels(args)
        return
    trainer = Trainer(args)
    if args.resume:
        trainer.load(args.out / "checkpoint.pt")

    print("the recurrence of this run:")
    with torch.autocast(torch.device(args.device).type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
        fastrnn.explain(trainer.model.rnn, torch.empty(args.window, args.batch, args.embedding, device=args.device))
    if not train(trainer, args.out):
        raise SystemExit(130)
    save_figure(plot(trainer.history), args.out / "curve.png")
    save_json(trainer.history, args.out / "metrics.json")
    print(f"\n{sample(trainer, args.sample)}\n")

    if args.device == "cpu":
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        settings = [f"--{key}={getattr(args, key)}" for key in ("cell", "hidden", "embedding", "layers", "out")]
        subprocess.run([sys.executable, __file__, "--check-kernels", *settings], env=environment, check=True)
        print("\non an H100 this would run:")
        cell = "rnn_tanh" if args.cell == "rnn" else args.cell
        sizes = {"hidden_size": args.hidden, "batch_size": args.batch, "seq_len": args.window}
        print(fastrnn.plan(cell, **sizes, dtype=torch.bfloat16, device="sm_90"))
    last = trainer.history[-1]["valid"]
    print(f"\nvalidation {last:.3f} bits per character; curve in {args.out / 'curve.png'}")


if __name__ == "__main__":
    main()
