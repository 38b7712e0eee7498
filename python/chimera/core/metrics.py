"""What a run was worth, in the words of docs/metrics.md. Knows finished stories of requests; does not know who served them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from chimera.core.model import Slo


class Story(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request from its sending to its end, as its client saw it."""

    request_id: str
    model: str
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    """Those that came."""
    slo: Slo = Slo()
    first_token_s: float | None = None
    last_token_s: float | None = None
    """Set when all tokens came."""
    refusal: str = ""
    """Why it was not answered, in one word."""

    @property
    def answered(self) -> bool:
        return self.last_token_s is not None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def keeps_ttft(self) -> bool:
        return self.answered and _kept(self.ttft_s, self.slo.ttft_s)

    @property
    def keeps_tpot(self) -> bool:
        return self.answered and _kept(self.tpot_s, self.slo.tpot_s)

    @property
    def keeps_both(self) -> bool:
        return self.keeps_ttft and self.keeps_tpot


def _kept(value_s: float | None, promise_s: float | None) -> bool:
    return value_s is None or promise_s is None or value_s <= promise_s


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of the answered requests. Empty when there are none."""

    mean_s: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Latency:
        ranked = sorted(value for value in values if value is not None)
        if not ranked:
            return cls()
        return cls(
            mean_s=math.fsum(ranked) / len(ranked),
            p50_s=percentile(ranked, 50),
            p95_s=percentile(ranked, 95),
            p99_s=percentile(ranked, 99),
        )


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Shares are of requests sent; an empty run attains nothing and misses nothing, so its shares are 1."""

    sent: int
    answered: int
    span_s: float
    ttft_attainment: float
    tpot_attainment: float
    joint_attainment: float
    goodput_per_s: float
    throughput_per_s: float
    ttft: Latency
    tpot: Latency
    e2e: Latency
    refusals: dict[str, int] = {}


def measure(stories: Sequence[Story]) -> Metrics:
    sent = len(stories)
    answered = [story for story in stories if story.answered]
    times = [story.sent_s for story in stories]
    span_s = max(times) - min(times) if times else 0.0
    both = sum(story.keeps_both for story in answered)
    refusals: dict[str, int] = {}
    for story in stories:
        if not story.answered:
            word = story.refusal or "open"
            refusals[word] = refusals.get(word, 0) + 1
    return Metrics(
        sent=sent,
        answered=len(answered),
        span_s=span_s,
        ttft_attainment=_share(sum(story.keeps_ttft for story in answered), sent),
        tpot_attainment=_share(sum(story.keeps_tpot for story in answered), sent),
        joint_attainment=_share(both, sent),
        goodput_per_s=both / span_s if span_s else 0.0,
        throughput_per_s=len(answered) / span_s if span_s else 0.0,
        ttft=Latency.of(story.ttft_s for story in answered),
        tpot=Latency.of(story.tpot_s for story in answered),
        e2e=Latency.of(s.last_token_s - s.sent_s for s in answered if s.last_token_s is not None),
        refusals=dict(sorted(refusals.items())),
    )


def measure_by_model(stories: Iterable[Story]) -> dict[str, Metrics]:
    by_model: dict[str, list[Story]] = {}
    for story in stories:
        by_model.setdefault(story.model, []).append(story)
    return {model: measure(by_model[model]) for model in sorted(by_model)}


def percentile(ranked: Sequence[float], percent: float) -> float:
    """The smallest of the ranked values that at least `percent` of them do not exceed."""
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
