"""One line of a plan: a load on one kind of GPU, and how few of them are enough for it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from chimera.core.placement import Placement
from chimera.sizing.search import SHARP, Search, Trial
from chimera.sizing.weakness import Break, headroom, weakest


class Fewer(msgspec.Struct, frozen=True, kw_only=True):
    """What one GPU less would do under the same policy."""

    gpus: int
    missed_days: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    """The line's name: how it differs from the plain question."""
    machine: str
    rate: float
    target: float
    days: int
    draws: int
    """A day is the trace so many times in succession, each time drawn anew."""
    requests: float
    """Of a day, on average."""
    enough: bool
    """If not, the rest tells of the most GPUs that were tried."""
    gpus: int
    policy: str
    placement: Placement
    tp_sizes: dict[str, int]
    worst: float
    mean: float
    fewer: Fewer | None
    """`None` where there can be none fewer."""
    carries: float
    """Up to so many times the trace, in steps of a tenth."""
    breaks: Break | None
    gpu_s_per_1000: float
    cost_per_1000: float | None

    @property
    def margin(self) -> float:
        """How far the worst day is above the target."""
        return self.worst - self.target

    @property
    def soft(self) -> bool:
        return self.fewer is not None and self.fewer.missed_days < SHARP * self.days


def answer(what: str, search: Search, policies: Sequence[str], gpu_hour_price: float | None) -> Answer:
    found = search.settle(policies)
    trial = search.trial(search.most, policies[0], decide=False) if found is None else found
    days = range(1, search.load.days + 1)
    carries, breaks = (0.0, weakest(search, trial, search.load.rate, days)) if found is None else headroom(search, trial)
    answered = sum(day.metrics.answered for day in trial.days)
    gpu_s = trial.gpus * sum(day.metrics.span_s for day in trial.days)
    per_1000 = 1000 * gpu_s / max(1, answered)
    return Answer(
        what=what,
        machine=search.costs.machine,
        rate=search.load.rate,
        target=search.target,
        days=search.load.days,
        draws=search.load.draws,
        requests=search.load.requests,
        enough=found is not None,
        gpus=trial.gpus,
        policy=trial.policy,
        placement=trial.placement,
        tp_sizes={model.name: model.tp_size for model in search.load.models},
        worst=trial.worst,
        mean=trial.mean,
        fewer=None if found is None else _fewer(search, trial),
        carries=carries,
        breaks=breaks,
        gpu_s_per_1000=per_1000,
        cost_per_1000=None if gpu_hour_price is None else per_1000 * gpu_hour_price / 3600,
    )


def _fewer(search: Search, trial: Trial) -> Fewer | None:
    if not search.possible(trial.gpus - 1):
        return None
    missed = search.missed(trial.gpus - 1, trial.policy, range(1, search.load.days + 1))
    return Fewer(gpus=trial.gpus - 1, missed_days=missed)
