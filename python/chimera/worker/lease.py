"""The worker's side of its replica's lease: orders in pages become limits in bytes, holdings in bytes become answers in pages.

Owns the terms last heard and what was last said. Knows no memory, and no clock: it is told the time.
"""

from __future__ import annotations

import math
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


class LeaseDesk:
    def __init__(self, replica: ReplicaId, epoch: Epoch, gpu_id: int, first: FirstLease) -> None:
        self._replica = replica
        self._epoch = epoch
        self._gpu_id = gpu_id
        self._page_bytes = first.page_bytes
        self._terms = Terms(revision=first.revision, level=first.level)
        self._answered = (-1, math.inf)
        """Revision and level of the last answer."""
        self._wanted = -1
        self._due_s = -math.inf

    def held(self, worker: str, holding: Holding, weight_bytes: int) -> PagesHeld:
        """All of it, for an agent that has heard of none of it."""
        self._answered, self._wanted = (-1, math.inf), -1
        return PagesHeld(
            worker=worker,
            gpu_id=self._gpu_id,
            replica=self._replica,
            epoch=self._epoch,
            reserved={LeaseClass.WEIGHTS: ceil_div(weight_bytes, self._page_bytes)},
            revision=self._terms.revision,
            level=self._terms.level,
            held=ceil_div(holding.held_bytes, self._page_bytes),
        )

    def obey(self, order: Grant | Recall, now: float) -> Limit | None:
        """What the order means to the engine; nothing if a newer one has come before it."""
        terms = self._terms.told(order.revision, order.level)
        if terms is self._terms:
            self._answered = (-1, math.inf)  # the ledger repeats itself: it has not heard us
            return None
        self._terms = terms
        retract_by_s = None
        if isinstance(order, Recall):
            retract_by_s = now + max(0.0, order.deadline_s - now) * _RETRACT_WITH_LEFT
        return Limit(order.level * self._page_bytes, retract_by_s)

    def is_due(self, now: float) -> bool:
        """Whether it is worth asking the engine what it holds."""
        revision, level = self._answered
        return now >= self._due_s or revision != self._terms.revision or level > self._terms.level

    def report(self, holding: Holding, now: float) -> list[PagesReturned | PagesWanted]:
        """What the ledger does not know yet. To be called when the engine has read every order that was obeyed."""
        self._due_s = now + _WANT_EVERY_S
        news: list[PagesReturned | PagesWanted] = []
        level = self._terms.answer(ceil_div(holding.held_bytes, self._page_bytes))
        if (self._terms.revision, level) != self._answered:
            self._answered = (self._terms.revision, level)
            news.append(
                PagesReturned(
                    replica=self._replica,
                    epoch=self._epoch,
                    gpu_id=self._gpu_id,
                    revision=self._terms.revision,
                    level=level,
                )
            )
        wanted = ceil_div(holding.wanted_bytes, self._page_bytes)
        if wanted != self._wanted:
            self._wanted = wanted
            news.append(
                PagesWanted(
                    replica=self._replica,
                    epoch=self._epoch,
                    gpu_id=self._gpu_id,
                    revision=self._terms.revision,
                    level=wanted,
                )
            )
        return news
