"""Write what the compiler makes of the planned kernels into tests/snapshots/inspect.jsonl.

    python -m bench.inspect_table            write the snapshot anew (make snapshots); its diff shows what a change did
    python -m bench.inspect_table --full F   compile all that the planner may pick (make inspect) and write it to F

The snapshot's first line names the Triton that it is from. Each record is compiled by `python -m fastrnn inspect`, in a
process of its own, since this one may interpret kernels.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from fastrnn.device import SPECS, DeviceSpec

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "snapshots" / "inspect.jsonl"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Resident: the largest sizes that each limit admits, a padded one and the smallest. Cooperative: sizes aligned and not,
# narrow and wide tiles, shares in one piece and in several, up to where shared memory ends.
GROUPS = {
    "resident lstm": "--backend resident --cell lstm --hidden 7 64 100 128 --dtype bfloat16 float32",
    "resident gru": "--backend resident --cell gru --hidden 7 64 100 128 --dtype bfloat16 float32",
    "resident rnn": "--backend resident --cell rnn_tanh --hidden 128 256 --dtype bfloat16 float32",
    "cluster": "--backend cluster --cell lstm gru rnn_tanh --hidden 96 256 512 --dtype bfloat16",
    "cluster tf32": "--backend cluster --cell lstm gru --hidden 256 --dtype float32 --precision tf32",
    "resident in waves": "--backend resident --cell lstm gru rnn_tanh slstm --hidden 50 64 --batch 2800",
    "resident in waves, tf32": "--backend resident --cell lstm rnn_tanh slstm --hidden 64 --batch 2800 --dtype float32",
    "cluster in waves": "--backend cluster --cell lstm gru rnn_tanh slstm --hidden 128 256 --batch 8192",
    "cooperative lstm": "--backend cooperative --cell lstm --hidden 192 650 --dtype bfloat16 float32",
    "cooperative gru": "--backend cooperative --cell gru --hidden 384 --dtype float16 float32 --precision tf32",
    "cooperative, batch 64": "--backend cooperative --cell gru lstm --hidden 512 --batch 64",
    "cooperative, large": "--backend cooperative --cell lstm gru rnn_relu --hidden 1000 1500 2048",
    "auto, batch 64": "--backend auto --cell gru --hidden 1024 --batch 64",
    "slstm resident": "--backend resident --cell slstm --hidden 7 64 128 --dtype bfloat16 float32",
    "slstm cluster": "--backend cluster --cell slstm --hidden 128 256 --dtype bfloat16",
    "slstm cooperative": "--backend cooperative --cell slstm --hidden 650 768 --dtype bfloat16 float32",
    "heads": "--backend auto --cell slstm lstm --hidden 768 --heads 6 --dtype bfloat16",
    "heads of 32": "--backend auto --cell slstm lstm --hidden 768 --heads 24 --dtype bfloat16",
}
FULL = "--cell {cell} --hidden 16 64 128 256 384 512 650 1024 1500 2048 --dtype bfloat16 float16 float32"
KEPT = (
    "group", "arch", "cell", "dtype", "precision", "hidden", "heads", "batch", "missing", "pass", "backend", "dialect",
    "programs", "warps", "registers", "spill_bytes", "shared_bytes", "shared_bytes_planned", "occupancy",
    "tensor_core_instructions", "weight_global_loads", "weight_global_loads_in_loop", "global_loads_in_loop",
    "barriers_in_loop", "unguarded_remote_accesses", "loop_instructions", "modelled_cycles_per_step", "modelled_limit",
)  # fmt: skip
Record = dict


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, which compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def compile_group(group: str, arch: str, flags: str, run: Callable = run) -> list[Record]:
    """Compile what the flags of `fastrnn inspect` ask for, on an architecture; the keys that the table keeps."""
    flags = flags if "--precision" in flags else f"{flags} --precision ieee tf32"
    command = ["-m", "fastrnn", "inspect", "--json", "--bounds", "--arch", arch, *flags.split()]
    done = run(command)
    if done.returncode not in (0, 1) or not done.stdout:  # 1: nothing is planned, which a record says
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    rows = [{"group": group, **json.loads(line)} for line in done.stdout.splitlines()]
    return sorted(({key: row[key] for key in KEPT if key in row} for row in rows), key=json.dumps)


def faults(record: Record) -> list[str]:
    """Return the faults of this kernel: what must not be true of any planned kernel."""
    if "missing" in record:
        return []
    spec = DeviceSpec.named(record["arch"])
    has_tensor_core = record["dtype"] != "float32" or record["precision"] == "tf32" or spec.is_amd
    checks = {
        "registers spill": record["spill_bytes"] > 0,
        "W_hh is loaded in the time loop": record["weight_global_loads_in_loop"] > 0,
        "shared memory of another program without a cluster barrier": record["unguarded_remote_accesses"] > 0,
        "no load of W_hh was found at all": record["weight_global_loads"] == 0,
        "more shared memory than planned": record["shared_bytes"] > record["shared_bytes_planned"],
        "more shared memory than there is": record["shared_bytes_planned"] > spec.shared_bytes,
        "no program fits a multiprocessor": record["occupancy"] < 1,
        "tensor cores": bool(record["tensor_core_instructions"]) != has_tensor_core,
    }
    return [what for what, is_true in checks.items() if is_true]


def snapshot() -> tuple[str, list[Record]]:
    """The Triton version that the committed table is from, and its records."""
    first, *lines = SNAPSHOT.read_text().splitlines()
    return json.loads(first)["triton"], [json.loads(line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", type=Path, metavar="FILE", help="write the full table to FILE instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.full:
        archs = [arch for arch in SPECS if arch != "interpreter"]
        tasks = [
            (cell, arch, FULL.format(cell=cell)) for arch in archs for cell in ("lstm", "gru", "rnn_tanh", "slstm")
        ]
    else:
        tasks = [(group, arch, flags) for arch in ARCHS for group, flags in GROUPS.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(itertools.chain.from_iterable(pool.map(compile_group, *zip(*tasks, strict=True))))
    path = args.full or SNAPSHOT
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"triton": version("triton")}), *(json.dumps(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    wrong = [(row, found) for row in rows if (found := faults(row))]
    for row, found in wrong:
        print(f"{'; '.join(found)}: {json.dumps(row)}")
    print(f"{sum('missing' not in row for row in rows)} kernels compiled, {len(wrong)} at fault: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
