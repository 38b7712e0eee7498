"""In which order requests leave a queue. Knows requests by their measure; knows no replica and no credit.

Every policy is deterministic: the same pushes, removals and pops give the same order, and a queue filled again from its
own listing behaves as the one listed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappush, heappushpop
from typing import Protocol

from chimera.core.request import Request
from chimera.errors import ConfigError


class Queue(Protocol):
    """Requests waiting for one replica, or for one model. A request id is in it at most once."""

    def push(self, request: Request) -> None: ...

    def pop(self, now: float) -> Request:
        """The request whose turn it is at `now`. The queue is not empty."""

    def remove(self, request_id: str) -> Request | None:
        """The request leaves without its turn; `None` if it is not here."""

    def turn(self, now: float) -> tuple[bool, float]:
        """How soon it should have a turn, the least first: whether all its requests are late, and the most urgent moment."""

    def urgent(self, now: float) -> Request | None:
        """Whose turn it is, if it was promised a first token in time and can still have it."""

    def hopeless(self, begin_s: float) -> list[Request]:
        """Those that would rather hear at once that they cannot be in time, if none begins before `begin_s`.

        They stay here until they are removed.
        """

    def backlog_s(self) -> float:
        """How long the prefills of those that wait would take, one after the other."""

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

    def turn(self, now: float) -> tuple[bool, float]:
        return False, self._order[0][0]

    def urgent(self, now: float) -> Request | None:
        return None

    def hopeless(self, begin_s: float) -> list[Request]:
        return []

    def backlog_s(self) -> float:
        return 0.0

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


LOOKED_AT = 256
"""So many requests, those of the earliest deadlines, are weighed in one decision."""
NO_PROMISE_S = 60.0
"""The deadline of a request without a promise."""

Entry = tuple[float, int, Request]


Prefill = Callable[[Request], float]
"""How long a request's prefill takes on the replica that the queue is for."""


class Slack:
    """Least slack first: by the moment at which the prefill has to begin for the first token to be in time.

    A request that is late already has the least slack of all, so under overload this serves the late and makes the others
    late too. No starvation: who waits gains on all who come later.
    """

    __slots__ = ("_eldest", "_entries", "_order", "_prefill_s", "_pushed", "_seconds", "_strict")

    def __init__(self, prefill_s: Prefill) -> None:
        self._prefill_s = prefill_s
        self._seconds: dict[str, float] = {}
        self._strict = 0
        """Requests here that would rather be turned away than be late."""
        self._order: list[tuple[float, int, Request]] = []
        self._entries: dict[str, tuple[float, int, Request]] = {}
        self._pushed = 0
        self._eldest: Entry | None = None
        """Once it was looked for, until somebody comes or goes."""

    def _key(self, request: Request) -> float:
        return deadline_s(request) - self._prefill_s(request)

    def push(self, request: Request) -> None:
        entry = (self._key(request), self._pushed, request)
        self._pushed += 1
        self._seconds[request.request_id] = self._prefill_s(request)
        self._strict += is_strict(request)
        self._entries[request.request_id] = entry
        self._eldest = None
        insort(self._order, entry)

    def pop(self, now: float) -> Request:
        return self._take(self._order[0])

    def _take(self, entry: tuple[float, int, Request]) -> Request:
        self._eldest = None
        del self._order[bisect_left(self._order, entry)]
        del self._entries[entry[2].request_id]
        del self._seconds[entry[2].request_id]
        self._strict -= is_strict(entry[2])
        return entry[2]

    def remove(self, request_id: str) -> Request | None:
        entry = self._entries.get(request_id)
        return None if entry is None else self._take(entry)

    def turn(self, now: float) -> tuple[bool, float]:
        return False, self._order[0][0]

    def urgent(self, now: float) -> Request | None:
        start_s, _, first = self._order[0]
        return first if start_s >= now and first.slo.ttft_s is not None else None

    def hopeless(self, begin_s: float) -> list[Request]:
        if not self._strict:
            return []
        return [r for _, _, r in self._order[:LOOKED_AT] if is_strict(r) and self._is_late(r, begin_s)]

    def _is_late(self, request: Request, begin_s: float) -> bool:
        return begin_s + self._seconds[request.request_id] > deadline_s(request)

    def backlog_s(self) -> float:
        return sum(self._seconds[request.request_id] for _, _, request in self._order[:LOOKED_AT])

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in sorted(self._order, key=lambda entry: entry[1]))


