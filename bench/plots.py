"""Plots of what was measured: time a step over H, B and T, how many times as fast as torch.nn, memory over T."""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .workload import PASSES

SWEEPS = {"over H": "H", "over B": "B", "over T": "T"}


def draw(results: Sequence[Any], folder: Path) -> Iterator[tuple[str, Path]]:
    """(caption, file) of each plot that the results have points for; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return
    for group, axis in SWEEPS.items():
        yield from _by_dtype(results, folder, group, axis, "time", "us a step", lambda r, _: r.us_per_step)
        yield from _by_dtype(results, folder, group, axis, "speed-up", "times as fast as torch.nn", _speed_up)
    yield from _by_dtype(
        results, folder, "over T", "T", "memory", "peak MiB", lambda r, _: r.peak_bytes and r.peak_bytes / 2**20
    )


def _speed_up(result: Any, base: Any) -> float | None:
    return base and base.seconds / result.seconds


def _by_dtype(
    results: Sequence[Any], folder: Path, group: str, axis: str, what: str, label: str,
    value: Callable[[Any, Any], float | None],
) -> Iterator[tuple[str, Path]]:  # fmt: skip
    """One figure a dtype: a row a pass, a column a cell, a line an implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, style
    from matplotlib.ticker import NullFormatter

    style.use("fastrnn.figures")
    for dtype in dict.fromkeys(r.workload.dtype for r in results if r.workload.group == group):
        chosen = [r for r in results if r.workload.group == group and r.workload.dtype == dtype]
        cells = list(dict.fromkeys(r.workload.cell for r in chosen))
        names = list(dict.fromkeys(r.implementation for r in chosen))
        colors = {name: f"C{i}" for i, name in enumerate(names)}
        base = {(r.workload, r.which): r for r in chosen if r.implementation == "torch.nn"}
        size = (4.5 * len(cells) + 1.5, 3.3 * len(PASSES))
        figure, grid = pyplot.subplots(len(PASSES), len(cells), figsize=size, squeeze=False, layout="constrained")
        for row, which in zip(grid, PASSES, strict=True):
            for axes, cell in zip(row, cells, strict=True):
                for name in names:
                    points = sorted(
                        (getattr(r.workload.shape, axis), y)
                        for r in chosen
                        if (r.implementation, r.workload.cell, r.which) == (name, cell, which)
                        and (y := value(r, base.get((r.workload, which)))) is not None
                    )
                    if points:
                        axes.plot(*zip(*points, strict=True), "o-", color=colors[name], markersize=3, label=name)
                axes.set(title=f"{cell}, {which}", xlabel=axis, ylabel=label)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                for scale in (axes.xaxis, axes.yaxis):
                    scale.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}" if what == "speed-up" else NullFormatter())
                axes.grid(which="both")
        lines, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize="small")
        fixed = next(r.workload for r in chosen).shape
        rest = ", ".join(f"{k}={getattr(fixed, k)}" for k in ("T", "B", "H") if k != axis)
        caption = f"{what} {group}, {dtype}, {rest}"
        figure.suptitle(caption)
        file = folder / f"{what}-{group.replace(' ', '-')}-{dtype}.png"
        figure.savefig(file)
        pyplot.close(figure)
        yield caption, file
