"""How the KV pages of one GPU are divided among the replicas on it. Arithmetic; remembers nothing, knows no ledger.

Three tiers, one rule. First what everyone's requests need, then as much again as lets a burst begin at once, then what is
left, for cached prefixes: memory that nobody holds serves nobody, and a lease takes it back in milliseconds. A tier for which
there is not enough is divided so that the smallest share is as large as it can be.

Two marks keep it calm. A replica below its need (the low mark) is a reason to divide anew; a new division brings everyone to
its comfort (the high mark), so that small changes of need are no reason for the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

K = TypeVar("K")


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica has and would have, in pages."""

    level: int
    least: int
    """Below this it cannot work at all."""
    ceiling: int
    wanted: int = 0
    """What its requests need to run to their ends together, as it last said."""

    @property
    def need(self) -> int:
        return min(max(self.wanted, self.least), self.ceiling)

    @property
    def comfort(self) -> int:
        return min(max(self.wanted + self.wanted // 4 + 1, 2 * self.least), self.ceiling)


def is_unfair(capacity: int, claims: Mapping[K, Claim]) -> bool:
    """Whether someone lacks what a new division would give, or all together have more than there is."""
    if sum(claim.level for claim in claims.values()) > capacity:
        return True
    short = [key for key, claim in claims.items() if claim.level < claim.need]
    if not short:
        return False
    divided = divide(capacity, claims)
    # A sixteenth more is not worth a recall.
    return any(divided[key] > claims[key].level + claims[key].level // 16 for key in short)


def divide(capacity: int, claims: Mapping[K, Claim]) -> dict[K, int]:
    """Everyone's level. Their sum is within the capacity if what they need least is."""
    wholes = list(claims.values())
    least, needs = [c.least for c in wholes], [c.need for c in wholes]
    comforts, ceilings = [max(c.need, c.comfort) for c in wholes], [c.ceiling for c in wholes]
    if sum(needs) >= capacity:
        levels = _fill(capacity, least, needs)
    elif sum(comforts) >= capacity:
        levels = _fill(capacity, needs, comforts)
    else:
        levels = _fill(capacity, comforts, ceilings)
    return dict(zip(claims, levels, strict=True))


def _fill(capacity: int, floors: Sequence[int], tops: Sequence[int]) -> list[int]:
    """Everyone at least at its floor and at most at its top, and between them as evenly as can be."""

    def at(water: int) -> list[int]:
        return [min(max(water, floor), top) for floor, top in zip(floors, tops, strict=True)]

    low, high = 0, max(tops, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(at(middle)) <= capacity else (low, middle - 1)
    return at(low)
