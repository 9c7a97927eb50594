"""Draw the pictures of the README and of docs/ from committed data.

    python -m bench.pictures                draw all of them into docs/pictures/
    python -m bench.pictures tiers          draw one

A step's timeline is drawn by `python -m fastrnn inspect --timeline FILE`, the examples' figures by the examples.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import fastrnn

from . import DOCUMENT, measured

FOLDER = Path(__file__).parents[1] / "docs/pictures"
INK, WEIGHTS, STATE = "C7", "C0", "C1"


def tiers() -> Figure:
    """Who holds W_hh, and how h travels from step to step."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    of_tiers = figure.subplots(1, 3)
    shared = ("resident", "h stays in the program"), ("cluster", "h goes through the others' shared memory")
    for axes, (tier, how) in zip(
        of_tiers, (*shared, ("cooperative", "h goes through L2, where the others poll it")), strict=True
    ):
        axes.set(xlim=(0, 10), ylim=(0, 7), title=tier, xlabel=how)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    resident, cluster, cooperative = of_tiers
    _program(resident, 3, 4, "all of W_hh")
    _arrow(resident, (7, 3.1), (7, 5.6), bend=1.1)
    for n in range(4):
        _program(cluster, 0.2 + 2.5 * n, 2.1, "1/4 of\nW_hh")
        if n:
            _arrow(cluster, (2.5 * n - 0.3, 2.3), (2.5 * n + 0.3, 2.3), both=True)
    cooperative.add_patch(Rectangle((0, 0.3), 10, 0.9, color=STATE, alpha=0.3))
    cooperative.text(5, 0.75, "h of all units, in L2", ha="center", va="center")
    for n in range(8):
        _program(cooperative, 0.05 + 1.25 * n, 1.1, "")
        _arrow(cooperative, (0.6 + 1.25 * n, 1.2), (0.6 + 1.25 * n, 2.0), both=True)
    cooperative.text(5, 6.35, "up to a program for each multiprocessor, a slice of W_hh each", ha="center", fontsize=8)
    return figure


def _program(axes: Any, x: float, width: float, text: str) -> None:
    axes.add_patch(Rectangle((x, 2), width, 4, fill=False, edgecolor=INK))
    axes.add_patch(Rectangle((x + 0.15, 3.2), width - 0.3, 2.6, color=WEIGHTS, alpha=0.3))
    axes.add_patch(Rectangle((x + 0.15, 2.2), width - 0.3, 0.75, color=STATE, alpha=0.3))
    axes.text(x + width / 2, 4.5, text, ha="center", va="center")
    axes.text(x + width / 2, 2.57, "h", ha="center", va="center")


def _arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, both: bool = False
) -> None:
    form = "<|-|>" if both else "-|>"
    shape = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=form, mutation_scale=10, color=INK, connectionstyle=shape))


