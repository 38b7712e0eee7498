"""Which stripes to give back, by the value of what they hold. Knows counts and values; evicts and moves nothing."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class StripeState(enum.StrEnum):
    ABSENT = "absent"
    """Addresses only."""
    MAPPED = "mapped"
    LEAVING = "leaving"
    """Mapped, handing out nothing, waiting to be empty; may be called back."""
    DEPARTING = "departing"
    """Empty and on its way out; cannot be called back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StripeView:
    stripe: int
    state: StripeState
    used_slots: int
    free_slots: int
    evictable_slots: int = 0
    """Of the used ones, those that could be freed or moved at once: nothing that runs has them."""


Chooser = Callable[[Sequence[StripeView], int], Sequence[int]]
"""From the stripes that may leave, and how many should, to those that shall; fewer if the rest must stay."""


def emptiest(candidates: Sequence[StripeView], count: int) -> list[int]:
    """Those with the fewest slots that must stay where they are, then the fewest in use: least to wait for and to move."""
    by_use = sorted(candidates, key=lambda view: (view.used_slots - view.evictable_slots, view.used_slots))
    return [view.stripe for view in by_use[:count]]


def cheapest(value: Sequence[float]) -> Chooser:
    """Those whose contents are worth least, by a value per stripe (`ElasticPool.slots.tally` adds one up)."""

    def choose(candidates: Sequence[StripeView], count: int) -> list[int]:
        return [view.stripe for view in sorted(candidates, key=lambda view: (value[view.stripe], view.used_slots))[:count]]

    return choose
