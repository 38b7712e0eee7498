"""Who is asked for how much, on any number of days: a trace, and others like it.

A trace of five minutes has a handful of requests that may be let down, and by chance it is twice as many or none. So a day of
a plan is the trace as often in succession, each time drawn anew, as it takes until chance is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chimera.core.model import ModelSpec
from chimera.trace.trace import Trace

ANOTHER = 0
"""The seed of the one more model's requests: no day of a plan has it."""
REQUESTS = 5_000
"""A day has so many, of which 99 % leave fifty to be let down,"""
DAY_S = 3_600.0
"""or lasts so long: idle hours cost time too."""
LONGEST = 6
"""At most so many times as many requests, or as long."""


class Load:
    def __init__(self, models: Sequence[ModelSpec], trace: Trace, rate: float, days: int, draws: int | None = None) -> None:
        """`rate` times the trace; the models have their promises. A day is so many draws, or as many as it needs."""
        self.models = tuple(models)
        self.trace = trace
        self.rate = rate
        self.days = days
        self._each = rate * len(trace.rows)
        self.draws = self._draws() if draws is None else draws
        self._drawn: dict[int, Trace] = {}

    def day(self, number: int, rate: float | None = None) -> Trace:
        """At another rate it has as many requests, so it is shorter or longer."""
        if rate is not None and rate != self.rate:
            return self.trace.another_day(rate, number, math.ceil(self.draws * self.rate / rate))
        if number not in self._drawn:
            self._drawn[number] = self.trace.another_day(self.rate, number, self.draws)
        return self._drawn[number]

    @property
    def requests(self) -> float:
        """Of a day, on average."""
        return self.draws * self._each

    def glance(self, days: int) -> Load | None:
        """Fewer days of one draw each; `None` where a day is no more than that."""
        return Load(self.models, self.trace, self.rate, min(days, self.days), 1) if self.draws > 1 else None

    def longer(self, times: float) -> Load | None:
        """With days so many times as long; `None` where that is no longer than now, or too long."""
        draws = math.ceil(times * self.draws)
        return (
            Load(self.models, self.trace, self.rate, self.days, draws) if self.draws < draws <= self._draws(LONGEST) else None
        )

    def _draws(self, times: int = 1) -> int:
        period_s = self.trace.period_s
        if times * REQUESTS <= self._each or times * DAY_S <= period_s or not period_s:
            return 1
        return min(math.ceil(times * REQUESTS / self._each), math.ceil(times * DAY_S / period_s))


def one_more(trace: Trace, model: str, name: str) -> Trace:
    """The trace with one more model that is asked for as often as this one, at moments and lengths of its own draw."""
    drawn = trace.only({model}).another_day(1.0, ANOTHER).renamed({model: name})
    return Trace(trace.source, tuple(sorted((*trace.rows, *drawn.rows), key=lambda row: row.at_s)))
