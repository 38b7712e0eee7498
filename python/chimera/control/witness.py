"""What control remembers for its readers: the counts of `/metrics`, the newest actions, and the rows of the store.

Told every step after it was carried out. Decides nothing, and nothing that is decided depends on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from chimera.core.measures import DECISION_S, Measures, Tally
from chimera.core.record import Entry, RequestRecord
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Action
from chimera.msg.stream import Heartbeat
from chimera.records.keeper import Keeper
from chimera.records.scribe import Row, Scribe

_RECENT = 256
"""The newest entries, for viewers that have just come."""
LEASES = ("grant", "recall")
"""Entries that would drown the others there; in the store they are."""


class Witness:
    """Without a keeper nothing is kept beyond this process; counts and the newest entries are."""

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        self._wall_s = time.time() - time.monotonic()
        self._scribe = Scribe(self._keep, wall_s=self._wall_s)
        self._tallies: dict[str, Tally] = {}
        """Of the front-ends that are here."""
        self._past = Tally()
        """Of those that are gone: a sum never falls because somebody left."""
        self._lost_tokens: dict[tuple[ReplicaId, Epoch], int] = {}
        self._recent: deque[tuple[int, Entry]] = deque(maxlen=_RECENT)
        self._numbered = round(time.time() * 1000)
        """The newest entry's number; a later control's are always larger."""

    def start(self) -> None:
        if self._keeper is not None:
            self._keeper.start()

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()

    @property
    def fault(self) -> str:
        """Why records cannot be kept now, in words."""
        return "" if self._keeper is None else self._keeper.fault

    def step(self, event: object, decided: Sequence[Action], now: float, took_s: float) -> None:
        self._scribe.measures.decisions.see(took_s, DECISION_S)
        self._scribe.step(event, decided, now)

    def told(self, record: RequestRecord) -> None:
        self._scribe.told(record)

    def log(self, entries: Iterable[Entry]) -> None:
        self._scribe.log(entries)

    def beat(self, heartbeat: Heartbeat) -> None:
        """A worker's counter begins anew with each of its lives."""
        life = (heartbeat.replica, heartbeat.epoch)
        more = heartbeat.lost_cached_tokens - self._lost_tokens.get(life, 0)
        if more > 0:
            self._lost_tokens = {known: n for known, n in self._lost_tokens.items() if known[0] != heartbeat.replica}
            self._lost_tokens[life] = heartbeat.lost_cached_tokens
            self._scribe.measures.of(heartbeat.replica.model).lost_cached_tokens += more

    def tallied(self, front: str, tally: Tally) -> None:
        self._tallies[front] = tally

    def front_gone(self, front: str) -> None:
        tally = self._tallies.pop(front, None)
        if tally is not None:
            self._past.add(tally)

    def measures(self) -> Measures:
        """All that was counted, everybody's."""
        tally = Tally()
        tally.add(self._past)
        for one in self._tallies.values():
            tally.add(one)
        keeper = self._keeper
        kept, lost = (0, 0) if keeper is None else (keeper.kept, keeper.lost)
        return msgspec.structs.replace(self._scribe.measures, tally=tally, records_kept=kept, records_lost=lost)

    def since(self, number: int) -> list[tuple[int, Entry]]:
        """The newest entries after that number, each with its own."""
        return [one for one in self._recent if one[0] > number]

    def _keep(self, row: Row) -> None:
        if isinstance(row, Entry) and row.what not in LEASES:
            self._numbered += 1
            self._recent.append((self._numbered, row))
        if self._keeper is not None:
            self._keeper.keep(row)
