"""What a run was worth, in the words of docs/metrics.md. Knows finished stories of requests; does not know who served them."""

from __future__ import annotations

import math
from array import array
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
    def of(cls, values: Iterable[float]) -> Latency:
        ranked = sorted(values)
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


class Tally:
    """The stories of many requests, without the stories: counts, and three numbers for each that was answered."""

    def __init__(self) -> None:
        self.sent = 0
        self.first_s = math.inf
        self.last_s = -math.inf
        self.kept_ttft = 0
        self.kept_tpot = 0
        self.kept_both = 0
        self.refusals: dict[str, int] = {}
        self.ttft = array("d")
        self.tpot = array("d")
        self.e2e = array("d")

    def add(self, story: Story) -> None:
        self.sent += 1
        if story.sent_s < self.first_s:
            self.first_s = story.sent_s
        if story.sent_s > self.last_s:
            self.last_s = story.sent_s
        if story.last_token_s is None:
            word = story.refusal or "open"
            self.refusals[word] = self.refusals.get(word, 0) + 1
            return
        ttft_s, tpot_s = story.ttft_s, story.tpot_s
        in_time, at_pace = _kept(ttft_s, story.slo.ttft_s), _kept(tpot_s, story.slo.tpot_s)
        self.kept_ttft += in_time
        self.kept_tpot += at_pace
        self.kept_both += in_time and at_pace
        self.e2e.append(story.last_token_s - story.sent_s)
        if ttft_s is not None:
            self.ttft.append(ttft_s)
        if tpot_s is not None:
            self.tpot.append(tpot_s)

    def include(self, other: Tally) -> None:
        self.sent += other.sent
        self.first_s, self.last_s = min(self.first_s, other.first_s), max(self.last_s, other.last_s)
        self.kept_ttft += other.kept_ttft
        self.kept_tpot += other.kept_tpot
        self.kept_both += other.kept_both
        for word, count in other.refusals.items():
            self.refusals[word] = self.refusals.get(word, 0) + count
        self.ttft += other.ttft
        self.tpot += other.tpot
        self.e2e += other.e2e

    def metrics(self) -> Metrics:
        sent, answered = self.sent, len(self.e2e)
        span_s = self.last_s - self.first_s if sent else 0.0
        return Metrics(
            sent=sent,
            answered=answered,
            span_s=span_s,
            ttft_attainment=_share(self.kept_ttft, sent),
            tpot_attainment=_share(self.kept_tpot, sent),
            joint_attainment=_share(self.kept_both, sent),
            goodput_per_s=self.kept_both / span_s if span_s else 0.0,
            throughput_per_s=answered / span_s if span_s else 0.0,
            ttft=Latency.of(self.ttft),
            tpot=Latency.of(self.tpot),
            e2e=Latency.of(self.e2e),
            refusals=dict(sorted(self.refusals.items())),
        )


class Tallies:
    """One for each model."""

    def __init__(self, stories: Iterable[Story] = ()) -> None:
        self._of: dict[str, Tally] = {}
        for story in stories:
            self.add(story)

    def add(self, story: Story) -> None:
        tally = self._of.get(story.model)
        if tally is None:
            tally = self._of[story.model] = Tally()
        tally.add(story)

    def missed(self) -> int:
        """How many did not keep both promises."""
        return sum(tally.sent - tally.kept_both for tally in self._of.values())

    def metrics(self) -> Metrics:
        """Of all of them together."""
        whole = Tally()
        for tally in self._of.values():
            whole.include(tally)
        return whole.metrics()

    def by_model(self) -> dict[str, Metrics]:
        return {model: self._of[model].metrics() for model in sorted(self._of)}


def measure(stories: Iterable[Story]) -> Metrics:
    return Tallies(stories).metrics()


def measure_by_model(stories: Iterable[Story]) -> dict[str, Metrics]:
    return Tallies(stories).by_model()


def percentile(ranked: Sequence[float], percent: float) -> float:
    """The smallest of the ranked values that at least `percent` of them do not exceed."""
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