class MooreHodgson(Slack):
    """The most requests in time: Moore and Hodgson's rule over the earliest deadlines (the paper's Algorithm 2).

    Requests are taken in order of deadline; whenever one would be late, the longest of those of the lowest priority that were
    taken is put off. Who is put off waits until nobody can be in time; when nobody can be, the oldest goes.
    """

    __slots__ = ()

    def _key(self, request: Request) -> float:
        return deadline_s(request)

    def pop(self, now: float) -> Request:
        alone = self._order[0] if len(self._order) == 1 else None
        return self._take(alone or self._first_in_time(now) or self._oldest())

    def urgent(self, now: float) -> Request | None:
        entry = self._first_in_time(now)
        return entry[2] if entry is not None and entry[2].slo.ttft_s is not None else None

    def turn(self, now: float) -> tuple[bool, float]:
        start = self._first_due(now)
        return (False, self._order[start][0]) if start < len(self._order) else (True, self._oldest()[2].arrived_s)

    def _oldest(self) -> Entry:
        """Deadlines differ by promise only, so the oldest is among the first of them."""
        if self._eldest is None:
            self._eldest = min(self._order[:LOOKED_AT], key=lambda entry: (entry[2].arrived_s, entry[1]))
        return self._eldest

    def _first_due(self, now: float) -> int:
        """Where those begin whose deadline is not over."""
        return bisect_left(self._order, (now,))  # less than every entry of that deadline

    def _first_in_time(self, now: float) -> Entry | None:
        window, put_off = self._weigh(now)
        return next((entry for position, entry in enumerate(window) if position not in put_off), None)

    def hopeless(self, begin_s: float) -> list[Request]:
        """Those that are late whatever happens, and those that are put off for others."""
        if not self._strict:
            return []
        window, put_off = self._weigh(begin_s)
        late = self._order[: min(LOOKED_AT, self._first_due(begin_s))]
        found = [*late, *(window[position] for position in sorted(put_off))]
        return [request for _, _, request in found if is_strict(request)]

    def _weigh(self, now: float) -> tuple[list[Entry], set[int]]:
        """The earliest deadlines that can be met, and which of them are put off."""
        # Entries that are late whatever happens are passed over before any is weighed.
        start = self._first_due(now)
        window = self._order[start : start + LOOKED_AT]
        clock_s = now
        taken: list[tuple[int, float, int]] = []
        dropped: set[int] = set()
        seconds_of = self._seconds
        for position, entry in enumerate(window):
            seconds = seconds_of[entry[2].request_id]
            clock_s += seconds
            if clock_s <= entry[0]:
                if dropped:
                    heappush(taken, (entry[2].priority, -seconds, position))
                else:
                    taken.append((entry[2].priority, -seconds, position))
                continue
            if not dropped:
                heapify(taken)
            _, longest_s, longest = heappushpop(taken, (entry[2].priority, -seconds, position))
            clock_s += longest_s
            dropped.add(longest)
        return window, dropped


def deadline_s(request: Request) -> float:
    """When its next token is due: the first, or the one after those that its client has."""
    slo = request.slo
    first_s = NO_PROMISE_S if slo.ttft_s is None else slo.ttft_s
    return request.arrived_s + first_s + request.emitted_tokens * (slo.tpot_s or 0.0)


def is_strict(request: Request) -> bool:
    """Whether it is turned away rather than late. Not one that was taken on before: that is served to its end."""
    return request.slo.reject_late and not request.tries


LOCAL_POLICIES = ("fcfs", "slack", "moore-hodgson", "goodput")
BY_POLICY = "by-policy"
"""In place of a name: the order that the global policy is known with."""
_KNOWN_WITH = {
    "static": "fcfs",
    "time-sharing": "slack",
    "space-sharing": "fcfs",
    "simple-global": "slack",
    "flexible": "goodput",
}


def local_of(policy: str) -> str:
    """The order that a global policy is known with: Prism's have the paper's, ours has ours."""
    return _KNOWN_WITH.get(policy, "moore-hodgson")


def queue_named(name: str, prefill_s: Prefill) -> Queue:
    """`goodput` is ours: Moore and Hodgson's order; what else it does is the GPU scheduler's."""
    match name:
        case "fcfs":
            return Fcfs()
        case "slack":
            return Slack(prefill_s)
        case "moore-hodgson" | "goodput":
            return MooreHodgson(prefill_s)
        case _:
            raise ConfigError.single("local", f"there is no local policy {name!r}; there are {', '.join(LOCAL_POLICIES)}")
