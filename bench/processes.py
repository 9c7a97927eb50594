"""Pieces of a visit in processes of their own: each with a time limit, and what it found kept as it comes."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .stages import Item, Record, Setup, Unfinished

ROOT = Path(__file__).parents[1]
GRACE = 10  # seconds between asking a process to end and ending it
T = TypeVar("T")
UNFINISHED = 3  # exit status of a process whose time was over before its work


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it printed."""

    status: int
    output: str
    errors: str
    seconds: float
    timed_out: bool = False

    @property
    def reason(self) -> str:
        """Return why the process failed, in a line."""
        if self.timed_out:
            return f"ended after {self.seconds:.0f} s"
        return said(self.errors) or said(self.output) or f"exit status {self.status}"


def said(text: str) -> str:
    """The last line that names an error, else the last."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [""])[-1][:400]


def run(command: list[str], seconds: float, interpret: bool = False) -> Done:
    """Run a command in the checkout for so many seconds at most; nothing that it started is left.

    It is interrupted before the time is over, so that it can write down what it has.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    # pytest of its own, also where a test worker runs this: pytest-benchmark does nothing inside one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1" if interpret else "0", "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    timed_out = False
    try:
        output, errors = process.communicate(timeout=max(seconds - GRACE, seconds / 2))
    except subprocess.TimeoutExpired:
        timed_out = True
        process.send_signal(signal.SIGINT)
        try:
            output, errors = process.communicate(timeout=min(GRACE, seconds / 2))
        except subprocess.TimeoutExpired:
            _end_all(process.pid)
            output, errors = process.communicate()
    finally:
        _end_all(process.pid)
    return Done(process.returncode, output, errors, time.monotonic() - started, timed_out)


def _end_all(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def at_once(commands: list[list[str]], seconds: float, interpret: bool) -> list[Done]:
    """Run commands side by side, but for two cores, each with its own limit."""
    with ThreadPoolExecutor(jobs(len(commands))) as pool:
        return list(pool.map(lambda command: run(command, seconds, interpret), commands))


def jobs(count: int) -> int:
    """How many of so many processes run at once."""
    return max(1, min(count, len(os.sched_getaffinity(0)) - 2))


def lines_item(setup: Setup, key: str, module: str, *arguments: str, least: float = 30) -> Item:
    """An item whose process adds records to <key>.jsonl, leaves out what is there, and may go on another time."""
    file = setup.folder / f"{key}.jsonl"

    def work(seconds: float) -> list[Record]:
        end = time.monotonic() + seconds
        command = [sys.executable, "-m", module, *arguments, "--out", str(file)] + ["--dry-run"] * setup.dry
        while True:
            left = end - time.monotonic()
            done = run([*command, "--seconds", f"{left - GRACE:.0f}"], left, setup.dry)
            write_log(setup, key, done)
            if done.status == 0 and not done.timed_out:
                return read(file)
            crashed = begun(file).exists()
            if not crashed or end - time.monotonic() < least:
                break  # else the rest, without what it crashed on
        if done.timed_out or crashed or done.status == UNFINISHED:
            raise Unfinished(read(file))
        return [*read(file), {"item": key, "error": done.reason}]

    return Item(key, work, least)


def write_log(setup: Setup, name: str, done: Done) -> None:
    """What a process printed, beside the results."""
    folder = setup.folder / "logs"
    folder.mkdir(exist_ok=True)
    (folder / f"{name.replace(' ', '-')}.txt").write_text(f"{done.output}\n{done.errors}")


def read(file: Path) -> list[Record]:
    """The records of a file of JSON lines; none if it is missing."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def begun(file: Path) -> Path:
    """The file that names what a process was at when it ended by a crash, or hung until it was ended."""
    return file.with_suffix(".begun")


class Log:
    """The file that such a process writes: a record at a time, and none twice, not even one that ended the process."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.end = file, time.monotonic() + seconds
        self.found = read(file)
        if begun(file).exists():
            key = json.loads(begun(file).read_text())
            if self.lacks(key):
                self.add(key | {"error": "its process crashed, or did not end"})
            begun(file).unlink()

        def interrupted(*_: object) -> None:  # never runs where the process hangs in a call of CUDA
            begun(file).unlink(missing_ok=True)
            raise SystemExit(UNFINISHED)

        signal.signal(signal.SIGINT, interrupted)

    def lacks(self, key: Record) -> bool:
        return not any(key.items() <= record.items() for record in self.found)

    def add(self, record: Record) -> None:
        self.found.append(record)
        text = json.dumps(record)
        print(text, flush=True)
        with self.file.open("a") as file:
            file.write(text + "\n")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def each(self, items: Iterable[T], key: Callable[[T], Record]) -> Iterator[T]:
        """The items whose key it lacks, while there is time; then the process ends as unfinished."""
        for item in items:
            if self.lacks(key(item)):
                if self.left <= 0:
                    raise SystemExit(UNFINISHED)
                begun(self.file).write_text(json.dumps(key(item)))
                yield item
                begun(self.file).unlink(missing_ok=True)


def options(doc: str) -> argparse.ArgumentParser:
    """Return the parser of the options that every such process takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="file of JSON lines; what it holds is not measured again"
    )
    parser.add_argument("--seconds", type=float, default=1e6, help="begin nothing new after this time")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, interpreted, at a tiny size")
    return parser
