"""Stages of a visit to a GPU: pieces of work, each done once and written down, within its stage's share of the time."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A stage may use what is left of the time up to this share of all: what comes later keeps its part.
UNTIL = {"correctness": 0.2, "model": 0.4, "tuning": 0.6, "suite": 1.0}

Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A piece of a stage's work: done once, by key."""

    key: str
    work: Callable[[float], list[Record]]  # of the seconds left


@dataclass(frozen=True)
class Setup:
    """Where it runs, and how much."""

    folder: Path
    arch: str
    dry: bool
    seconds: float
    started: float

    def left(self, stage: str) -> float:
        return self.started + UNTIL[stage] * self.seconds - time.monotonic()


def run_stage(setup: Setup, stage: str, text: str, items: Iterable[Item]) -> list[Record]:
    """Do the items that are not done yet while there is time; the records of all that are."""
    file = setup.folder / f"stage-{stage}.json"
    found = {"stage": stage, "text": text, "complete": False, "done": [], "records": []}
    if file.exists():
        found = json.loads(file.read_text())
    if found["complete"]:
        print(f"{stage}: done before")
        return found["records"]
    for item in items:
        if item.key in found["done"]:
            continue
        if (left := setup.left(stage)) <= 0:
            print(f"{stage}: no time left; run again for the rest")
            write_json(file, found)
            return found["records"]
        print(f"{stage}: {item.key}", flush=True)
        try:
            records = item.work(left)
        except Exception as error:  # one failure must not cost the visit: it is a result
            records = [{"item": item.key, "error": f"{type(error).__name__}: {error}"}]
        found["records"] += records
        found["done"].append(item.key)
        write_json(file, found)
    found["complete"] = True
    write_json(file, found)
    return found["records"]


def write_json(file: Path, content: Any) -> None:
    """All or nothing, whenever it is interrupted."""
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(file)
