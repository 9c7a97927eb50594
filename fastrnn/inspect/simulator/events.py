"""What the parts of a multiprocessor share: a calendar of events, and resources that serve one thing at a time."""

import heapq
from collections.abc import Callable
from typing import Any

NEVER = 1 << 60


class Calendar:
    """Calls to make at given times. Calls of one time are made in the order in which they were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call, with the time as its first argument."""
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, call, arguments))

    def until(self, time: float) -> None:
        """Make all calls that are due."""
        while self._heap and self._heap[0][0] <= time:
            at, _, call, arguments = heapq.heappop(self._heap)
            call(at, *arguments)

    @property
    def next(self) -> float:
        return self._heap[0][0] if self._heap else NEVER


class Resource:
    """A resource that serves one thing after the other, and counts how long it is busy."""

    def __init__(self) -> None:
        self.free = 0.0
        self.busy = 0.0

    def take(self, time: float, cycles: float) -> float:
        """Wait for the resource from a time on, take it, and return when that begins."""
        begins = max(time, self.free)
        self.free = begins + cycles
        self.busy += cycles
        return begins
