"""Two runs of one trace against each other. Requests are paired by their id, and resampled in blocks of time: requests that
wait together are not independent, and single ones would make intervals that promise too much."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import msgspec

from chimera.bench.record import Record
from chimera.core.metrics import Story, percentile

BLOCKS = 24
"""Of equal length in time, at least."""
DRAWS = 1000


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    value: float
    low: float
    high: float
    """Between them lie 95 of a hundred resampled values."""

    @property
    def sure(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


Measure = Callable[[Story], float]

MEASURES: Mapping[str, Measure] = {
    "ttft": lambda story: float(story.keeps_ttft),
    "tpot": lambda story: float(story.keeps_tpot),
    "joint": lambda story: float(story.keeps_both),
}


def attainment(records: Sequence[Record], measure: Measure, seed: int = 0) -> Interval:
    """The share of requests sent that keep a promise."""
    blocks = _blocks({story.request_id: measure(story) for story in _stories(records)}, records)
    return _resampled(blocks, seed)


def difference(ours: Sequence[Record], theirs: Sequence[Record], measure: Measure, seed: int = 0) -> Interval:
    """Ours less theirs, over the requests that both were sent."""
    first = {story.request_id: measure(story) for story in _stories(ours)}
    second = {story.request_id: measure(story) for story in _stories(theirs)}
    both = {name: first[name] - second[name] for name in first if name in second}
    return _resampled(_blocks(both, ours), seed)


def _stories(records: Sequence[Record]) -> list[Story]:
    return [story for record in records if (story := record.story) is not None]


def _blocks(values: Mapping[str, float], records: Sequence[Record]) -> list[tuple[float, int]]:
    """Sum and count of each block of time."""
    planned = {record.request_id: record.planned_s for record in records if record.request_id in values}
    if not planned:
        return []
    begin_s, end_s = min(planned.values()), max(planned.values())
    width_s = max((end_s - begin_s) / BLOCKS, 1e-9)
    sums: dict[int, tuple[float, int]] = {}
    for name, at_s in planned.items():
        block = min(BLOCKS - 1, int((at_s - begin_s) / width_s))
        total, count = sums.get(block, (0.0, 0))
        sums[block] = (total + values[name], count + 1)
    return [sums[block] for block in sorted(sums)]


def _resampled(blocks: Sequence[tuple[float, int]], seed: int) -> Interval:
    if not blocks:
        return Interval(value=0.0, low=0.0, high=0.0)
    dice = random.Random(f"bootstrap/{seed}")
    means = sorted(_mean(dice.choices(blocks, k=len(blocks))) for _ in range(DRAWS))
    return Interval(value=_mean(blocks), low=percentile(means, 2.5), high=percentile(means, 97.5))


def _mean(blocks: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in blocks) / sum(count for _, count in blocks)
