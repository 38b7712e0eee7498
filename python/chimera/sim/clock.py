"""What happens next. Things due at one moment happen in the order in which they were arranged."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    """Virtual time, in seconds. Never goes back."""

    __slots__ = ("_heap", "_sequence", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    def at(self, at_s: float, happen: Callable[[], None]) -> None:
        self._sequence += 1
        heappush(self._heap, (at_s if at_s > self.now else self.now, self._sequence, happen))

    def step(self) -> bool:
        """The next thing happens; whether there was one."""
        if not self._heap:
            return False
        self.now, _, happen = heappop(self._heap)
        happen()
        return True

    def __len__(self) -> int:
        return len(self._heap)
