"""What is counted for `/metrics`: running sums since a process began, that can be added up over processes.

Knows what the numbers mean (docs/metrics.md), not what Prometheus or anybody else calls them.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import msgspec

from chimera.core.record import RequestRecord

# The buckets of vLLM and SGLang, so that their dashboards read ours.
TTFT_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
                 160.0, 640.0, 2560.0)  # fmt: skip
GAP_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
E2E_S: Final = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
                1920.0, 7680.0)  # fmt: skip
LOAD_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
DECISION_S: Final = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)

MOST_MODELS: Final = 512
"""So many models have figures of their own; what comes later is counted together."""
OTHERS: Final = "_others"


class Histogram(msgspec.Struct):
    """How many values fell into each bucket; the last has what is beyond all bounds."""

    counts: list[int]
    total: float = 0.0

    @classmethod
    def over(cls, bounds: tuple[float, ...]) -> Histogram:
        return cls([0] * (len(bounds) + 1))

    @property
    def count(self) -> int:
        return sum(self.counts)

    def see(self, value: float, bounds: tuple[float, ...], times: int = 1) -> None:
        self.counts[bisect_left(bounds, value)] += times
        self.total += value * times

    def add(self, other: Histogram) -> None:
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


def _gaps() -> Histogram:
    return Histogram.over(GAP_S)


class Steps(msgspec.Struct):
    """What came out of one model's engines, as the front-ends see it token by token."""

    tokens: int = 0
    gaps: Histogram = msgspec.field(default_factory=_gaps)
    """Between one token of a request and its next."""

    def add(self, other: Steps) -> None:
        self.tokens += other.tokens
        self.gaps.add(other.gaps)


class Tally(msgspec.Struct):
    """What one front-end has counted since it began."""

    steps: dict[str, Steps] = {}
    """By model."""
    answers: dict[str, int] = {}
    """HTTP answers, by status."""

    def add(self, other: Tally) -> None:
        for model, steps in other.steps.items():
            self.steps.setdefault(model, Steps()).add(steps)
        add_counts(self.answers, other.answers)


class ModelMeasures(msgspec.Struct):
    """One model's requests that have ended, however they ended."""

    ttft: Histogram = msgspec.field(default_factory=lambda: Histogram.over(TTFT_S))
    tpot: Histogram = msgspec.field(default_factory=_gaps)
    e2e: Histogram = msgspec.field(default_factory=lambda: Histogram.over(E2E_S))
    queue: Histogram = msgspec.field(default_factory=lambda: Histogram.over(TTFT_S))
    """From the request's arrival until an engine was given it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    outcomes: dict[str, int] = {}
    """`stop`, `length`, `cancelled`, or the code of the refusal or failure."""
    kept_ttft: int = 0
    kept_tpot: int = 0
    kept_both: int = 0
    requeued: int = 0
    lost_cached_tokens: int = 0
    """Prefixes that went because memory was recalled."""

    @property
    def sent(self) -> int:
        return sum(self.outcomes.values())

    def note(self, record: RequestRecord) -> None:
        self.outcomes[record.outcome] = self.outcomes.get(record.outcome, 0) + 1
        self.requeued += record.tries
        story = record.story
        self.kept_ttft += story.keeps_ttft
        self.kept_tpot += story.keeps_tpot
        self.kept_both += story.keeps_both
        if (ttft_s := story.ttft_s) is not None:
            self.ttft.see(ttft_s, TTFT_S)
            self.prompt_tokens += record.prompt_tokens
            self.cached_tokens += record.cached_tokens
        if story.answered:
            self.e2e.see(record.ended_s - record.arrived_s, E2E_S)
            if (tpot_s := story.tpot_s) is not None:
                self.tpot.see(tpot_s, GAP_S)


class Measures(msgspec.Struct):
    """All that the server has counted, front-ends included; what one reads from `/metrics` beside the snapshot."""

    models: dict[str, ModelMeasures] = {}
    tally: Tally = msgspec.field(default_factory=Tally)
    decisions: Histogram = msgspec.field(default_factory=lambda: Histogram.over(DECISION_S))
    activations: dict[str, Histogram] = {}
    """Seconds from the order to serving, by kind: `first` on a GPU, `again`, or the other end of a `move`."""
    actions: dict[str, int] = {}
    """Committed, by kind."""
    moves: int = 0
    failures: int = 0
    """Activations that failed and workers that were lost."""
    records_kept: int = 0
    records_lost: int = 0
    """Because the store could not take them: a full disk."""

    def of(self, model: str) -> ModelMeasures:
        known = self.models.get(model)
        if known is None:
            model = model if len(self.models) < MOST_MODELS else OTHERS
            known = self.models.setdefault(model, ModelMeasures())
        return known

    def count(self, action: str) -> None:
        self.actions[action] = self.actions.get(action, 0) + 1


def add_counts(sums: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        sums[name] = sums.get(name, 0) + count
