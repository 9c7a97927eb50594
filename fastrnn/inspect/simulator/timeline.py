"""One simulated step, warp by warp: as text, and as a picture where matplotlib is installed."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .simulate import Simulated

# A letter for what a warp issues; where several are issued in a column, the one further in front.
LETTERS = {
    "barrier": "B", "tensor": "T", "special": "S", "memory": "M", "branch": "b", "fp32": "f", "one fp32": "f",
    "both fp32": "f", "integer": "i", "uniform": "i", "none": "i",
}  # fmt: skip
ORDER = "BTSMbfi"
COLUMNS, INSTRUCTIONS = 100, 12
# The six things that a step waits for, as docs/performance.md names them, with their colors and their causes.
KINDS = {
    "the chain": (
        "#d9534f",
        ("stall count", "branch", "operands read", "shuffle", "special register", "constant bank"),
    ),
    "issue": ("#3f7fd1", ("another warp issued",)),
    "barriers": ("#e0982b", ("barrier", "cluster barrier", "fence")),
    "shared memory": ("#8a63d2", ("shared memory", "distributed shared memory")),
    "pipes": ("#5b8c2a", ("special function",)),  # and every cause that begins so: "pipe: tensor cores"
    "L2": ("#1f9e9a", ("L2", "L1", "data in flight", "device memory", "memory")),
}
KIND_OF = {cause: kind for kind, (_, causes) in KINDS.items() for cause in causes}


def step_of(simulated: Simulated) -> tuple[int, int]:
    """Return first and last cycle of the last step."""
    last = simulated.steps - 1
    return min(warp.began[last] for warp in simulated.machine.warps), simulated.ends[last + 1]


def text(simulated: Simulated) -> Iterator[str]:
    """Yield lines: what warps wait for, how busy resources are, when barriers come, what each warp issues in a step."""
    cycles = simulated.cycles
    yield f"{cycles:,.0f} cycles a step, simulated; {simulated.instructions:.0f} instructions a warp"
    yield ""
    yield "a warp's cycles of a step, by what it waits for"
    yield from _shares(simulated.waits, cycles)
    yield ""
    yield "busy cycles of a step (of what each scheduler has, of one)"
    yield from _shares(simulated.uses, cycles)
    yield ""
    yield "instructions that warps wait longest before, cycles a warp and step"
    for text, waited, causes in longest(simulated):
        yield f"  {waited:>7,.0f}  {text:<60} {causes}"
    first, last = step_of(simulated)
    width = max(1, -(-(last - first) // COLUMNS))
    yield ""
    yield f"barriers and fences: first and last warp's issue, from the step's first cycle ({last - first:,} to its end)"
    yield from _barriers(simulated, first, last)
    yield ""
    yield f"warps, {width} cycles a column: B barrier or fence, T tensor cores, S special functions, M memory, f fp32,"
    yield "i integers, b branch, . nothing issued"
    for warp in simulated.machine.warps:
        cells = ["."] * (-(-(last - first) // width))
        for time, index in warp.issues:
            if first <= time < last:
                letter, cell = LETTERS[simulated.ops[index].pipe], (time - first) // width
                if cells[cell] == "." or ORDER.index(letter) < ORDER.index(cells[cell]):
                    cells[cell] = letter
        yield f"  {warp.number:>3} |{''.join(cells)}|"
    if simulated.unknown:
        yield ""
        yield f"addresses or branches that were not known: {'; '.join(simulated.unknown)}"


def _shares(found: dict[str, float], whole: float) -> Iterator[str]:
    for name, cycles in found.items():
        if cycles >= 0.5:
            yield f"  {name:<30}{cycles:>8,.0f}  {cycles / whole:>5.0%}"


def longest(simulated: Simulated, count: int = INSTRUCTIONS) -> list[tuple[str, float, str]]:
    """Return the instructions before which warps wait most: text, cycles a warp and step, and causes."""
    waited: dict[int, Counter[str]] = {}
    for warp in simulated.machine.warps:
        times = iter(warp.waits)
        wait = next(times, None)
        for time, index in warp.issues:
            while wait is not None and wait[1] <= time:
                waited.setdefault(index, Counter())[wait[2]] += wait[1] - wait[0]
                wait = next(times, None)
    scale = len(simulated.machine.warps) * simulated.steps
    rows = sorted(((sum(causes.values()) / scale, index) for index, causes in waited.items()), reverse=True)[:count]
    return [
        (
            simulated.ops[index].text[:60],
            cycles,
            ", ".join(f"{cause} {n / scale:.0f}" for cause, n in waited[index].most_common(3) if n / scale >= 0.5),
        )
        for cycles, index in sorted(rows, key=lambda row: row[1])
    ]


def _barriers(simulated: Simulated, first: int, last: int) -> Iterator[str]:
    found: dict[int, list[int]] = {}  # by how many the warp has met before: a step may come to one instruction twice
    names: dict[int, str] = {}
    for warp in simulated.machine.warps:
        met = [(t, i) for t, i in warp.issues if first <= t < last and simulated.ops[i].pipe == "barrier"]
        for time, index in met:
            found.setdefault(index, []).append(time - first)
            names[index] = simulated.ops[index].code.opcode
    for index in sorted(found, key=lambda i: min(found[i])):
        yield f"  {names[index]:<30}{min(found[index]):>8,}{max(found[index]):>8,}"


def kind_of(cause: str) -> str:
    """Return which of the six KINDS a cause of the simulator belongs to."""
    return "pipes" if cause.startswith("pipe: ") else KIND_OF[cause]


def picture(simulated: Simulated, title: str, file: Path) -> None:
    """Draw a step: each warp's waits in the colors of the six KINDS, and under it how busy each resource is.

    Raises RuntimeError without matplotlib.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise RuntimeError("a picture of a step needs matplotlib: pip install matplotlib") from None
    with style.context("fastrnn.figures"):
        _drawn(simulated, title).savefig(file)


