"""Write a report of measurements: Markdown, plots, and one HTML page that holds everything.

    python -m bench.report bench/results/DIR      report.md, *.png and report.html beside the JSON files there

A folder that bench.gpu packed is unpacked with `python -m bench.packing` first.

Times are medians over rounds, and a step's is a call's over T; ratios are medians of those of each round, in which all
implementations took turns, with their quartiles. Published numbers are others'.
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.cases import Case

from . import plots
from .adapters import IMPLEMENTATIONS
from .pages import Block, markdown, page
from .published import PUBLISHED, Published
from .turns import quartiles
from .workload import PASSES, Workload

BASELINE = "torch.nn"
OURS = "fastrnn auto"


class Result(NamedTuple):
    workload: Workload
    implementation: str
    which: str
    seconds: float  # median
    peak_bytes: int | None  # of forward and backward
    runs: str = ""  # of ours: the backend
    pairs: dict[str, list[float]] | None = None  # how many times as fast as others: quartiles around the median

    @property
    def is_torchs(self) -> bool:
        """Whether ours is torch's own kernel, called as torch.nn calls it."""
        return self.runs == "torch" and self.workload.kind == "plain"

    @property
    def us_per_step(self) -> float:
        return self.seconds / self.workload.shape.T * 1e6


def load(folder: Path) -> tuple[list[Result], dict[str, Any], dict[str, Any]]:
    """Return results, machine and notes of all runs in a folder."""
    results, machine = [], {}
    notes: dict[str, Any] = {"left_out": {}, "auto_over_torch": {}}
    for file in sorted(folder.rglob("benchmark*.json")):
        found = json.loads(file.read_text())
        machine = machine or found["machine_info"]["bench"] | {"date": found["datetime"]}
        for one in found["benchmarks"]:
            extra = one["extra_info"]
            fields = extra["workload"] | {"shape": Case(*extra["workload"]["shape"])}
            what = (extra["implementation"], extra["pass"], one["stats"]["median"], extra.get("peak_bytes"))
            results.append(Result(Workload(**fields), *what, extra.get("runs", ""), extra.get("pairs")))
    for file in sorted(folder.glob("machine-*.json")):  # of a visit: each run's
        machine = machine or json.loads(file.read_text())
    for file in sorted(folder.rglob("notes*.json")):
        for key, values in json.loads(file.read_text()).items():
            if key in notes:
                notes[key] |= values
    return results, machine, notes


Measured = dict[tuple[Workload, str, str], Result]


def blocks(folder: Path) -> list[Block]:
    """The whole report."""
    results, machine, notes = load(folder)
    if not results and not list(folder.glob("stage-*.json")):
        raise ValueError(f"folder: expected one with benchmark*.json or stage-*.json; got {folder}")
    measured = {(r.workload, r.implementation, r.which): r for r in results}
    by_group: dict[str, list[Workload]] = {}
    for result in results:
        workloads = by_group.setdefault(result.workload.group, [])
        if result.workload not in workloads:
            workloads.append(result.workload)
    found = []
    if results:
        found.append(_gist(by_group, measured, len(notes["left_out"])))
        found += [Block(name, figure=file) for name, file in plots.draw(results, folder)]
        if find_spec("matplotlib") is None:
            found.append(Block("Plots", "Left out: matplotlib is not installed."))
        found.append(_glance(by_group, measured))
    for group, workloads in by_group.items():
        found += [_times(group, which, workloads, measured) for which in PASSES]
    found += [_memory(by_group, measured), _published(measured)] if results else []
    if ratios := notes["auto_over_torch"]:
        found.append(_overhead(ratios))
    stages = sorted(folder.glob("stage-*.json"))
    found += [_stage(file) for file in stages]
    found += [_simulated(file) for file in stages if file.stem == "stage-steps"]
    return [*found, _left_out(notes["left_out"]), _machine(machine)]


def _machine(machine: dict[str, Any]) -> Block:
    rows = [(key, json.dumps(value) if isinstance(value, dict) else str(value)) for key, value in machine.items()]
    return Block("Machine", "Everything measured below was measured here.", ("what", "found"), rows)


def _ratio(ours: Result | None, other: Result | None) -> list[float] | None:
    """How many times as fast as the other ours is: quartiles around the median, or, without pairs, that of medians."""
    if ours is None or other is None:
        return None
    pairs = ours.pairs or {}
    return pairs.get(other.implementation, [other.seconds / ours.seconds] * 3)


