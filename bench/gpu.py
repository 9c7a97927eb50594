"""All that one visit to a GPU should bring, by one command, in under nine minutes, resumable.

    python -m bench.gpu                 into bench/results/<gpu>-<date>/
    python -m bench.gpu --dry-run       the same stages on a CPU: tiny sizes, kernels interpreted, no time of theirs

Stages: correctness (every tier against the reference), model (modelled beside measured time), tuning (the planner's
open choices, into fastrnn/tuned/<arch>.json), suite (bench/test_speed.py, group by group), report. Each has its share
of the time and leaves stage-<name>.json after every item, so that a second run goes on where the first one stopped.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .stages import Item, Record, Setup, run_stage, write_json

ROOT = Path(__file__).parents[1]
SECONDS = 520  # of all stages; an item that has begun is waited for


def correctness(setup: Setup) -> list[Item]:
    """Every cell in every tier, ragged and with resets too, against the reference."""
    from fastrnn.inspect.doctor import HELD
    from fastrnn.reference import GATES
    from tests.cases import Case

    from .adapters import Missing
    from .agreement import disagreement
    from .workload import KINDS, Workload

    def check(tier: str, workload: Workload) -> list[Record]:
        record: Record = {"workload": str(workload), "tier": tier}
        try:
            wrong = disagreement(f"fastrnn {tier}", workload, "cpu" if setup.dry else "cuda")
        except Missing as reason:
            return [record | {"missing": str(reason)}]
        return [record | {"disagreement": json.dumps(wrong) if wrong else "none"}]

    items = []
    for kind in KINDS:
        for cell in ("gru",) if setup.dry else GATES:
            for tier, held in HELD.items():
                T, B, H = (2, 2, 8) if setup.dry else (33, 17, held)
                D = 1 if kind == "plain" else 2
                dtype = "float32" if setup.dry else "bfloat16"
                workload = Workload("correctness", cell, Case(T, B, H, D), dtype, kind=kind, p=0.1)
                items.append(Item(f"{workload} {tier}", lambda _, t=tier, w=workload: check(t, w)))
    return items


def model(setup: Setup) -> list[Item]:
    """What the model says of each tier's kernels, beside what a step takes."""
    shown = ("cell", "pass", "hidden", "backend", "ctas", "warps", "spill_bytes", "modelled_limit")
    times = ("modelled_us_per_step", "measured_us_per_step")

    def inspect(cell: str, hidden: int, left: float) -> list[Record]:
        arch = "sm_90" if setup.dry else setup.arch
        command = [sys.executable, "-m", "fastrnn", "inspect", "--cell", cell, "--hidden", str(hidden)]
        command += ["--arch", arch, "--json", *([] if setup.dry else ["--measure"])]
        done = _run(command, left, interpret=False)
        records = []
        for row in map(json.loads, done.stdout.splitlines()):
            if "missing" in row:
                return [{"cell": cell, "hidden": hidden, "missing": row["missing"]}]
            record = {key: row[key] for key in shown} | {key: row.get(key) for key in times}
            modelled, measured = (record[key] for key in times)
            records.append(record | {"measured / modelled": measured / modelled if measured and modelled else None})
        if not records:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return records

    cells, sizes = (("gru",), (16,)) if setup.dry else (("lstm", "gru", "rnn_tanh"), (64, 128, 256, 512, 1024))
    return [Item(f"{cell} H={H}", lambda left, cell=cell, H=H: inspect(cell, H, left)) for H in sizes for cell in cells]


def suite(setup: Setup) -> list[Item]:
    """bench/test_speed.py, a group of the table at a time."""
    from .cases import table

    def measure(group: str, left: float) -> list[Record]:
        name = group.replace(" ", "-")
        command = [sys.executable, "-m", "pytest", "bench/test_speed.py", "-q", "-p", "no:cacheprovider"]
        command += ["--benchmark-quiet", "--only", group, "--out", str(setup.folder / name), f"--limit={left}"]
        command += [f"--benchmark-json={setup.folder / f'benchmark-{name}.json'}"]
        command += ["-k", "T1-B1-H7 and gru", "--seconds=0"] if setup.dry else []
        done = _run(command, left + 60, interpret=setup.dry)
        (setup.folder / f"log-{name}.txt").write_text(done.stdout + done.stderr)
        return [{"group": group, "exit status": done.returncode, "pytest": done.stdout.strip().splitlines()[-1]}]

    groups = dict.fromkeys(w.group for w in table("cpu" if setup.dry else "cuda"))
    # First what others have published, then what decides between tiers.
    first = ("FlashRNN", "small H", "reset", "ragged", "over H", "packed", "DeepBench", "TorchRL")
    chosen = ["tests"] if setup.dry else sorted(groups, key=lambda g: first.index(g) if g in first else len(first))
    return [Item(group, lambda left, group=group: measure(group, left)) for group in chosen]


def _run(command: list[str], seconds: float, interpret: bool) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(seconds, 60))


def visit(setup: Setup) -> int:
    """All stages, and the report; 1 if something disagrees or failed."""
    from . import clock, report, tune

    setup.folder.mkdir(parents=True, exist_ok=True)
    write_json(setup.folder / "machine.json", clock.machine())
    texts = {
        "correctness": "Every tier against the fp64 reference, on this device.",
        "model": "Modelled by fastrnn/inspect/timing.py, measured between two lengths of sequence.",
        "tuning": "Microseconds a step of each form that the planner may take; the fastest is written down.",
        "suite": "What became of each group of the table.",
    }
    records = []
    for stage, items in {"correctness": correctness, "model": model, "tuning": tune.items, "suite": suite}.items():
        found = run_stage(setup, stage, texts[stage], items(setup))
        if stage == "tuning" and found:
            tune.write(setup)
        records += found
    report.write(setup.folder)
    print(setup.folder / "report.html")
    bad = [r for r in records if "error" in r or r.get("disagreement", "none") != "none" or r.get("exit status")]
    for record in bad:
        print(f"failed: {record}", file=sys.stderr)
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--out", type=Path, help="folder of the results; one that exists is gone on with")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages")
    args = parser.parse_args(arguments)
    if args.dry_run:  # before fastrnn is imported, which reads it
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from fastrnn.device import DeviceSpec

    if not args.dry_run and not torch.cuda.is_available():
        print("this needs a GPU, and torch finds none here; --dry-run runs the stages on a CPU", file=sys.stderr)
        return 2
    spec = DeviceSpec.of(torch.device("cpu" if args.dry_run else "cuda"))
    name = re.sub(r"\W+", "-", "dry-run" if args.dry_run else torch.cuda.get_device_name())
    folder = args.out or ROOT / "bench" / "results" / f"{name}-{datetime.date.today()}"
    return visit(Setup(folder.resolve(), spec.arch, args.dry_run, args.seconds, time.monotonic()))


if __name__ == "__main__":
    raise SystemExit(main())
