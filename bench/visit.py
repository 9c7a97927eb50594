"""The stages of bench/gpu.py: what each one runs, in the order in which a visit to a GPU is worth most."""

import importlib.util
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable

from . import launches, needed
from .processes import ROOT, Done, at_once, jobs, lines_item, run, write_log
from .stages import Item, Record, Setup

LAUNCH_LIMIT = 60  # seconds of a process that launches once
TEST_LIMIT = 180  # seconds of one test
# Tests that need no GPU to say all that they say, or packages that a GPU machine may lack.
ELSEWHERE = {
    "bench", "char_lm", "cluster", "codegen", "compiled", "docs", "examples", "execute", "foreign", "inspect",
    "interpreter", "matrix", "measured", "mutations", "packaging", "planner", "backends_page", "real_models",
    "segment_mutations", "tuning", "xlstm_lm",
}  # fmt: skip
KERNELS = ("recurrence", "sequences", "cells", "checkpoint", "proj_size", "options")
LAYERS = (
    "ops", "modules", "bad_input", "torch_inputs", "streaming", "dropout", "double_backward", "func", "wavefront",
    "segments",
)  # fmt: skip
# Tier, cell, H of the launches that a sanitizer watches and a profiler counts.
WATCHED = (("resident", "lstm", 64), ("cooperative", "lstm", 256), ("cluster", "lstm", 256))
COUNTED = (("resident", "lstm", 128), ("cooperative", "lstm", 1024))
PUBLISHED = "FlashRNN"  # the group of the table by which it can be compared
# Packages whose cells convert makes ours: what bench/<package>.py needs.
CLIENTS = {"tirex": ("tirex", "statsmodels"), "xlstm": ("xlstm",)}


def machine(setup: Setup) -> list[Item]:
    """What is installed and which GPU there is."""

    def doctor(seconds: float) -> list[Record]:
        done = run([sys.executable, "-m", "fastrnn", "doctor"], seconds, setup.dry)
        write_log(setup, "doctor", done)
        if done.status:
            return [{"what": "doctor", "error": done.reason}]
        return [{"what": line[:20].strip(), "found": line[20:].strip()} for line in done.output.splitlines()]

    def driver(seconds: float) -> list[Record]:
        if shutil.which("nvidia-smi") is None:
            return [{"what": "nvidia-smi", "missing": "not installed"}]
        done = run(["nvidia-smi"], seconds)
        write_log(setup, "nvidia-smi", done)
        return [{"what": "nvidia-smi", "exit status": done.status}]

    return [Item("doctor", doctor, 60), Item("nvidia-smi", driver, 20)]


def correctness(setup: Setup) -> list[Item]:
    """Both passes against the reference: one of each tier, then more; each in a process of its own."""

    def check(cases: tuple[tuple, ...]) -> list[Record]:
        commands = [[sys.executable, "-m", "bench.launches", "check", *map(str, case)] for case in cases]
        records = []
        for case, done in zip(cases, at_once(commands, LAUNCH_LIMIT, setup.dry), strict=True):
            record = dict(zip(("tier", "cell", "H", "dtype", "kind"), case, strict=True))
            try:
                records.append(record | json.loads(done.output.strip().splitlines()[-1]))
            except (IndexError, json.JSONDecodeError):
                write_log(setup, "-".join(map(str, case)), done)
                records.append(record | {"error": done.reason})
        return records

    if setup.dry:
        return [Item("one of each tier", lambda _: check(launches.DRY), LAUNCH_LIMIT * len(launches.DRY))]
    size = jobs(len(launches.MORE))
    rest = [launches.MORE[start : start + size] for start in range(0, len(launches.MORE), size)]
    # With two cores and fewer, one after the other.
    first = Item("one of each tier", lambda _: check(launches.FIRST), LAUNCH_LIMIT * (1 if size >= 3 else 3))
    return [first] + [Item(f"more, {n}", lambda _, c=c: check(c), LAUNCH_LIMIT) for n, c in enumerate(rest, 1)]