def _gist(by_group: dict[str, list[Workload]], measured: Measured, left_out: int) -> Block:
    """What a reader wants to know first, in sentences."""
    which, kinds = PASSES[1], {"plain": "plain layers", "ragged": "unequal lengths", "reset": "resets"}
    everything = [w for workloads in by_group.values() for w in workloads]
    own, parts = [w for w in everything if _is_torchs(w, measured)], []
    for kind, name in kinds.items():
        workloads = [w for w in everything if w.kind == kind and w not in own]
        for other in (BASELINE, "step loop"):
            found = [_ratio(measured.get((w, OURS, which)), measured.get((w, other, which))) for w in workloads]
            if ratios := [ratio[1] for ratio in found if ratio]:
                parts.append(f"{name}: {_spread(ratios)} as fast as {other} over {len(ratios)} workloads")
    text = f"{OURS}, {which}, the median workload and the range. " if parts else ""
    text += "; ".join(parts) + (". " if parts else "")
    if own:
        found = [_ratio(measured.get((w, OURS, which)), measured.get((w, BASELINE, which))) for w in own]
        if ratios := [ratio[1] for ratio in found if ratio]:
            low, median, high = quartiles(ratios)
            text += f"On {len(ratios)} others it is {BASELINE}'s own kernel: {median:.2f}x (quartiles {low:.2f} and "
            text += f"{high:.2f}), where what is not 1 is the machine's noise. "
    text += f"{left_out} measurements were left out; the reasons are below." if left_out else ""
    return Block("The gist", text)


def _is_torchs(workload: Workload, measured: Measured) -> bool:
    found = [measured.get((workload, OURS, which)) for which in PASSES]
    return any(r is not None and r.is_torchs for r in found)


def _glance(by_group: dict[str, list[Workload]], measured: Measured) -> Block:
    """A row a group and pass: how many times as fast as each of the others we are on its workloads."""
    everything = [w for workloads in by_group.values() for w in workloads]
    others, own = [n for n in _names(everything, measured) if n != OURS], f"where it is {BASELINE}'s own kernel"
    groups = {g: [w for w in of if not _is_torchs(w, measured)] for g, of in by_group.items()}
    groups[own] = [w for w in everything if _is_torchs(w, measured)]
    rows = []
    for (group, workloads), which in itertools.product(groups.items(), PASSES):
        cells = []
        for name in others:
            found = (_ratio(measured.get((w, OURS, which)), measured.get((w, name, which))) for w in workloads)
            cells.append(_spread([ratio[1] for ratio in found if ratio]))
        if any(cells):
            rows.append((group, which, *cells))
    text = f"How many times as fast as the others {OURS} is: the median over a group's workloads, and the range."
    return Block("At a glance", text, ("workloads", "pass", *others), rows)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def _names(workloads: Iterable[Workload], measured: Measured) -> list[str]:
    present = {(w, name) for w, name, _ in measured}
    return [name for name in IMPLEMENTATIONS if any((w, name) in present for w in workloads)]


def _times(group: str, which: str, workloads: list[Workload], measured: Measured) -> Block:
    names = _names(workloads, measured)
    rows = []
    for workload in workloads:
        base, cells = measured.get((workload, BASELINE, which)), []
        for name in names:
            result = measured.get((workload, name, which))
            text = "" if result is None else f"{result.us_per_step:,.2f}"
            if name != BASELINE and (ratio := _ratio(result, base)):
                low, median, high = ratio
                text += f" ({median:.2f}x" + (f", {low:.2f} to {high:.2f})" if low < high else ")")
            cells.append(text)
        rows.append((str(workload), *cells))
    text = f"Microseconds a step; in brackets how many times as fast as {BASELINE}: the median of pairs and quartiles."
    return Block(f"{group}: {which}", text, ("workload", *names), rows)


def _memory(by_group: dict[str, list[Workload]], measured: Measured) -> Block:
    workloads = [w for of_group in by_group.values() for w in of_group]
    names = _names(workloads, measured)
    rows = []
    for workload in workloads:
        found = [measured.get((workload, name, PASSES[1])) for name in names]
        rows.append(
            (
                str(workload),
                *("" if r is None or r.peak_bytes is None else f"{r.peak_bytes / 2**20:,.2f}" for r in found),
            )
        )
    text = "MiB at the peak of one forward and backward, beside input, parameters and upstream gradients."
    return Block("Memory", text, ("workload", *names), rows)


