"""A trace as a value: rows in order of time, and other traces made from it. Random only by the seed that it is given."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence

import msgspec

from chimera.errors import ConfigError

SPREAD_S = 5.0
"""How far from its original a copy of a request may be sent, to either side."""


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request: when, to whom, how long the question and the answer."""

    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """What the prompt begins with, in blocks of 512 tokens: equal numbers are equal text. Not known from most traces."""


class Trace(msgspec.Struct, frozen=True):
    source: str
    rows: tuple[Row, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """By name, which is the order of the shipped files."""
        return tuple(sorted({row.model for row in self.rows}))

    @property
    def span_s(self) -> float:
        return self.rows[-1].at_s - self.rows[0].at_s if self.rows else 0.0

    def cut(self, from_s: float = 0.0, to_s: float = math.inf) -> Trace:
        """The rows of `from_s` ≤ time < `to_s`, told from zero."""
        kept = (row for row in self.rows if from_s <= row.at_s < to_s)
        return Trace(self.source, tuple(msgspec.structs.replace(row, at_s=row.at_s - from_s) for row in kept))

    def time_scaled(self, scale: float) -> Trace:
        _require_positive(self.source, "time scale", scale)
        return Trace(self.source, tuple(msgspec.structs.replace(row, at_s=row.at_s * scale) for row in self.rows))

    def rate_scaled(self, scale: float, seed: int) -> Trace:
        """Each request `scale` times on average; see docs/metrics.md. 1 gives the very same rows."""
        _require_positive(self.source, "rate scale", scale)
        if scale == 1:
            return self
        draw = random.Random(f"{seed}:{scale}")
        last_s = self.rows[-1].at_s if self.rows else 0.0
        rows = []
        for row in self.rows:
            copies = math.floor(scale) + (draw.random() < scale - math.floor(scale))
            for copy in range(copies):
                shift_s = draw.uniform(-SPREAD_S, SPREAD_S) if copy else 0.0
                rows.append(msgspec.structs.replace(row, at_s=min(last_s, max(0.0, row.at_s + shift_s))))
        rows.sort(key=lambda row: row.at_s)
        return Trace(self.source, tuple(rows))

    @property
    def period_s(self) -> float:
        """After so long it may begin again: the mean gap lies between the last request and the next first one."""
        return self.span_s * len(self.rows) / max(1, len(self.rows) - 1)

    def another_day(self, scale: float, seed: int, draws: int = 1) -> Trace:
        """The trace so many times in succession, each time drawn anew, `scale` times as busy on average: of each request as
        many as a Poisson draw says.

        The first of them keeps its moment and the others come close to it, as with `rate_scaled`. The draws share the chances
        of a request evenly (a Latin hypercube), so a day of many draws is as busy as another one; see docs/metrics.md.
        """
        _require_positive(self.source, "rate scale", scale)
        draw = random.Random(f"day/{seed}:{scale}:{draws}")
        last_s = self.rows[-1].at_s if self.rows else 0.0
        period_s = self.period_s
        parts = [list(range(draws)) for _ in range(math.ceil(scale))]
        rows = []
        for row in self.rows:
            for part in parts:
                draw.shuffle(part)
            for number in range(draws):
                chances = ((part[number] + draw.random()) / draws for part in parts)
                for copy in range(sum(_poisson(chance, scale / len(parts)) for chance in chances)):
                    shift_s = draw.uniform(-SPREAD_S, SPREAD_S) if copy else 0.0
                    at_s = min(last_s, max(0.0, row.at_s + shift_s))
                    rows.append(msgspec.structs.replace(row, at_s=number * period_s + at_s))
        rows.sort(key=lambda row: row.at_s)
        return Trace(self.source, tuple(rows))

    def length_scaled(self, scale: float) -> Trace:
        """Prompts and answers `scale` times as long, at least one token each."""
        _require_positive(self.source, "length scale", scale)
        if scale == 1:
            return self
        return Trace(
            self.source,
            tuple(
                msgspec.structs.replace(
                    row,
                    prompt_tokens=max(1, round(row.prompt_tokens * scale)),
                    output_tokens=max(1, round(row.output_tokens * scale)),
                )
                for row in self.rows
            ),
        )

    def clipped(self, contexts: Mapping[str, int]) -> tuple[Trace, int]:
        """What fits into each model's context, and how many rows were cut.

        The answer is cut first, to half of the context; then the prompt, to what the answer leaves.
        """
        rows = []
        cut = 0
        for row in self.rows:
            context = contexts.get(row.model)
            if context is not None and row.prompt_tokens + row.output_tokens > context:
                output = min(row.output_tokens, max(1, context // 2))
                prompt = max(1, min(row.prompt_tokens, context - output))
                row = msgspec.structs.replace(row, prompt_tokens=prompt, output_tokens=output)
                cut += 1
            rows.append(row)
        return Trace(self.source, tuple(rows)), cut

    def only(self, models: Collection[str]) -> Trace:
        return Trace(self.source, tuple(row for row in self.rows if row.model in models))

    def renamed(self, names: Mapping[str, str]) -> Trace:
        return Trace(self.source, tuple(msgspec.structs.replace(row, model=names[row.model]) for row in self.rows))


def names_for(trace: Trace, ours: Sequence[str], wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which of our models stands for each model of the trace.

    What `wanted` says comes first; then equal names; the rest go by order, and begin again when the trace has more.
    """
    wanted = dict(wanted or {})
    if not ours:
        raise ConfigError.single(trace.source, "there is no model to replay it on")
    theirs = trace.models
    for name, model in wanted.items():
        if name not in theirs:
            raise ConfigError.single(trace.source, f"has no model {name!r}; it has {', '.join(theirs)}")
        if model not in ours:
            raise ConfigError.single(trace.source, f"{name!r} is mapped to {model!r}, which is not among {', '.join(ours)}")
    names = {name: wanted.get(name) or name for name in theirs if name in wanted or name in ours}
    taken = set(names.values())
    free = [model for model in ours if model not in taken] or list(ours)
    for number, name in enumerate(name for name in theirs if name not in names):
        names[name] = free[number % len(free)]
    return {name: names[name] for name in theirs}


def _poisson(chance: float, mean: float) -> int:
    """How many come where so large a share of all draws has fewer. The mean is 1 at most."""
    count, part = 0, math.exp(-mean)
    below = part
    while below <= chance and part:
        count += 1
        part *= mean / count
        below += part
    return count


def _require_positive(source: str, what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError.single(source, f"the {what} is {value:g}; it has to be above zero")
