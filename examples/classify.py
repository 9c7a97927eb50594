"""Classify handwritten digits, read pixel by pixel, with a bidirectional GRU (scikit-learn's digits).

    python examples/classify.py                         a minute and a half on a CPU core, with torch's CPU kernel
    python examples/classify.py --device cuda           on the persistent Triton kernels

An image of 8 x 8 pixels is a sequence of T = 64 numbers, row after row. Neighbours in a column are 8 steps apart, and
nothing tells the network so. It reads the sequence in both directions. Each of the two final states has seen the whole
image, and both together are classified. A quarter of the images is for the test.

--out gets metrics.json and confusion.png.
"""

import argparse
import math

import torch
from common import descend, parse, parser, positive, progress, rate, run, save_figure, save_json
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn


class Classifier(nn.Module):
    def __init__(self, hidden: int, backend: str) -> None:
        super().__init__()
        self.gru = fastrnn.GRU(1, hidden, bidirectional=True, backend=backend)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * hidden, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, 10) for pixels (T, B, 1)."""
        if self.training:  # there are few images, so no two epochs should show the same
            pixels = pixels + 0.1 * torch.randn_like(pixels)
        _, h_n = self.gru(pixels)  # (2, B, H)
        return self.head(self.drop(torch.cat(h_n.unbind(0), -1)))


def load(seed: int, device: str) -> list[Tensor]:
    """Load training and test pixels (T, N, 1) from -1 to 1, and their digits (N,)."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, test_size=0.25, random_state=seed % 2**32, stratify=digits)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    sequences = [(x.float() / 8 - 1).T.unsqueeze(-1).contiguous() for x in (x_train, x_test)]
    return [tensor.to(device) for tensor in (*sequences, y_train, y_test)]


def train(model: Classifier, x: Tensor, y: Tensor, args: argparse.Namespace) -> list[float]:
    """Train, and return the mean loss of every epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    steps = args.epochs * math.ceil(len(y) / args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    losses = []
    with progress(range(args.epochs), desc="train", unit="epoch") as bar:
        for _ in bar:
            batches = torch.randperm(len(y)).to(y.device).split(args.batch)
            found = []
            for rows in batches:
                found.append(descend(optimizer, cross_entropy(model(x[:, rows]), y[rows])))
                schedule.step()
            losses.append(sum(found) / len(found))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    return losses


def plot(losses: list[float], confusion, accuracy: float) -> Figure:
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses)
    left.set(xlabel="epoch", ylabel="training loss, nats", yscale="log", title="Digits, pixel by pixel")
    left.grid()
    ConfusionMatrixDisplay(confusion).plot(ax=right, colorbar=False, cmap="Blues")
    right.set_title(f"test images, accuracy {accuracy:.1%}")
    return figure


def main() -> None:
    made = parser(__doc__, "runs/classify")
    made.add_argument("--hidden", type=positive, default=64)
    made.add_argument("--epochs", type=positive, default=40)
    made.add_argument("--batch", type=positive, default=32)
    made.add_argument("--lr", type=rate, default=1e-2, help="largest learning rate: it rises, then falls")
    args = parse(made)
    x_train, x_test, y_train, y_test = load(args.seed, args.device)
    model = Classifier(args.hidden, args.backend).to(args.device)
    print("the recurrence of this run:")
    fastrnn.explain(model.gru, x_train[:, : args.batch])

    losses = train(model, x_train, y_train, args)
    model.eval()
    with torch.no_grad():
        found = model(x_test).argmax(-1)
    confusion = confusion_matrix(y_test.cpu(), found.cpu())
    accuracy = confusion.trace() / confusion.sum()
    save_figure(plot(losses, confusion, accuracy), args.out / "confusion.png")
    save_json(
        {"accuracy": accuracy, "chance": 0.1, "losses": losses, "confusion": confusion.tolist()},
        args.out / "metrics.json",
    )
    print(f"{accuracy:.1%} of {len(y_test)} test images (chance: 10%); figure in {args.out / 'confusion.png'}")


if __name__ == "__main__":
    run(main)
