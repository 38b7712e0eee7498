"""What each model is asked for, counted as requests come and go. Is told the time; predicts nothing.

Rates forget exponentially: a request counts 1/τ at once and fades with τ, so a steady stream reads as its rate and silence as
its absence, without any list of past requests.
"""

from __future__ import annotations

import math

import msgspec

from chimera.core.request import Request
from chimera.core.snapshot import Demand

SHORT_S = 10.0
LONG_S = 60.0
LENGTH_MEMORY = 0.95


class Counter(msgspec.Struct, kw_only=True):
    """One model's memory."""

    short_per_s: float = 0.0
    long_per_s: float = 0.0
    at_s: float = 0.0
    """The moment the rates are told for."""
    stirred_s: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    total: int = 0

    def _fade(self, now: float) -> None:
        passed_s = now - self.at_s
        if passed_s > 0:
            self.short_per_s *= math.exp(-passed_s / SHORT_S)
            self.long_per_s *= math.exp(-passed_s / LONG_S)
            self.at_s = now

    def came(self, request: Request, now: float) -> None:
        self._fade(now)
        self.stirred_s = now
        if request.tries:
            return  # the same request again
        self.short_per_s += 1 / SHORT_S
        self.long_per_s += 1 / LONG_S
        self.prompt_tokens = self._mean(self.prompt_tokens, request.prompt_tokens)
        if not self.output_tokens:
            self.output_tokens = request.max_tokens  # a bound, until one has ended
        self.total += 1

    def ended(self, output_tokens: int, now: float) -> None:
        self.stirred_s = now
        self.output_tokens = self._mean(self.output_tokens, output_tokens)

    def _mean(self, mean: float, value: float) -> float:
        return LENGTH_MEMORY * mean + (1 - LENGTH_MEMORY) * value if mean else float(value)

    def view(self, now: float, *, waiting: int, waited_s: float, open: int) -> Demand:
        self._fade(now)
        return Demand(
            requests_per_s=self.short_per_s,
            requests_per_s_minute=self.long_per_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            idle_s=now - self.stirred_s,
            waiting=waiting,
            waited_s=waited_s,
            open=open,
            total=self.total,
        )
