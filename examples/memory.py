"""Measure how far back an RNN, a GRU and an LSTM can learn, on the adding and the copy problem over T.

    python examples/memory.py                           two minutes on a CPU core, with torch's CPU kernel
    python examples/memory.py --device cuda --lengths 50 500 5000

adding: T numbers, one of them marked in each half. What is the sum of the marked ones? A network that remembers nothing
has the loss 1/6, the variance of a sum of two uniform numbers.

copy: two symbols of four, T blank steps, then a sign. Which symbols were they? Remembering nothing costs log 4, and
remembering them without their order 3/4 log 2.

Both are from Hochreiter and Schmidhuber 1997, and both need a gradient that arrives. The loss after the last step moves
what happened T steps before by a product of T Jacobians dh[t]/dh[t-1]. In the RNN they shrink it, because W_hh and
tanh' are below 1. In the LSTM and the GRU they do too, before training. But a gate that keeps the state (the LSTM's f,
the GRU's z) adds a path whose Jacobian is the gate itself, and that can be near 1. With biases log(U(1, T)) units
forget after 1 to T steps (Tallec and Ollivier 2018), and the gradient is there from the first training step on.

--out gets metrics.json (losses, and the norm of the gradient through time) and memory.png.
"""

import argparse
import math

import torch
from common import LAYERS, descend, parse, parser, positive, progress, rate, run, save_figure, save_json
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

SYMBOLS, RECALLED = 4, 2
# The number of inputs and outputs, and the loss of a network that remembers nothing.
PROBLEMS = {"adding": (2, 1, 1 / 6), "copy": (SYMBOLS + 2, SYMBOLS, math.log(SYMBOLS))}


