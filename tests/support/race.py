"""A happens-before race detector for interpreted kernels whose programs are all alive.

Every program has a vector clock. A release adds the program's clock to the counter's, an acquire adds the counter's to
the program's: these are the only edges between programs. Every element of a watched tensor remembers who wrote it last,
when, and in which source line, and when each program read it last. An access without an edge from the other program's
access before it is a race, whatever values were seen. Source: the vector-clock algorithm of Djit+ (Pozniansky and
Schuster 2003), as FastTrack (Flanagan and Freund 2009) describes it.

Uses InterpreterBuilder's create_masked_load, create_masked_store and create_atomic_rmw of Triton, read in 3.9.0.
"""

import linecache
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as triton_interpreter

from fastrnn.kernels.exchange import MISSING as _MISSING

MISSING = _MISSING.value


class Race(AssertionError):  # noqa: N818 - the field's word
    """Two programs touch one element, one of them writing, and nothing orders them."""


def source_line() -> tuple[str, int]:
    """File and number of the time loop's line that is being interpreted, else of the kernel's: not of their helpers."""
    place, frame = ("unknown", 0), sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        in_loop = file.endswith("/loop.py")
        if ("/kernels/" in file or "/mutant_" in file) and (in_loop or not place[0].endswith("/loop.py")):
            place = (file, frame.f_lineno)
        frame = frame.f_back
    return place


