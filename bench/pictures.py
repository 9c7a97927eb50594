"""The pictures of the README and of docs/, from data that is committed, and nothing else.

    python -m bench.pictures                draw all of them into docs/pictures/
    python -m bench.pictures tiers          draw one

A step's timeline is drawn by `python -m fastrnn inspect --timeline FILE`, the examples' figures by the examples.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from . import measured

FOLDER = Path(__file__).parents[1] / "docs/pictures"
INK, WEIGHTS, STATE = "C7", "C0", "C1"


def tiers() -> Figure:
    """Who holds W_hh, and how h travels from step to step."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    of_tiers = figure.subplots(1, 3)
    shared = ("resident", "h stays in the program"), ("cluster", "h goes through the others' shared memory")
    for axes, (tier, how) in zip(
        of_tiers, (*shared, ("cooperative", "h goes through L2, behind a grid barrier")), strict=True
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
    """Measured: a step on an H100, and whole layers there beside torch.nn's."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    steps, layers = figure.subplots(1, 2)
    hidden = sorted({row["H"] for row in measured.records("steps-before")})
    for cell, color in (("lstm", "C0"), ("gru", "C2"), ("rnn_tanh", "C5")):
        found = [(H, measured.today(cell, H, "forward")) for H in hidden]
        known = [(H, us) for H, us in found if us is not None]
        steps.plot(*zip(*known, strict=True), "o-", color=color, label=f"fastrnn {measured.NAMES[cell]}")
    flashrnn = [(row["H"], row["fwd_us_step"]) for row in measured.records("flashrnn") if "fwd_us_step" in row]
    steps.plot(*zip(*flashrnn, strict=True), "s", color="C1", label="FlashRNN LSTM (Triton)")
    steps.set(xlabel="H", ylabel="us a step, forward", ylim=(0, None), title="One time step (bf16, B = 16)")
    steps.set_xscale("log", base=2)
    steps.set_xticks(hidden, [str(H) for H in hidden])
    plain = [
        row for row in measured.records("compare") if row["kind"] == "plain" and row["layers"] == 1 and not row["bi"]
    ]
    names, width = {"bfloat16": "C0", "float16": "C1"}, 0.2
    for shift, (cell, dtype) in enumerate((cell, dtype) for cell in ("LSTM", "GRU") for dtype in names):
        rows = [row for row in plain if (row["cell"], row["dtype"]) == (cell, dtype)]
        at = [n + (shift - 1.5) * width for n in range(len(rows))]
        alpha = 1.0 if cell == "LSTM" else 0.5
        layers.bar(
            at, [row["x_train"] for row in rows], width, color=names[dtype], alpha=alpha, label=f"{cell}, {dtype}"
        )
        layers.set_xticks(range(len(rows)), [str(row["H"]) for row in rows])
    layers.axhline(1, color=INK, linestyle=":")
    layers.set(xlabel="H", ylabel="times as fast as torch.nn", title="A training step of a layer (T = 1024, B = 16)")
    figure.suptitle("Measured on one H100")
    for axes in (steps, layers):
        axes.grid(axis="y")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


PICTURES = {"tiers": tiers, "speed": speed}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; all if none is named")
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
