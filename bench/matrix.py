"""Run the kernels with each Triton that a torch pins, each installed in its own folder, beside the installed torch.

    python -m bench.matrix                    every version, a table; exit status 1 if anything failed
    python -m bench.matrix --quick            a part, for CI
    python -m bench.matrix --triton 3.6.0     one version

Of each version: kernels interpreted, every tier compiled (spills, W_hh in the time loop, unguarded shared memory of
other programs), some executed from their PTX, and launched by the version's own launcher on a driver of ours. pip
installs each version into runs/triton/<version>, never into the environment, and the next run finds it there. Each
check runs in processes of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from fastrnn.planning.tiers import TIERS

from .inspect_table import faults

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "triton"
# Those that torch from PyPI pins: 2.11; 2.12 and 2.13; 2.14; 2.15.
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
ARCHS = ("sm_80", "sm_90", "sm_100")
LIMIT = 1200  # seconds of a check
COMPILED = {
    "resident": "--cell lstm gru rnn_tanh --hidden 64 100 128 --dtype bfloat16 float32",
    "cluster": "--cell lstm gru rnn_tanh --hidden 96 256 512 --dtype bfloat16",
    "cooperative": "--cell lstm gru rnn_tanh --hidden 262 1024 --dtype bfloat16 float32",
}
QUICK = {  # both dialects
    "resident": "--cell lstm --hidden 64 --dtype bfloat16 float32",
    "cluster": "--cell lstm --hidden 256 --dtype bfloat16",
    "cooperative": "--cell gru --hidden 262 --dtype bfloat16 float32",
}
# Arguments of tests.support.executed. The shorter one has lengths and resets, of two cells.
EXECUTED, QUICK_EXECUTED = ("kernels sm_90 {tier}",), ("sequences sm_90 {tier} lengths,",)
INTERPRETED, QUICK_INTERPRETED = "bfloat16 or float32", "T5-B3 and (lstm or gru) and bfloat16"


class NoPipError(RuntimeError):
    """Raised if pip is missing and a version is not installed."""


class Row(NamedTuple):
    """What a check of a version found: "passed", "skipped: reason" or "failed: reason"."""

    triton: str
    what: str
    result: str


class Triton(NamedTuple):
    """One version: where it lies (None: it is the environment's own), and which checkout runs with it."""

    version: str
    folder: Path | None
    root: Path = ROOT

    def run(self, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
        """Run Python with this Triton in front of any other."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
        paths = [str(self.folder)] * (self.folder is not None) + [environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TRITON_INTERPRET"] = "1" if interpret else "0"
        command = [sys.executable, *arguments]
        try:
            return subprocess.run(
                command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"it took more than {LIMIT} s")


def installed(wanted: str) -> Triton:
    """Install a version into its folder, unless it is there or is the environment's own."""
    try:
        if version("triton").split("+")[0] == wanted:
            return Triton(wanted, None)
    except PackageNotFoundError:
        pass
    folder = FOLDER / wanted
    stamp = folder / "installed"
    if not stamp.exists():
        if find_spec("pip") is None:
            raise NoPipError("pip is missing")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--upgrade", "--target", str(folder), f"triton=={wanted}"]
        # A constraint that pins another version is for the environment.
        done = subprocess.run(command, env=os.environ | {"PIP_CONSTRAINT": ""}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        stamp.touch()
    return Triton(wanted, folder)


def imported(triton: Triton) -> str:
    """Whether the version is what a process imports."""
    done = triton.run("-c", "import triton; print(triton.__version__)")
    found = done.stdout.strip()
    return "passed" if found == triton.version else f"failed: {found or reason_of(done)}"


def interpreted(triton: Triton, chosen: str) -> str:
    """tests/ops/test_recurrence.py in Triton's interpreter."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--tb=line"]
    command += ["--wide=yes", "tests/ops/test_recurrence.py", "-k", chosen]
    done = triton.run(*command, interpret=True)
    if done.returncode == 0:
        return "passed"
    return f"failed: {reason_of(done)}"


def compiled(triton: Triton, tier: str, flags: str, archs: tuple[str, ...]) -> str:
    """What `fastrnn inspect` finds of a tier's kernels."""
    command = ["-m", "fastrnn", "inspect", "--json", "--backend", tier, "--precision", "ieee", "tf32"]
    done = triton.run("-W", "error", *command, "--arch", *archs, *flags.split())
    if done.returncode not in (0, 1) or not done.stdout:  # 1: nothing is planned, which the records say
        return f"failed: {reason_of(done)}"
    return judged(triton, tier, [json.loads(line) for line in done.stdout.splitlines()])


def judged(triton: Triton, tier: str, records: list[dict]) -> str:
    """What records of compiled kernels come to: there must be kernels, except clusters before Triton 3.8."""
    wrong = [f"{r['cell']} H={r['hidden']} {r['arch']} {r['pass']}: {w}" for r in records for w in faults(r)]
    kernels = [record for record in records if "missing" not in record]
    if wrong:
        return f"failed: {len(wrong)} fault(s), the first: {wrong[0]}"
    if kernels:
        return f"passed: {len(kernels)} kernels"
    reason = records[0]["missing"]
    before_3_8 = tuple(map(int, triton.version.split(".")[:2])) < (3, 8)
    return f"{'skipped' if tier == 'cluster' and before_3_8 else 'failed'}: {reason}"


def executed(triton: Triton, tier: str, commands: tuple[str, ...]) -> str:
    """What tests.support.executed finds in a tier's kernels as they were compiled."""
    records = []
    for command in commands:
        done = triton.run("-W", "error", "-m", "tests.support.executed", *command.format(tier=tier).split())
        if done.returncode:
            reason = reason_of(done)
            return f"{'skipped' if 'NotImplementedError: ' in reason and tier == 'cluster' else 'failed'}: {reason}"
        records += [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [record for record in records if record["faults"] or record.get("spills")]
    return f"failed: {wrong[0]}" if wrong else f"passed: {len(records)} problems"


def launched(triton: Triton, tier: str) -> str:
    """What tests.support.launcher finds in a tier's launches, as they reach the driver."""
    done = triton.run("-W", "error", "-m", "tests.support.launcher.run", "launches", tier)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not records:
        return f"failed: {reason_of(done)}"
    wrong = [record for record in records if record["faults"]]
    return f"failed: {wrong[0]}" if wrong else f"passed: {len(records)} launches"


def reason_of(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a process's output that says most: a compiler's cause, pytest's failure, the exception."""
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    for said in (r"\w+(Error|Exception)\(", r"E  |FAILED", r"[\w.]+(Error|Exception)\b"):
        if told := [line for line in lines if re.match(said, line)]:
            return told[-1][:300]
    return (lines or [f"exit status {done.returncode}"])[-1][:300]


def checks(triton: Triton, quick: bool) -> Iterator[Row]:
    """Yield every check of one version, as they end."""
    found = imported(triton)
    yield Row(triton.version, "import", found)
    if found != "passed":
        return
    chosen = QUICK_INTERPRETED if quick else INTERPRETED
    yield Row(triton.version, "interpreted", interpreted(triton, chosen))
    for tier in TIERS:
        flags, archs = (QUICK[tier], ("sm_90",)) if quick else (COMPILED[tier], ARCHS)
        if tier == "cluster":
            archs = tuple(arch for arch in archs if arch != "sm_80")  # which has none
        found = compiled(triton, tier, flags, archs)
        yield Row(triton.version, f"{tier}, compiled", found)
        if found.startswith("passed"):
            commands = QUICK_EXECUTED if quick else EXECUTED
            yield Row(triton.version, f"{tier}, executed", executed(triton, tier, commands))
            yield Row(triton.version, f"{tier}, launched", launched(triton, tier))


def matrix(versions: list[str], quick: bool, jobs: int) -> Iterator[Row]:
    """Every version's rows as they come; so many versions at once."""
    found: Queue[Row | None] = Queue()

    def run(wanted: str) -> None:
        try:
            for row in checks(installed(wanted), quick):
                found.put(row)
        except NoPipError as error:
            found.put(Row(wanted, "everything", f"skipped: {error}"))
        except Exception as error:
            found.put(Row(wanted, "everything else", f"failed: {type(error).__name__}: {error}"))
        finally:
            found.put(None)

    with ThreadPoolExecutor(jobs) as pool:
        for wanted in versions:
            pool.submit(run, wanted)
        for _ in versions:
            while row := found.get():
                yield row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="run fewer sizes, for one architecture")
    parser.add_argument("--triton", nargs="+", default=list(TRITONS), metavar="VERSION", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="versions that run at once (default: 2)")
    args = parser.parse_args(arguments)
    failed = 0
    print("| Triton | what | result |\n|---|---|---|")
    for row in matrix(args.triton, args.quick, args.jobs):
        print(f"| {' | '.join(row)} |", flush=True)
        failed += row.result.startswith("failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
