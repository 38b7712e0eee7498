"""Which stripes to give back, by the value of what they hold. Knows counts, slots and values; evicts nothing itself."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch


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


_LOCKED: Final = 1e6
"""What a slot in use by a running request counts, against 1 for a slot of average worth: taken only if nothing else is left."""

_ROWS_AT_ONCE: Final = 4096


class Prefixes:
    """A forest of cached prefixes, and what giving up each stripe would cost in them.

    To empty a stripe, every prefix that touches it goes, and with a prefix everything that continues it. What goes for one
    stripe also leaves others, which are then cheaper: so the cheapest is taken, the costs are brought up to date, and again.

    `slots` are the slots of all prefixes, one after the other; `lengths`, `parents` (an earlier index, or −1 for a root) and
    `values` (of one slot, about 1) have one entry per prefix. A locked prefix, and slots of no prefix, belong to running
    requests. All tensors on the host.
    """

    def __init__(
        self,
        *,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        parents: torch.Tensor,
        values: torch.Tensor,
        locked: torch.Tensor,
        slots_per_stripe: int,
        stripes: int,
    ) -> None:
        if bool((parents >= torch.arange(len(parents))).any()):
            raise ValueError("a prefix comes after the one it continues")
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        stripe = slots // slots_per_stripe
        self._held = torch.bincount(stripe, minlength=stripes)
        self._worth = lengths * torch.where(locked, _LOCKED, values)
        self._goes_with = torch.zeros(len(lengths), stripes, dtype=torch.bool)
        self._goes_with[owner, stripe] = True
        self._follow_parents(parents)

    def choose(self, candidates: Sequence[StripeView], count: int) -> list[int]:
        """A `Chooser`."""
        if not candidates:
            return []
        cost = self._cost(torch.ones(len(self._worth), dtype=torch.bool))
        allowed = torch.full_like(cost, torch.inf)
        for view in candidates:
            # What is in use but in no prefix is a running request's own.
            allowed[view.stripe] = _LOCKED * max(0, view.used_slots - int(self._held[view.stripe]))
        staying = torch.ones(len(self._worth), dtype=torch.bool)
        chosen: list[int] = []
        for _ in range(min(count, len(candidates))):
            stripe = int((cost + allowed).argmin())
            chosen.append(stripe)
            allowed[stripe] = torch.inf
            goes = self._goes_with[:, stripe] & staying
            staying &= ~goes
            cost -= self._cost(goes)
        return chosen

    def touching(self, stripes: Sequence[int]) -> torch.Tensor:
        """Which prefixes must go for these stripes to be empty; evict the last ones first."""
        return self._goes_with[:, list(stripes)].any(dim=1).nonzero().view(-1)

    def _cost(self, which: torch.Tensor) -> torch.Tensor:
        """By stripe, the worth of those prefixes that would go with it."""
        cost = torch.zeros(self._goes_with.shape[1], dtype=torch.float64)
        for rows in which.nonzero().view(-1).split(_ROWS_AT_ONCE):
            cost += self._worth[rows].double() @ self._goes_with[rows].double()
        return cost

    def _follow_parents(self, parents: torch.Tensor) -> None:
        """A prefix goes whenever one that it continues goes; generation by generation, parents before children."""
        generation = torch.zeros_like(parents)
        for index, parent in enumerate(parents.tolist()):
            if parent >= 0:
                generation[index] = generation[parent] + 1
        for depth in range(1, int(generation.max()) + 1 if len(generation) else 0):
            children = (generation == depth).nonzero().view(-1)
            self._goes_with[children] |= self._goes_with[parents[children]]
