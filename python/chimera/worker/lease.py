"""The worker's side of its replica's lease: orders in pages become limits in bytes, holdings in bytes become answers in pages.

A replica over several GPUs has a lease on each. It holds the same on all, so what the tightest of them allows is its limit.
Owns the terms last heard and what was last said. Knows no memory, and no clock: it is told the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from chimera.core.lease import LeaseClass, Terms
from chimera.core.replica import Epoch, ReplicaId
from chimera.engine.api import Holding, Limit
from chimera.msg.actions import FirstLease, Grant, Recall
from chimera.msg.events import PagesHeld, PagesReturned, PagesWanted
from chimera.units import ceil_div

_WANT_EVERY_S: Final = 0.02
_RETRACT_WITH_LEFT: Final = 0.5
"""Running requests yield when this part of the time to a deadline is left; until then they may end by themselves."""


class _Line:
    """The lease on one GPU."""

    __slots__ = ("answered", "page_bytes", "retract_by_s", "terms", "wanted")

    def __init__(self, first: FirstLease) -> None:
        self.page_bytes = first.page_bytes
        self.terms = Terms(revision=first.revision, level=first.level)
        self.retract_by_s: float | None = None
        self.answered = (-1, math.inf)
        """Revision and level of the last answer."""
        self.wanted = -1

    @property
    def level_bytes(self) -> int:
        return self.terms.level * self.page_bytes

    @property
    def is_answered(self) -> bool:
        revision, level = self.answered
        return revision == self.terms.revision and level <= self.terms.level

    def unsay(self) -> None:
        """Nobody has heard any of it."""
        self.answered, self.wanted = (-1, math.inf), -1


class LeaseDesk:
    def __init__(self, replica: ReplicaId, epoch: Epoch, leases: Mapping[int, FirstLease]) -> None:
        """`leases` by GPU."""
        self._replica = replica
        self._epoch = epoch
        self._lines = {gpu_id: _Line(first) for gpu_id, first in leases.items()}
        self._due_s = -math.inf

    def held(self, worker: str, holding: Holding, weight_bytes: int) -> list[PagesHeld]:
        """All of it, for an agent that has heard of none of it."""
        told = []
        for gpu_id, line in self._lines.items():
            line.unsay()
            told.append(
                PagesHeld(
                    worker=worker,
                    gpu_id=gpu_id,
                    replica=self._replica,
                    epoch=self._epoch,
                    reserved={LeaseClass.WEIGHTS: ceil_div(weight_bytes, line.page_bytes)},
                    revision=line.terms.revision,
                    level=line.terms.level,
                    held=ceil_div(holding.held_bytes, line.page_bytes),
                )
            )
        return told

    def obey(self, order: Grant | Recall, now: float) -> Limit | None:
        """What the order means to the engine; nothing if a newer one has come before it, or another GPU allows less."""
        line = self._lines[order.gpu_id]
        terms = line.terms.told(order.revision, order.level)
        if terms is line.terms:
            line.answered = (-1, math.inf)  # the ledger repeats itself: it has not heard us
            return None
        before = self._limit()
        line.terms, line.retract_by_s = terms, None
        if isinstance(order, Recall):
            line.retract_by_s = now + max(0.0, order.deadline_s - now) * _RETRACT_WITH_LEFT
        limit = self._limit()
        return None if limit == before and len(self._lines) > 1 else limit

    def _limit(self) -> Limit:
        level_bytes = min(line.level_bytes for line in self._lines.values())
        hurries = [line.retract_by_s for line in self._lines.values() if line.level_bytes == level_bytes]
        return Limit(level_bytes, min((at_s for at_s in hurries if at_s is not None), default=None))

    def is_due(self, now: float) -> bool:
        """Whether it is worth asking the engine what it holds."""
        return now >= self._due_s or not all(line.is_answered for line in self._lines.values())

    def report(self, holding: Holding, now: float) -> list[PagesReturned | PagesWanted]:
        """What the ledgers do not know yet. To be called when the engine has read every order that was obeyed."""
        self._due_s = now + _WANT_EVERY_S
        return [news for gpu_id, line in self._lines.items() for news in self._report(gpu_id, line, holding)]

    def _report(self, gpu_id: int, line: _Line, holding: Holding) -> list[PagesReturned | PagesWanted]:
        news: list[PagesReturned | PagesWanted] = []
        replica, epoch, revision = self._replica, self._epoch, line.terms.revision
        level = line.terms.answer(ceil_div(holding.held_bytes, line.page_bytes))
        if (revision, level) != line.answered:
            line.answered = (revision, level)
            news.append(PagesReturned(replica=replica, epoch=epoch, gpu_id=gpu_id, revision=revision, level=level))
        wanted = ceil_div(holding.wanted_bytes, line.page_bytes)
        if wanted != line.wanted:
            line.wanted = wanted
            news.append(PagesWanted(replica=replica, epoch=epoch, gpu_id=gpu_id, revision=revision, level=wanted))
        return news