def tests_of(setup: Setup, key: str, names: list[str], limit: float, chosen: str = "") -> Item:
    """An item that runs test files natively."""

    def work(seconds: float) -> list[Record]:
        name, command = key.replace(" ", "-"), [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rf"]
        # Another torch may warn of what this one does not: that fails no test here.
        command += ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
        command += [f"--junitxml={setup.folder / f'junit-{name}.xml'}", *(["-k", chosen] if chosen else [])]
        if importlib.util.find_spec("xdist") and not setup.dry:
            command += ["-n", "8"]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", str(TEST_LIMIT)]
        done = run(
            [
                *command,
                *(str(file.relative_to(ROOT)) for name in names for file in (ROOT / "tests").rglob(f"test_{name}.py")),
            ],
            seconds,
            setup.dry,
        )
        write_log(setup, f"tests {name}", done)
        return [tally(key, done)]

    return Item(key, work, limit)


def tally(key: str, done: Done) -> Record:
    """What a run of pytest came to: its last lines."""
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)\b", done.output[-2000:])
    record: Record = {"tests": key, "exit status": done.status, "s": round(done.seconds)}
    record |= {what: int(count) for count, what in found}
    failed = re.findall(r"^FAILED (\S+)", done.output, re.M)
    if failed:
        record["failed tests"] = ", ".join(failed[:20])
    return record | ({"error": done.reason} if done.timed_out or (done.status and not found) else {})


def tests(setup: Setup) -> list[Item]:
    """The kernels' tests, those of what only a GPU has, and those of the layers."""
    if setup.dry:
        return [tests_of(setup, "kernels", ["recurrence"], 60, "T1-B1-H7 and gru and float32")]
    named = {"kernels": list(KERNELS), "only a GPU": ["native"], "layers": list(LAYERS)}
    return [tests_of(setup, key, names, 120) for key, names in named.items()]


def steps(setup: Setup) -> list[Item]:
    """Microseconds a step beside the model's: tiers and clusters beside one another; what is planned."""
    planned = lines_item(setup, "steps", "bench.steps", "planned")
    if setup.dry:
        return [planned]
    beside = lines_item(setup, "tiers", "bench.steps", "tiers")
    return [beside, planned, lines_item(setup, "clusters", "bench.steps", "clusters", least=20)]


def group_of(setup: Setup, group: str) -> Item:
    """An item that times a group of the table beside whatever else is installed."""

    def work(seconds: float) -> list[Record]:
        record: Record = {"group": group}
        if importlib.util.find_spec("pytest_benchmark") is None:
            return [record | {"missing": "pytest-benchmark is not installed"}]
        name = group.replace(" ", "-")
        command = [sys.executable, "-m", "pytest", "bench/test_speed.py", "-q", "-p", "no:cacheprovider"]
        command += ["--benchmark-quiet", "--only", group, "--out", str(setup.folder / name)]
        command += [f"--limit={seconds / 2}", f"--benchmark-json={setup.folder / f'benchmark-{name}.json'}"]
        command += ["-k", "T1-B1-H7 and gru", "--seconds=0"] if setup.dry else []
        done = run(command, seconds, setup.dry)
        write_log(setup, f"suite {name}", done)
        record |= {"exit status": done.status, "s": round(done.seconds)}
        return [record | ({"error": done.reason} if done.timed_out else {"pytest": done.output.strip()[-120:]})]

    return Item(group, work, 60)


def layers(setup: Setup) -> list[Item]:
    """Layers beside torch.nn's, 16-bit dtypes side by side; then the table that FlashRNN has published."""
    groups = ("float16", "bfloat16", "float32", "segments", "shapes")
    compared = lines_item(setup, "compare", "bench.layers", *groups)
    return [compared] if setup.dry else [compared, group_of(setup, PUBLISHED)]


def host(setup: Setup) -> list[Item]:
    """Host time of a call, CUDA graphs."""
    return [lines_item(setup, "host", "bench.host", least=20)]


def forms(setup: Setup) -> list[Item]:
    """What the planner may choose from, and what it may not."""
    return [
        lines_item(setup, "tuning", "bench.forms", "tuning"),
        lines_item(setup, "forms", "bench.forms", "sweep"),
    ]


