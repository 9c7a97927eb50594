"""Measure and test everything that needs a GPU, in one command of under nine minutes that can be resumed.

    python -m bench.gpu                    into bench/results/<gpu>-<date>/
    python -m bench.gpu --out FOLDER       into another; all that is found goes there, in eight files at most
    python -m bench.gpu --dry-run          the same stages on a CPU: tiny sizes, kernels interpreted, no time of theirs

bench/visit.py has the stages, the most wanted first; each has its share of the time. An item that cannot end in what is
left is not begun. After every item what there is is packed into the folder (bench/packing.py), and a second run, on
another machine too, unpacks it and goes on.
"""

import argparse
import datetime
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from .stages import Record, Setup, run_stage, write_json

ROOT = Path(__file__).parents[1]
SECONDS = 520  # of all stages


def failed(record: Record) -> bool:
    """Whether a record is of something that went wrong."""
    wrong = record.get("disagreement", "none") != "none" or record.get("equal") is False
    return wrong or "error" in record or bool(record.get("exit status"))


def everything(setup: Setup) -> int:
    """Run all stages and write the report. Return 1 if something disagrees or failed."""
    from . import clock, report, tune, visit

    setup.folder.mkdir(parents=True, exist_ok=True)
    machine = setup.folder / f"machine-{len(list(setup.folder.glob('machine-*.json'))) + 1}.json"  # of each run
    write_json(machine, clock.machine())
    records = []
    for stage, (text, items) in visit.STAGES.items():
        records += run_stage(setup, stage, text, items(setup))
        if (setup.folder / "tuning.jsonl").exists():
            tune.write(setup)
    report.write(setup.folder)
    if setup.out:
        print(setup.out / "report.html")
    bad = [record for record in records if failed(record)]
    for record in bad:
        print(f"failed: {json.dumps(record)}", file=sys.stderr)
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--out", type=Path, help="folder of the results; if it exists, the run goes on there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all stages (default: {SECONDS})")
    args = parser.parse_args(arguments)
    if args.dry_run:  # before fastrnn is imported, which reads it
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from fastrnn.device import DeviceSpec

    from . import packing

    if not args.dry_run and not torch.cuda.is_available():
        print("this needs a GPU, and torch finds none here; --dry-run runs the stages on a CPU", file=sys.stderr)
        return 2
    spec = DeviceSpec.of(torch.device("cpu" if args.dry_run else "cuda"))
    name = re.sub(r"\W+", "-", "dry-run" if args.dry_run else torch.cuda.get_device_name())
    out = (args.out or ROOT / "bench" / "results" / f"{name}-{datetime.date.today()}").resolve()
    with tempfile.TemporaryDirectory(prefix="fastrnn-visit-") as folder:
        packing.unpack(out, Path(folder))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it started ends with it
        try:
            return everything(Setup(Path(folder), spec.arch, args.dry_run, args.seconds, started, out))
        finally:
            packing.pack(Path(folder), out)


if __name__ == "__main__":
    raise SystemExit(main())
