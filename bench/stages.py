"""Stages of a visit to a GPU: pieces of work, each done once and written down, within its stage's share of the time."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import packing

# A stage may use what is left of the time up to this share of all: what comes later keeps its part.
UNTIL = {
    "machine": 0.1, "correctness": 0.2, "tests": 0.37, "steps": 0.56, "layers": 0.69, "host": 0.75, "forms": 0.85,
    "tools": 0.87, "suite": 0.88, "clients": 1.0,
}  # fmt: skip

Record = dict[str, Any]


class Unfinished(Exception):  # noqa: N818 - not an error
    """An item's time was over; what it has is kept, and it goes on the next time."""

    def __init__(self, records: list[Record]) -> None:
        super().__init__("unfinished")
        self.records = records


@dataclass(frozen=True)
class Item:
    """A piece of a stage's work: done once, by key."""

    key: str
    work: Callable[[float], list[Record]]  # of the seconds that it may take
    limit: float = 0.0  # seconds that it may need: with fewer left, it is not begun


@dataclass(frozen=True)
class Setup:
    """Where and how long a visit runs, and at which sizes."""

    folder: Path  # where stages write
    arch: str
    dry: bool
    seconds: float
    started: float
    out: Path | None = None  # where what the folder holds is packed to

    def allows(self, stage: str, item: "Item", first: bool) -> bool:
        """Whether an item can end in what is left; the first of a stage may take of what comes later."""
        of_stage = self.left(stage)
        return self.left() >= item.limit and of_stage > 0 and (first or of_stage >= item.limit)

    def left(self, stage: str | None = None) -> float:
        """Return the seconds that a stage's share, or the whole visit, still has."""
        return self.started + (UNTIL[stage] if stage else 1.0) * self.seconds - time.monotonic()


def run_stage(setup: Setup, stage: str, text: str, items: Iterable[Item]) -> list[Record]:
    """Do the items that are not done yet while there is time; the records of all that are."""
    file = setup.folder / f"stage-{stage}.json"
    found: dict[str, Any] = {"stage": stage, "text": text, "complete": False, "done": [], "by_item": {}, "records": []}
    if file.exists():
        found = json.loads(file.read_text())
    if found["complete"]:
        print(f"{stage}: done before")
        return found["records"]
    waiting, first = [], True
    for item in items:
        if item.key in found["done"]:
            continue
        if not setup.allows(stage, item, first):
            waiting.append(item.key)
            continue
        print(f"{stage}: {item.key}", flush=True)
        first = False
        seconds = min(setup.left(), max(item.limit, setup.left(stage)))
        try:
            records, ended = item.work(seconds), True
        except Unfinished as unfinished:
            records, ended = unfinished.records, False
            waiting.append(item.key)
        except Exception as error:  # one failure must not cost the visit: it is a result
            records, ended = [{"item": item.key, "error": f"{type(error).__name__}: {error}"}], True
        found["by_item"][item.key] = records
        found["records"] = [record for of_item in found["by_item"].values() for record in of_item]
        found["done"] += [item.key] * ended
        save(setup, file, found)
    if waiting:
        print(f"{stage}: no time left for {', '.join(waiting)}; run again for the rest")
    found["complete"] = not waiting
    save(setup, file, found)
    return found["records"]


def save(setup: Setup, file: Path, content: Any) -> None:
    """Write a stage's file, and pack all that there is."""
    write_json(file, content)
    if setup.out:
        packing.pack(setup.folder, setup.out)


def write_json(file: Path, content: Any) -> None:
    """All or nothing, whenever it is interrupted."""
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(file)