def adding(T: int, B: int) -> tuple[Tensor, Tensor]:
    """Make numbers around 0 with their marks (T, B, 2), and the sums (1, B, 1)."""
    numbers, marks, rows = torch.rand(T, B) - 0.5, torch.zeros(T, B), torch.arange(B)
    first, second = torch.randint(T // 2, (B,)), torch.randint(T // 2, T, (B,))
    marks[first, rows] = marks[second, rows] = 1
    return torch.stack((numbers, marks), -1), (numbers * marks).sum(0).view(1, B, 1)


def copy(T: int, B: int) -> tuple[Tensor, Tensor]:
    """Make symbols, T blanks and the sign, one-hot (T + 2 RECALLED, B, SYMBOLS + 2), and the symbols (RECALLED, B)."""
    blank, sign = SYMBOLS, SYMBOLS + 1
    symbols = torch.randint(SYMBOLS, (RECALLED, B))
    inputs = torch.full((T + 2 * RECALLED, B), blank)
    inputs[:RECALLED], inputs[RECALLED + T] = symbols, sign
    return one_hot(inputs, SYMBOLS + 2).float(), symbols


class Model(nn.Module):
    def __init__(self, problem: str, cell: str, hidden: int, backend: str) -> None:
        super().__init__()
        inputs, outputs, _ = PROBLEMS[problem]
        self.problem, self.cell = problem, cell
        self.rnn = LAYERS[cell](inputs, hidden, backend=backend)
        self.head = nn.Linear(hidden, outputs)

    @torch.no_grad()
    def remember(self, T: int) -> None:
        """Set the biases of the gates so that units keep their state for 1 to T steps. The RNN has no gates."""
        if self.cell == "rnn":
            return
        H = self.rnn.hidden_size
        keep = torch.log(1 + (T - 1) * torch.rand(H))
        b_ih, b_hh = self.rnn.bias_ih_l0, self.rnn.bias_hh_l0
        b_ih[: 2 * H] = 0
        b_hh[H : 2 * H] = keep  # torch's gates are in the order i, f, g, o and r, z, n
        if self.cell == "lstm":
            b_hh[:H] = -keep  # units that keep for long are written slowly

    def loss(self, T: int, B: int) -> tuple[Tensor, Tensor]:
        """Return the loss on a new batch, and the batch's inputs (T, B, I)."""
        inputs, targets = (t.to(self.head.weight.device) for t in (adding if self.problem == "adding" else copy)(T, B))
        inputs.requires_grad_()
        found = self.head(self.rnn(inputs)[0][-len(targets) :])
        if self.problem == "adding":
            return mse_loss(found, targets), inputs
        return cross_entropy(found.flatten(0, 1), targets.flatten()), inputs

    def gradient_through_time(self, T: int, B: int) -> list[float]:
        """Return the norm of d loss / d x[t] for each t."""
        (gradient,) = torch.autograd.grad(*self.loss(T, B))
        return gradient.flatten(1).norm(dim=1).tolist()


def plot(results: list[dict], gradients: dict[str, dict[str, list[float]]], T: int) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    *losses, through_time = figure.subplots(1, 3)
    colours = {"rnn": "C3", "gru": "C0", "lstm": "C2"}
    markers = {"rnn": "s-", "gru": "o-", "lstm": "x-"}
    for axes, problem in zip(losses, PROBLEMS, strict=True):
        for cell, colour in colours.items():
            rows = [r for r in results if (r["problem"], r["cell"]) == (problem, cell)]
            lengths, relative = [r["T"] for r in rows], [r["loss"] / r["baseline"] for r in rows]
            axes.plot(lengths, relative, markers[cell], color=colour, label=cell)
            axes.set_xticks(lengths)
        axes.axhline(1, color="C7", linestyle=":", label="remembering nothing")
        axes.set(title=problem, xlabel="T", ylabel="loss after training / baseline", ylim=(-0.05, 1.1))
        axes.legend()
    styles = {"as torch.nn initializes": ":", "gates biased to keep": "--", "trained": "-"}
    for cell, curves in gradients.items():
        for when, norms in curves.items():
            back = range(len(norms) - 1, -1, -1)
            shown = [max(norm, 1e-12) for norm in norms]  # 0 has no logarithm
            through_time.plot(back, shown, styles[when], color=colours[cell], label=f"{cell}, {when}")
    through_time.set(title=f"adding, T = {T}", xlabel="steps before the loss", ylabel="|d loss / d x[t]|", yscale="log")
    through_time.legend(fontsize=7)
    for axes in (*losses, through_time):
        axes.grid()
    return figure


def train(args: argparse.Namespace) -> tuple[list[dict], dict[str, dict[str, list[float]]]]:
    """Train every cell on every problem and length. Return a row for each, and gradients for the longest adding."""
    runs = [(problem, cell, T) for problem in PROBLEMS for cell in LAYERS for T in args.lengths]
    results, gradients = [], {cell: {} for cell in LAYERS}
    with progress(total=len(runs) * args.steps, unit="step") as bar:
        for problem, cell, T in runs:
            bar.set_description(f"{problem}, T={T}, {cell}")
            model = Model(problem, cell, args.hidden, args.backend).to(args.device)
            watched = problem == "adding" and max(args.lengths) == T
            if watched:
                gradients[cell]["as torch.nn initializes"] = model.gradient_through_time(T, args.batch)
            model.remember(T)
            if watched and cell != "rnn":
                gradients[cell]["gates biased to keep"] = model.gradient_through_time(T, args.batch)
            optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
            losses = []
            for _ in range(args.steps):
                losses.append(descend(optimizer, model.loss(T, args.batch)[0]))
                bar.update()
            if watched:
                gradients[cell]["trained"] = model.gradient_through_time(T, args.batch)
            last = losses[-max(1, args.steps // 10) :]  # every batch is new: these are losses on unseen data
            loss, baseline = sum(last) / len(last), PROBLEMS[problem][2]
            results.append({"problem": problem, "cell": cell, "T": T, "loss": loss, "baseline": baseline})
            bar.write(f"{problem:<8} T={T:<6} {cell:<6} loss {loss:.4f}, remembering nothing {baseline:.4f}")
    return results, gradients


def main() -> None:
    made = parser(__doc__, "runs/memory")
    made.add_argument("--lengths", type=positive, nargs="+", default=[5, 20, 80], metavar="T")
    made.add_argument("--hidden", type=positive, default=32)
    made.add_argument("--steps", type=positive, default=600, help="training steps for each problem, cell and length")
    made.add_argument("--batch", type=positive, default=32)
    made.add_argument("--lr", type=rate, default=1e-2)
    args = parse(made)
    if min(args.lengths) < 2:
        made.error(f"--lengths {min(args.lengths)}: expected at least 2, for two marks")
    args.lengths = sorted(set(args.lengths))

    results, gradients = train(args)
    save_figure(plot(results, gradients, max(args.lengths)), args.out / "memory.png")
    save_json({"losses": results, "gradients": gradients}, args.out / "metrics.json")
    for cell, curves in gradients.items():
        for when, norms in curves.items():
            print(f"{cell:<5} {when:<24} gradient at the first step: {norms[0] / norms[-1]:.0e} of the last step's")
    print(f"figure in {args.out / 'memory.png'}")


if __name__ == "__main__":
    run(main)