def _published(measured: Measured) -> Block:
    rows = []
    for workload, numbers in PUBLISHED.items():
        for number in numbers:
            value = "" if number.value is None else f"{number.value:,.2f} {number.unit}"
            ours = (in_unit(number, workload, name, measured) for name in (OURS, BASELINE))
            rows.append(
                (str(workload), number.what, number.which, value, *ours, number.hardware, number.source, number.note)
            )
    head = ("workload", "published for", "pass", "published", f"{OURS} here", f"{BASELINE} here")
    text = "Others' numbers, on their hardware, beside ours on this machine; blank where none was stated or measured."
    return Block("Published", text, (*head, "its hardware", "source", "note"), rows)


def in_unit(number: Published, workload: Workload, name: str, measured: Measured) -> str:
    """What we measured of an implementation, in a published number's unit; empty if we did not."""

    def seconds(workload: Workload) -> float | None:
        results = {which: measured.get((workload, name, which)) for which in PASSES}
        forward, both = (result and result.seconds for result in results.values())
        if number.which == "backward":
            return both - forward if both and forward else None
        return forward if number.which == "forward" else both

    if (found := seconds(workload)) is None:
        return ""
    if number.unit == "times":  # as long as the padded twin takes
        twin = seconds(Workload(**{**vars(workload), "kind": "plain"}))
        return f"{found / twin:,.2f} times" if twin else ""
    scale = {"ms": 1e3, "us a step": 1e6 / workload.shape.T}[number.unit]
    return f"{found * scale:,.2f} {number.unit}"


def _overhead(ratios: dict[str, float]) -> Block:
    largest = sorted(ratios.items(), key=lambda item: -item[1])[:10]
    median = statistics.median(ratios.values())
    text = f"Time of backend auto over that of {BASELINE} on CPU tensors, forward, calls in turn: the median of "
    text += f"{len(ratios)} ratios is {median:.3f}, and these are the largest."
    return Block("What auto costs on a CPU", text, ("workload", "ratio"), [(n, f"{r:.3f}") for n, r in largest])


def _stage(file: Path) -> Block:
    """What a stage of bench/gpu.py left: a list of records with the same keys."""
    stage = json.loads(file.read_text())
    head = tuple(dict.fromkeys(key for record in stage["records"] for key in record))
    rows = [tuple(_text(record.get(key)) for key in head) for record in stage["records"]]
    return Block(f"Stage {stage['stage']}", stage["text"], head, rows)


def _simulated(file: Path) -> Block:
    """Simulated over measured time of a step by tier and pass, and the factor that would mend it."""
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in json.loads(file.read_text())["records"]:
        for which in ("forward", "backward"):
            measured, simulated = record.get(which), record.get(f"simulated_{which}")
            if measured and simulated:
                ratios[record["backend"], which].append(simulated / measured)
    rows = [
        (*key, str(len(of)), f"{statistics.geometric_mean(of):.2f}", f"{min(of):.2f} to {max(of):.2f}",
         f"{1 / statistics.geometric_mean(of):.2f}")
        for key, of in sorted(ratios.items())
    ]  # fmt: skip
    head = ("tier", "pass", "kernels", "simulated over measured", "from, to", "factor")
    text = (
        "By fastrnn/inspect/simulator at the data sheet's clock. The factor is fitted to this table, and to no other."
    )
    return Block("Steps, simulated beside measured", text, head, rows)


def _text(value: object) -> str:
    return "" if value is None else f"{value:,.3g}" if isinstance(value, float) else str(value)


def _left_out(left_out: dict[str, str]) -> Block:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out.items():
        by_reason[reason.splitlines()[0]].append(name)
    rows = [(reason, str(len(names)), names[0]) for reason, names in by_reason.items()]
    return Block("Left out", "What was not timed, and why.", ("reason", "measurements", "the first"), rows)


def write(folder: Path) -> None:
    """Write report.md, pictures and report.html into the folder of the results."""
    found = blocks(folder)
    (folder / "report.md").write_text(markdown(found))
    (folder / "report.html").write_text(page(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="with the results of a benchmark")
    args = parser.parse_args()
    write(args.folder)
    print(args.folder / "report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
