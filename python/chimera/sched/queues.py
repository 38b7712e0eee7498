"""In which order requests leave a queue. Knows requests by their measure; knows no replica and no credit.

Every policy is deterministic: the same pushes, removals and pops give the same order, and a queue filled again from its
own listing behaves as the one listed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Protocol

from chimera.core.request import Request


class Queue(Protocol):
    """Requests waiting for one replica, or for one model. A request id is in it at most once."""

    def push(self, request: Request) -> None: ...

    def pop(self, now: float) -> Request:
        """The request whose turn it is at `now`. The queue is not empty."""

    def remove(self, request_id: str) -> Request | None:
        """The request leaves without its turn; `None` if it is not here."""

    def __contains__(self, request_id: str) -> bool: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]:
        """All of them, in the order in which they would be pushed again."""


class Fcfs:
    """First come, first served, by the moment the client's request came in: one that was requeued keeps its turn."""

    __slots__ = ("_entries", "_order", "_pushed")

    def __init__(self) -> None:
        self._order: list[tuple[float, int, Request]] = []
        self._entries: dict[str, tuple[float, int, Request]] = {}
        self._pushed = 0

    def push(self, request: Request) -> None:
        entry = (request.arrived_s, self._pushed, request)
        self._pushed += 1
        self._entries[request.request_id] = entry
        insort(self._order, entry)

    def pop(self, now: float) -> Request:
        request = self._order.pop(0)[2]
        del self._entries[request.request_id]
        return request

    def remove(self, request_id: str) -> Request | None:
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        return self._order.pop(bisect_left(self._order, entry))[2]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in self._order)
