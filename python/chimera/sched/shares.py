"""How the KV pages of GPUs are divided among the replicas on them. Arithmetic; remembers nothing, knows no ledger.

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
G = TypeVar("G")


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


def is_unfair(capacities: Mapping[G, int], claims: Mapping[G, Mapping[K, Claim]]) -> bool:
    """Whether someone lacks what a new division would give, or all on one GPU together have more than there is."""
    if any(sum(claim.level for claim in claims[gpu].values()) > capacities[gpu] for gpu in claims):
        return True
    short = [(gpu, key) for gpu in claims for key, claim in claims[gpu].items() if claim.level < claim.need]
    if not short:
        return False
    divided = divide_all(capacities, claims)
    # A sixteenth more is not worth a recall.
    return any(divided[gpu][key] > claims[gpu][key].level + claims[gpu][key].level // 16 for gpu, key in short)


def divide_all(capacities: Mapping[G, int], claims: Mapping[G, Mapping[K, Claim]]) -> dict[G, dict[K, int]]:
    """Everyone's level on each of several GPUs. Who has claims on more than one, a gang, gets the same on all of them: what
    the tightest can give. What that leaves on the others goes to their own."""
    levels = {gpu: divide(capacities[gpu], claims[gpu]) for gpu in claims}
    tightest = _tightest(levels)
    for gpu, its in claims.items():
        too_much = {key: tightest[key] for key in its if levels[gpu][key] > tightest[key]}
        if too_much:
            capped = {key: msgspec.structs.replace(its[key], ceiling=level) for key, level in too_much.items()}
            levels[gpu] = divide(capacities[gpu], {**its, **capped})
    tightest = _tightest(levels)
    return {gpu: {key: tightest[key] for key in its} for gpu, its in levels.items()}


def _tightest(levels: Mapping[G, Mapping[K, int]]) -> dict[K, int]:
    tightest: dict[K, int] = {}
    for its in levels.values():
        for key, level in its.items():
            tightest[key] = min(level, tightest.get(key, level))
    return tightest


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