def speed() -> Figure:
    """Measured: training on a CPU beside torch.nn; a step on an H100, and whole layers there beside torch.nn's."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    cpu, steps, layers = figure.subplots(1, 3)
    _bars(cpu, {"GRU": _on_cpu("gru"), "RNN": _on_cpu("rnn_tanh")})
    cpu.set(xlabel="T, B, H", title="CPU, one thread: a training step")
    hidden = sorted({row["H"] for row in measured.records("steps-before")})
    for cell, color in (("lstm", "C0"), ("gru", "C2"), ("rnn_tanh", "C5")):
        with measured.tiles_of_16_rows():  # what was measured
            found = [(H, measured.today(cell, H, "forward")) for H in hidden]
        known = [(H, us) for H, us in found if us is not None]
        steps.plot(*zip(*known, strict=True), "o-", color=color, label=f"fastrnn {measured.NAMES[cell]}")
    flashrnn = [(row["H"], row["fwd_us_step"]) for row in measured.records("flashrnn") if "fwd_us_step" in row]
    steps.plot(*zip(*flashrnn, strict=True), "s", color="C1", label="FlashRNN LSTM (Triton)")
    steps.set(xlabel="H", ylabel="us, forward", ylim=(0, None), title="H100: one time step (bf16, B = 16)")
    steps.set_xscale("log", base=2)
    steps.set_xticks(hidden, [str(H) for H in hidden])
    plain = [
        row for row in measured.records("compare") if row["kind"] == "plain" and row["layers"] == 1 and not row["bi"]
    ]
    of_layers: dict[str, dict[str, float]] = {}
    for row in plain:
        of_layers.setdefault(f"{row['cell']}, {row['dtype']}", {})[str(row["H"])] = row["x_train"]
    _bars(layers, of_layers)
    layers.set(xlabel="H", title="H100: a training step (T = 1024, B = 16)")
    figure.suptitle("Measured. Higher is better, except in the middle.")
    for axes in (cpu, steps, layers):
        axes.grid(axis="y")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def _on_cpu(cell: str) -> dict[str, float]:
    """Times as fast as torch.nn in training, by sizes: the table of `python -m bench.cpu` in docs/performance.md."""
    table = DOCUMENT.read_text().split("<!-- python -m bench.cpu --write -->")[1].split("<!-- end -->")[0]
    rows = [
        [text.strip() for text in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {row[0]: float(row[7].rstrip("x")) for row in rows if row[1] == cell}


def _bars(axes: Any, ratios: dict[str, dict[str, float]]) -> None:
    """A bar for each series at each label: times as fast as torch.nn, which is the dotted line at 1."""
    labels, width = list(next(iter(ratios.values()))), 0.8 / len(ratios)
    for n, (name, found) in enumerate(ratios.items()):
        at = [place + (n - (len(ratios) - 1) / 2) * width for place in range(len(labels))]
        axes.bar(at, [found[label] for label in labels], width, label=name)
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.axhline(1, color=INK, linestyle=":")
    axes.set(ylabel="times as fast as torch.nn")


def planner() -> Figure:
    """What "auto" takes for the LSTM in training over H and B, and at what price."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    hidden, batches = (32, 64, 128, 256, 512, 1024, 2048), (1, 8, 16, 64, 256, 1024, 4096)
    colors = {"resident": "C0", "cluster": "C2", "cooperative": "C5", "torch": "C1"}
    for axes, arch in zip(figure.subplots(1, 3), ("sm_80", "sm_90", "sm_100"), strict=True):
        for (x, H), (y, B) in itertools.product(enumerate(hidden), enumerate(batches)):
            sizes = {"hidden_size": H, "batch_size": B, "seq_len": 1024, "dtype": torch.bfloat16}
            plan = fastrnn.plan("lstm", **sizes, device=arch)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colors[plan.backend], alpha=0.35, linewidth=0))
            price = next(price for price in plan.prices if price.backend == plan.backend)
            axes.text(x, y, _two_digits(price.us / price.steps), ha="center", va="center", fontsize="small")
        axes.set(xlim=(-0.5, 6.5), ylim=(-0.5, 6.5), xlabel="H", title=arch)
        axes.set_xticks(range(7), map(str, hidden), fontsize="small")
        axes.set_yticks(range(7), map(str, batches), fontsize="small")
    figure.axes[0].set_ylabel("B")
    handles = [Rectangle((0, 0), 1, 1, color=color, alpha=0.35, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(
        'LSTM, bf16, training: what "auto" takes, and its price in us a step (mostly simulated)', fontsize="medium"
    )
    return figure


def _two_digits(us: float) -> str:
    return f"{us:,.0f}" if us >= 10 else f"{us:.2g}"


PICTURES = {"tiers": tiers, "speed": speed, "planner": planner}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(PICTURES)}; all if none is named")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - PICTURES.keys():
        parser.error(f"NAME: expected one of {', '.join(PICTURES)}; got {', '.join(sorted(unknown))}")
    FOLDER.mkdir(exist_ok=True)
    for name in args.names or PICTURES:
        with style.context("fastrnn.figures"):
            PICTURES[name]().savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
