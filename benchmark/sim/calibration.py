"""A cost table for a server that is running, from requests that are nobody's: one by one, and several at once.

It asks in rounds, because a machine that others share is another one a minute later: rounds between the pieces of a
measurement see the machine that the measurement sees. A machine at rest wakes slowly: here a first token took half as long
again when nothing was asked for a quarter of a second. In a load about half of the requests find a system at rest, so half of
those that come one by one follow on the heels of the one before them, and half after a rest. Knows no HTTP.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from chimera.config.cost_tables import read_cost_table
from chimera.core.metrics import Story
from chimera.core.model import ModelSpec
from chimera.sched.cost import CostTable, Factors
from chimera.trace.trace import Row, Trace

from benchmark.sim import fit

Server = Callable[[Trace, int | None], Awaitable[list[Story]]]
"""What becomes of a trace's rows, in their order; with a number, so many are asked at a time, whatever the clock says."""

LONE = 12
"""On the heels of each other, and as many that come every so often."""
LONE_EVERY_S = 0.25
TOGETHER, TOGETHER_EVERY_S, TOGETHER_TOKENS = (1, 2, 4, 8), 0.4, 24


class Calibration:
    """The first model by name gives the coefficients, and the others' factors follow from their own times."""

    def __init__(self, models: Iterable[ModelSpec], server: Server, longest: int) -> None:
        """Prompts are of at most `longest` tokens."""
        self._models = sorted(models, key=lambda model: model.name)
        self._server, self._longest = server, longest
        self._lone: dict[str, fit.Points] = {model.name: [] for model in self._models}
        """TTFT by prompt tokens of requests that come one at a time."""
        self._paces: dict[str, fit.Points] = {model.name: [] for model in self._models}
        """TPOT by answers that are made at once."""

    async def ask(self, draw: random.Random) -> None:
        """One round more."""
        for model in self._models:
            await self._ask(model.name, draw)

    async def _ask(self, model: str, draw: random.Random) -> None:
        """Lengths come in no order, or a slow moment would be a slope."""
        for concurrency in (1, None):
            lone = [Row(n * LONE_EVERY_S, model, draw.randrange(10, self._longest), 2) for n in range(LONE)]
            for story in await self._server(Trace("one by one", tuple(lone)), concurrency):
                if story.ttft_s is not None:
                    self._lone[model].append((story.prompt_tokens, story.ttft_s))
        counts = [(n * TOGETHER_EVERY_S, count) for n, count in enumerate(TOGETHER) for _ in range(count)]
        groups = [Row(at_s, model, 16, TOGETHER_TOKENS) for at_s, _ in counts]
        for (_, count), story in zip(counts, await self._server(Trace("at once", tuple(groups)), None), strict=True):
            if story.tpot_s is not None:
                self._paces[model].append((count, story.tpot_s))

    def table(self) -> CostTable:
        """Of all rounds so far."""
        base = json.loads(read_cost_table("cpu-2-cores")) | {"machine": "this machine, SGLang on tiny models"}
        first = self._models[0]
        told = fit.fitted(msgspec.to_builtins(first), base, self._lone[first.name], self._paces[first.name])
        table = msgspec.convert(told, type=CostTable)
        return msgspec.structs.replace(table, refined={model.name: self._factors(table, model) for model in self._models[1:]})

    def _factors(self, table: CostTable, model: ModelSpec) -> Factors:
        cost = table.plain(model)
        return Factors(
            prefill=_ratio([(s - table.request_s, cost.prompt_s(tokens)) for tokens, s in self._lone[model.name]]),
            decode=_ratio([(s, cost.decode_s(count, count * 40)) for count, s in self._paces[model.name]]),
        )


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return max(0.05, sum(seen for seen, _ in pairs) / sum(told for _, told in pairs))