def tools(setup: Setup) -> list[Item]:
    """compute-sanitizer on a short launch a tier, ncu on two kernels, where they are."""

    def watch(tool: str, tier: str, cell: str, H: int, seconds: float) -> list[Record]:
        record: Record = {"program": "compute-sanitizer", "tool": tool, "launch": f"{tier} {cell} H={H}"}
        if shutil.which("compute-sanitizer") is None:
            return [record | {"missing": "compute-sanitizer is not installed"}]
        command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "bench.launches"]
        done = run([*command, "once", tier, cell, str(H), "8"], seconds, setup.dry)
        write_log(setup, f"{tool} {tier}", done)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output + done.errors)
        if done.timed_out or not summary:
            return [record | {"missing" if "NotImplementedError" in done.errors else "error": done.reason}]
        return [record | {"summary": summary[-1], "exit status": done.status}]

    def count(tier: str, cell: str, H: int, seconds: float) -> list[Record]:
        record: Record = {"program": "ncu", "launch": f"{tier} {cell} H={H}"}
        if shutil.which("ncu") is None:
            return [record | {"missing": "ncu is not installed"}]
        command = ["ncu", "--set", "full", "--import-source", "no", "--csv", "--print-units", "base", "-k", "forward"]
        command += ["-c", "1", sys.executable, "-m", "bench.launches", "once", tier, cell, str(H), "64"]
        done = run(command, seconds, setup.dry)
        (setup.folder / f"ncu-{tier}.csv").write_text(done.output)
        return [record | ({"error": done.reason} if done.status else {"lines": done.output.count("\n")})]

    watched = itertools.product(("memcheck", "racecheck"), WATCHED)
    items = [Item(f"{tool} {w[0]}", lambda s, t=tool, w=w: watch(t, *w, seconds=s), 30) for tool, w in watched]
    return items + [Item(f"ncu {c[0]}", lambda s, c=c: count(*c, seconds=s), 30) for c in COUNTED]


def suite(setup: Setup) -> list[Item]:
    """bench/test_speed.py, a group of the table at a time, then the tests that are left."""
    from .cases import table

    groups = dict.fromkeys(w.group for w in table("cpu" if setup.dry else "cuda"))
    groups.pop(PUBLISHED, None)  # done among the layers
    # First what decides between tiers, then what others have published.
    first = ("small H", "reset", "ragged", "over H", "packed", "DeepBench", "TorchRL")
    chosen = ["tests"] if setup.dry else sorted(groups, key=lambda g: first.index(g) if g in first else len(first))
    items = [group_of(setup, group) for group in chosen]
    if setup.dry:
        return items
    names = {file.stem.removeprefix("test_") for file in (ROOT / "tests").rglob("test_*.py")}
    rest = sorted(names - ELSEWHERE - {*KERNELS, *LAYERS, "native"})
    return [*items, tests_of(setup, "the rest", rest, 150)]


def clients(setup: Setup) -> list[Item]:
    """Cells of other packages on ours: their tests, natively, and times beside their own code's."""

    def skipped(name: str, modules: list[str]) -> Item:
        names = " and ".join(needed.PACKAGES[module][0] for module in modules)
        missing = f"{names} {'is' if len(modules) == 1 else 'are'} not installed"
        return Item(name, lambda _: [{"client": name, "missing": missing}], 1)

    absent = {name: [m for m in modules if needed.is_missing(m)] for name, modules in CLIENTS.items()}
    items = []
    if all(name in modules for name, modules in absent.items()):
        items.append(skipped("converted cells", list(absent)))
    else:
        items.append(tests_of(setup, "converted cells", ["foreign"], 60, "computes_what and auto" if setup.dry else ""))
    for name, modules in absent.items():  # nvcc takes a minute
        items.append(skipped(name, modules) if modules else lines_item(setup, name, f"bench.{name}", least=60))
    return items


STAGES: dict[str, tuple[str, Callable[[Setup], list[Item]]]] = {
    "machine": ("What `python -m fastrnn doctor` says.", machine),
    "correctness": ("Both passes of each tier against the reference, on this device.", correctness),
    "tests": ("The tests, run natively.", tests),
    "steps": ("Microseconds a step: measured between two lengths of sequence, and simulated, which is too few.", steps),
    "layers": ("Milliseconds of whole layers, ours and torch.nn's, T = 1024.", layers),
    "host": ("Microseconds until a call returns; training steps as CUDA graphs.", host),
    "forms": ("Microseconds a step of forms of a kernel; the planner's fastest are written down.", forms),
    "tools": ("What compute-sanitizer and ncu say.", tools),
    "suite": ("What became of each group of the table, and of the other tests.", suite),
    "clients": ("Cells of xlstm and TiRex, converted: milliseconds beside their own code, and the tests.", clients),
}