class Watched:
    """The access history of one tensor."""

    def __init__(self, tensor: torch.Tensor, programs: int) -> None:
        self.first, self.size, self.count = tensor.data_ptr(), tensor.element_size(), tensor.numel()
        self.writer = np.full(self.count, -1)
        self.written = np.zeros(self.count, np.int64)
        self.write_line = np.zeros(self.count, np.int64)
        self.read = np.zeros((programs, self.count), np.int64)
        self.read_line = np.zeros((programs, self.count), np.int64)
        self.sender = np.full(self.count, -1)  # who sent, since the last other store
        self.sent = np.zeros(self.count, np.int64)
        self.sent_line = np.zeros(self.count, np.int64)

    def elements(self, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Indices of this tensor's elements among the pointers."""
        offsets = pointers.reshape(-1)[mask.reshape(-1)].astype(np.int64) - self.first
        return offsets[(offsets >= 0) & (offsets < self.count * self.size)] // self.size

    def is_sent(self, pointers: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Of the same elements, whether the value that is stored there is one that is sent."""
        offsets = pointers.reshape(-1)[mask.reshape(-1)].astype(np.int64) - self.first
        inside = (offsets >= 0) & (offsets < self.count * self.size)
        return np.broadcast_to(values, pointers.shape).reshape(-1)[mask.reshape(-1)][inside] != MISSING


class RaceDetector:
    """Watches tensors during a launch, sent for what is sent; hands the baton over before every access to them."""

    def __init__(self, tensors: list[torch.Tensor], sent: torch.Tensor | None = None) -> None:
        self.tensors, self.of_sent = tensors, sent
        self.lines: list[tuple[str, int]] = []

    @contextmanager
    def watch(self, baton):
        programs = {program: i for i, program in enumerate(baton.alive)}
        self.clock = np.eye(len(programs), dtype=np.int64)  # row: what a program knows of each
        self.counters: dict[int, np.ndarray] = {}
        self.watched = [Watched(tensor, len(programs)) for tensor in self.tensors]
        sent = None if self.of_sent is None else Watched(self.of_sent, len(programs))
        builder = triton_interpreter.InterpreterBuilder
        load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        detector = self

        def touched(pointers, mask):
            found = [(w, w.elements(pointers.data, mask.data)) for w in detector.watched]
            found = [(w, elements) for w, elements in found if len(elements)]
            if found:
                baton.hand_over()
            return found

        def create_masked_load(self, pointers, mask, *rest):
            for watched, elements in touched(pointers, mask):
                detector.reads(programs[baton.holder], watched, elements)
            if sent is not None and len(elements := sent.elements(pointers.data, mask.data)):
                if not rest[-1]:  # not volatile
                    raise Race(f"race: weak read at {detector.text(detector.line())} of what is sent")
                detector.reads(programs[baton.holder], sent, elements)
            return load(self, pointers, mask, *rest)

        def create_masked_store(self, pointers, value, mask, *rest):
            for watched, elements in touched(pointers, mask):
                detector.writes(programs[baton.holder], watched, elements)
            if sent is not None and len(elements := sent.elements(pointers.data, mask.data)):
                baton.hand_over()
                is_sent = sent.is_sent(pointers.data, mask.data, value.data)
                detector.sends(programs[baton.holder], sent, elements[is_sent])
                detector.writes(programs[baton.holder], sent, elements[~is_sent])
            return store(self, pointers, value, mask, *rest)

        def create_atomic_rmw(self, operation, pointer, value, mask, sem, scope):
            me = programs[baton.holder]
            address = int(np.asarray(pointer.data).reshape(-1)[0])
            counter = detector.counters.setdefault(address, np.zeros(len(programs), np.int64))
            if sem.name in ("RELEASE", "ACQUIRE_RELEASE"):
                np.maximum(counter, detector.clock[me], out=counter)
                detector.clock[me, me] += 1
            if sem.name in ("ACQUIRE", "ACQUIRE_RELEASE"):
                np.maximum(detector.clock[me], counter, out=detector.clock[me])
            return atomic(self, operation, pointer, value, mask, sem, scope)

        with mock.patch.multiple(
            builder,
            create_masked_load=create_masked_load,
            create_masked_store=create_masked_store,
            create_atomic_rmw=create_atomic_rmw,
        ):
            yield

    def line(self) -> int:
        """Number of the current source line in self.lines."""
        place = source_line()
        if place not in self.lines:
            self.lines.append(place)
        return self.lines.index(place)

    def text(self, line: int) -> str:
        file, number = self.lines[line]
        return f"{Path(file).name}:{number} `{linecache.getline(file, number).strip()}`"

    def reads(self, me: int, watched: Watched, elements: np.ndarray) -> None:
        line, writer = self.line(), watched.writer[elements]
        unordered = (writer >= 0) & (writer != me) & (self.clock[me][writer] < watched.written[elements])
        if unordered.any():
            other = self.text(watched.write_line[elements[unordered.argmax()]])
            raise Race(f"race: read at {self.text(line)} of what another program writes at {other}")
        watched.read[me, elements] = self.clock[me, me]
        watched.read_line[me, elements] = line

    def writes(self, me: int, watched: Watched, elements: np.ndarray) -> None:
        line = self.line()
        self.after_writes(me, watched, elements, line)
        sender = watched.sender[elements]
        unordered = (sender >= 0) & (sender != me) & (self.clock[me][sender] < watched.sent[elements])
        if unordered.any():
            other = self.text(watched.sent_line[elements[unordered.argmax()]])
            raise Race(f"race: write at {self.text(line)} of what another program sends at {other}")
        unordered = watched.read[:, elements] > self.clock[me][:, None]
        unordered[me] = False
        if unordered.any():
            reader, i = np.unravel_index(unordered.argmax(), unordered.shape)
            other = self.text(watched.read_line[reader, elements[i]])
            raise Race(f"race: write at {self.text(line)} of what another program reads at {other}")
        watched.writer[elements], watched.written[elements] = me, self.clock[me, me]
        watched.write_line[elements], watched.sender[elements] = line, -1

    def sends(self, me: int, watched: Watched, elements: np.ndarray) -> None:
        line = self.line()
        self.after_writes(me, watched, elements, line)
        if (twice := watched.sender[elements] >= 0).any():
            other = self.text(watched.sent_line[elements[twice.argmax()]])
            raise Race(f"race: sent at {self.text(line)}, and not taken back since it was sent at {other}")
        watched.sender[elements], watched.sent[elements] = me, self.clock[me, me]
        watched.sent_line[elements] = line

    def after_writes(self, me: int, watched: Watched, elements: np.ndarray, line: int) -> None:
        writer = watched.writer[elements]
        unordered = (writer >= 0) & (writer != me) & (self.clock[me][writer] < watched.written[elements])
        if unordered.any():
            other = self.text(watched.write_line[elements[unordered.argmax()]])
            raise Race(f"race: write at {self.text(line)} of what another program writes at {other}")
