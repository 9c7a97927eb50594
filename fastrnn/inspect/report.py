"""One record a pass of what the compiler made of a problem, as JSON, as a table, or as files.

The keys of a record are stable: programs read them. A problem for which no kernel is planned has one record, with the
reason under "missing".
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..planning.kernel_plan import GridTooLargeError
from . import sass
from .compile import Compiled, Launch, Problem, compile_problem
from .resources import resources
from .simulator import note, timeline
from .simulator.simulate import Kernel, Simulated, of_launch
from .simulator.what_if import what_if
from .timing import RATES, modelled

Record = dict[str, Any]
# Of what the compiler leaves, what --dump writes: text as it is, binaries as bytes.
DUMPED = ("ttgir", "llir", "ptx", "cubin", "amdgcn", "hsaco")
TITLE = ("cell", "arch", "dtype", "precision", "hidden", "heads", "batch", "backend")
ONLY_JSON = ("executed_instructions_by_block",)
MUST_BE_ZERO = ("spill_bytes", "weight_global_loads_in_loop", "unguarded_remote_accesses")


class Simulation:
    """How records are to be simulated: what_if adds each resource made free; is_shown keeps what a picture shows."""

    def __init__(self, what_if: bool = False, is_shown: bool = False) -> None:
        self.what_if, self.is_shown = what_if, is_shown
        self.shown: list[Simulated] = []  # of each record with a simulation, in order

    def record(self, launch: Launch) -> Record:
        """The keys of a compiled launch."""
        try:
            found = of_launch(launch)
        except NotImplementedError as reason:
            if self.what_if or self.is_shown:
                raise
            return {"simulated_cycles_per_step": None, "simulated_missing": str(reason)}
        if self.is_shown:
            self.shown.append(found)
        record: Record = {
            "simulated_cycles_per_step": round(found.cycles),
            "simulated_us_per_step": round(found.cycles / RATES[launch.spec.arch].ghz / 1000, 2),
            "simulated_waits": _rounded(found.waits),
            "simulated_uses": _rounded(found.uses),
            "simulated_unknown": list(found.unknown),
        }
        if self.what_if:
            record["simulated_what_if"] = _rounded(what_if(Kernel.of(launch), launch.spec.arch))
        return record


def _rounded(cycles: dict[str, float]) -> dict[str, int]:
    return {name: round(number) for name, number in cycles.items() if number >= 0.5}


def records(
    problem: Problem,
    passes: tuple[str, ...],
    *,
    execute: bool = False,
    measure: bool = False,
    dump: Path | None = None,
    simulation: Simulation | None = None,
) -> Iterator[Record]:
    """A record for each pass; execute adds the error of the compiled PTX, run on the CPU, measure the time on a GPU.

    simulation adds the time of a step by the simulator. Raises ValueError as `fastrnn.plan` does, NotImplementedError
    if a pass cannot be executed, or not simulated where more than its time is asked for, RuntimeError if there is no
    GPU to measure on.
    """
    try:
        compiled = compile_problem(problem, passes)
    except (NotImplementedError, GridTooLargeError) as reason:
        yield _head(problem) | {"missing": str(reason)}
        return
    agreed: dict[str, Any] = {}
    times: dict[str, float] = {}
    if execute:
        from .verify import agreement

        agreed = {which: asdict(found) for which, found in agreement(problem, passes).items()}
    if measure:
        from .measure import us_per_step

        times = us_per_step(problem, passes)
    for which in passes:
        if dump is not None:
            write(problem, compiled, which, dump)
        found = agreed.get(which, {})
        record = _record(problem, compiled, which) | {
            "executed_max_error": found.get("max_error"),
            "executed_budget_used": found.get("budget_used"),  # above 1: wrong
            "executed_instructions_per_step": round(sum(found["instructions_by_block"].values())) if found else None,
            "executed_instructions_by_block": found.get("instructions_by_block"),
        }
        if simulation is not None:
            record |= simulation.record(compiled.launches[which])
        yield record | ({"measured_us_per_step": times[which]} if measure else {})


def _head(problem: Problem) -> Record:
    return {
        "cell": problem.cell,
        "arch": problem.arch,
        "dtype": dtype_name(problem.dtype),
        "precision": problem.precision if problem.dtype == torch.float32 else None,
        "hidden": problem.hidden_size,
        "batch": problem.batch_size,
        "directions": problem.directions,
    } | ({"heads": problem.num_heads} if problem.num_heads > 1 else {})


def _record(problem: Problem, compiled: Compiled, which: str) -> Record:
    launch, kernel = compiled.launches[which], compiled.plan.kernel
    assert kernel is not None
    model = modelled(launch)
    head, used = _head(problem), asdict(resources(launch))
    first = {
        "cell": head["cell"],
        "pass": which,
        "arch": head["arch"],
        "backend": compiled.plan.backend,
        "dtype": head["dtype"],
        "hidden": head["hidden"],
        "batch": head["batch"],
        "programs": kernel.programs,
        "ctas": launch.ctas,
        "warps": launch.warps,
        "registers": used["registers"],
        "spill_bytes": used["spill_bytes"],
        "shared_bytes": used["shared_bytes"],
        "tensor_core_instructions": used["tensor_core_instructions"],
        "weight_bytes_on_chip": kernel.weight_bytes,  # in one program, padding included
        "weight_global_loads_in_loop": used["weight_global_loads_in_loop"],
        "loop_instructions": used["loop_instructions"],
        "loop_stalls": model and model.stalls,
        "loop_waits": model and model.waits,
        "modelled_cycles_per_step": model and model.cycles,  # without the grid barrier
        "dialect": kernel.dialect,
        "modelled_limit": model and model.limit,
        "modelled_bounds": model and model.bounds,
        "modelled_barrier_cycles": model and model.barrier,
        "modelled_us_per_step": model and round(model.us, 2),  # with it
        "shared_bytes_planned": kernel.shared_bytes,
    }
    return first | head | used


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch.", such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def write(problem: Problem, compiled: Compiled, which: str, folder: Path) -> None:
    """Write what the compiler left of a pass to a folder: ttgir, llir, ptx, cubin and sass, or amdgcn and hsaco."""
    folder.mkdir(parents=True, exist_ok=True)
    asm = compiled.launches[which].asm
    dtype = dtype_name(problem.dtype) + (f"-{problem.precision}" if problem.dtype == torch.float32 else "")
    sizes = f"H{problem.hidden_size}-B{problem.batch_size}"
    sizes += f"-N{problem.num_heads}" if problem.num_heads > 1 else ""
    stem = f"{problem.cell}-{sizes}-{dtype}-{problem.arch}-{compiled.plan.backend}-{which}"
    for kind in DUMPED:
        if kind in asm:
            content = asm[kind]
            (folder / f"{stem}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    if "cubin" in asm:
        (folder / f"{stem}.sass").write_text(sass.disassemble(asm["cubin"]))


def as_json(record: Record) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(record)


def print_table(rows: list[Record]) -> None:
    """A table of one problem's records for people: a row a key, a column a pass.

    Raises RuntimeError if rich is missing.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise RuntimeError("tables need rich: pip install rich, or ask for --json") from None
    first = rows[0]
    precision = f" ({first['precision']})" if first["precision"] else ""
    heads = f" in {first['heads']} heads" if "heads" in first else ""
    title = (
        f"{first['cell']}, H={first['hidden']}{heads}, B={first['batch']}, {first['dtype']}{precision}, {first['arch']}"
    )
    console = Console()
    if "missing" in first:
        console.print(f"{title}: no kernel\n  {first['missing']}\n", markup=False, highlight=False)
        return
    table = Table(title=f"{title}: {first['backend']}", title_justify="left", min_width=len(title) + 15)
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_column(row["pass"], justify="right", no_wrap=True)
    for key in first:
        if key not in (*TITLE, *ONLY_JSON, "pass") and not all(row[key] is None for row in rows):
            bad = key in MUST_BE_ZERO and any(row[key] for row in rows)
            table.add_row(key, *(_text(row[key]) for row in rows), style="bold red" if bad else None)
    console.print(table)
    print("modelled: the largest of six bounds, from the compiled code, not measured (fastrnn/inspect/timing.py)")
    if first.get("simulated_cycles_per_step"):
        print(note(first["arch"]))
    print()


def show_steps(
    rows: list[Record], simulation: Simulation, say: Callable[[str], None] | None, file: str, *, is_alone: bool
) -> None:
    """Print the simulated step of each record and draw it into the file, or into files beside it if there are several.

    Raises RuntimeError for a picture without matplotlib.
    """
    for row, simulated in zip(rows, simulation.shown, strict=False):
        names = [str(row[key]) for key in ("cell", "hidden", "dtype", "arch", "pass")]
        if say is not None:
            for line in (f"{', '.join(names)}:", *timeline.text(simulated), note(row["arch"]), ""):
                say(line)
        if file:
            path = Path(file)
            path = path if is_alone else path.with_stem(f"{path.stem}-{'-'.join(names)}")
            timeline.picture(simulated, ", ".join(names), path)


def _text(value: object) -> str:
    if isinstance(value, list):
        return "\n".join(value) or "none"
    if isinstance(value, dict):
        return "\n".join(f"{name} {count:,}" for name, count in value.items()) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
