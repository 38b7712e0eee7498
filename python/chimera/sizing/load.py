"""Who is asked for how much, on any number of days: a trace, and others like it."""

from __future__ import annotations

from collections.abc import Sequence

from chimera.core.model import ModelSpec
from chimera.trace.trace import Trace

ANOTHER = 0
"""The seed of the one more model's requests: no day of a plan has it."""


class Load:
    def __init__(self, models: Sequence[ModelSpec], trace: Trace, rate: float, days: int) -> None:
        """`rate` times the trace; the models have their promises."""
        self.models = tuple(models)
        self.trace = trace
        self.rate = rate
        self.days = days
        self._drawn: dict[int, Trace] = {}

    def day(self, number: int) -> Trace:
        if number not in self._drawn:
            self._drawn[number] = self.trace.another_day(self.rate, number)
        return self._drawn[number]


def one_more(trace: Trace, model: str, name: str) -> Trace:
    """The trace with one more model that is asked for as often as this one, at moments and lengths of its own draw."""
    drawn = trace.only({model}).another_day(1.0, ANOTHER).renamed({model: name})
    return Trace(trace.source, tuple(sorted((*trace.rows, *drawn.rows), key=lambda row: row.at_s)))