def _drawn(simulated: Simulated, title: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first, last = step_of(simulated)
    figure: Any = Figure(figsize=(12, 2.5 + 0.22 * len(simulated.machine.warps) + 3), layout="constrained")
    warps, bars = figure.subplots(2, 1, height_ratios=(2, 1))
    for row, warp in enumerate(simulated.machine.warps):
        by_kind: dict[str, list[tuple[int, int]]] = {}
        for start, end, cause in warp.waits:
            start, end = max(start, first), min(end, last)
            if end > start:
                by_kind.setdefault(kind_of(cause), []).append((start - first, end - start))
        for kind, spans in by_kind.items():
            warps.broken_barh(spans, (row - 0.4, 0.8), facecolors=KINDS[kind][0])
        issued = [(time - first, 1) for time, _ in warp.issues if first <= time < last]
        warps.broken_barh(issued, (row - 0.4, 0.8), facecolors="0.5")
    warps.set(
        xlabel="cycle of the step", ylabel="warp", xlim=(0, last - first), title=f"{title}: simulated, not measured"
    )
    warps.invert_yaxis()
    shares = dict.fromkeys(("works", *KINDS), 0.0)
    for cause, cycles in simulated.waits.items():
        shares["works" if cause == "issue" else kind_of(cause)] += cycles / simulated.cycles
    colors = {"works": "0.5"} | {kind: color for kind, (color, _) in KINDS.items()}
    handles = [Patch(color=color, label=f"{kind}, {shares[kind]:.0%}") for kind, color in colors.items()]
    warps.legend(handles=handles, bbox_to_anchor=(1.01, 1), loc="upper left", title="a warp works, or waits for")
    names = [name for name, cycles in simulated.uses.items() if cycles >= 0.5]
    bars.barh(names, [simulated.uses[name] / simulated.cycles * 100 for name in names], color="C0")
    bars.set(xlabel="busy, % of the step", xlim=(0, 100))
    bars.invert_yaxis()
    return figure
