"""The fewest GPUs that are enough: enough is what keeps the target on every one of several days like the trace.

A day is the trace with its arrivals drawn anew (`Trace.another_day`), so ten days are ten different bursts of the same load,
and one day on which the target is missed decides that so many GPUs are not enough. Counts are tried from what cannot be
undercut, in growing steps, and then by halving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import msgspec

from chimera.core.placement import Placement
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable
from chimera.sched.policies import policy_named
from chimera.sim.placing import gpus_of
from chimera.sim.run import Outcome, Scenario, simulate
from chimera.sizing.layout import lay_out, work_of
from chimera.sizing.load import Load

LOCAL = "goodput"
"""The order of requests: ours, which is what `serve` does unasked."""
TOGETHER = 4.0
"""So many requests are decoded at once when the work of a model is reckoned for its place."""

Watch = Callable[[str], Callable[[float], None] | None]
"""Told what is tried next; what it gives back is told how far that is."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """So many GPUs under one policy, on as many days as it took to know."""

    gpus: int
    policy: str
    placement: Placement
    days: tuple[Outcome, ...]

    @property
    def worst(self) -> float:
        return min(day.metrics.joint_attainment for day in self.days)

    @property
    def mean(self) -> float:
        return math.fsum(day.metrics.joint_attainment for day in self.days) / len(self.days)

    def missed(self, target: float) -> int:
        return sum(day.metrics.joint_attainment < target for day in self.days)


class Search:
    def __init__(self, load: Load, costs: CostTable, target: float, most: int, watch: Watch | None = None) -> None:
        """`most` GPUs are tried, and no more. ConfigError if so many cannot hold every model."""
        self.load = load
        self.costs = costs
        self.target = target
        self.most = most
        self._watch = watch
        self._work = work_of(load.models, load.trace, costs, TOGETHER)
        widest = max(load.models, key=lambda model: model.tp_size)
        if widest.tp_size > most:
            raise ConfigError.single(
                "models", f"{widest.name} needs {widest.tp_size} GPUs, and no more than {most} may be tried"
            )
        self._whole: dict[tuple[int, str, int], Outcome] = {}
        self._broken_off: dict[tuple[int, str, int], Outcome] = {}
        """Days of which no more is known than that they miss the target."""

    def fewest(self, policies: Sequence[str]) -> Trial | None:
        """The policy that needs the fewest; among equals the one whose worst day is best. `None`: `most` are not enough."""
        best: Trial | None = None
        for policy in policies:
            found = self._fewest(policy) if best is None else self._no_more_than(policy, best.gpus)
            if found is not None and (best is None or (found.gpus, -found.worst) < (best.gpus, -best.worst)):
                best = found
        return best

    def trial(self, gpus: int, policy: str, *, decide: bool = True) -> Trial:
        """Up to the first day that misses the target, or all days."""
        days = []
        for number in range(1, self.load.days + 1):
            days.append(self.outcome(gpus, policy, number, decide=decide))
            if decide and days[-1].metrics.joint_attainment < self.target:
                break
        return Trial(gpus=gpus, policy=policy, placement=self.placement(gpus, policy), days=tuple(days))

    def outcome(self, gpus: int, policy: str, day: int, *, decide: bool = False) -> Outcome:
        """Of a whole day; or, to `decide`, of as much of it as shows that it misses the target."""
        key = (gpus, policy, day)
        known = self._whole.get(key) or (self._broken_off.get(key) if decide else None)
        if known is None:
            known = self._run(gpus, policy, self.load.rate, day, decide=decide)
            kept = not decide or known.metrics.joint_attainment >= self.target
            (self._whole if kept else self._broken_off)[key] = known
        return known

    def carries(self, gpus: int, policy: str, rate: float, day: int) -> bool:
        """Whether the GPUs keep the target on a day of another load, laid out as for this one."""
        if rate == self.load.rate:
            return self.outcome(gpus, policy, day, decide=True).metrics.joint_attainment >= self.target
        return self._run(gpus, policy, rate, day, decide=True).metrics.joint_attainment >= self.target

    def _run(self, gpus: int, policy: str, rate: float, day: int, *, decide: bool) -> Outcome:
        rows = self.load.day(day) if rate == self.load.rate else self.load.trace.another_day(rate, day)
        title = f"{policy} on {gpus}, day {day}" + (f", ×{rate:.2g}" if rate != 1 else "")
        return simulate(
            self.scenario(gpus, policy),
            rows,
            progress=None if self._watch is None else self._watch(title),
            most_missed=math.floor((1 - self.target) * len(rows.rows)) if decide else None,
        )

    def scenario(self, gpus: int, policy: str) -> Scenario:
        return Scenario(
            models=self.load.models,
            gpus=gpus_of(gpus, self.costs.gpu_bytes),
            costs=self.costs,
            policy=policy,
            local=LOCAL,
            filed=self.placement(gpus, policy),
        )

    def placement(self, gpus: int, policy: str) -> Placement:
        reserved = not policy_named(policy).on_demand
        cluster = gpus_of(gpus, self.costs.gpu_bytes)
        work = {model: self.load.rate * seconds for model, seconds in self._work.items()}
        return lay_out(self.load.models, work, self.load.trace.span_s, cluster, self.costs, reserved=reserved)

    def possible(self, gpus: int) -> bool:
        """Whether so many can hold the widest model at all."""
        return gpus >= max(model.tp_size for model in self.load.models)

    def least(self, policy: str) -> int:
        """What no placement can undercut: the widest model, the seconds of work, and for `static` all weights at once."""
        price = {m.name: (self.costs.of(m), m.tp_size) for m in self.load.models}
        asked = ((*price[row.model], row) for row in self.load.day(1).rows)
        work = sorted(
            ranks * cost.request_s(row.prompt_tokens, row.output_tokens, self.costs.running) for cost, ranks, row in asked
        )
        needed_s = sum(work[: math.floor(self.target * len(work))])  # whoever is let down may be the costliest
        longest = max(row.output_tokens for row in self.load.trace.rows)
        tails = ((m.slo.ttft_s, m.slo.tpot_s) for m in self.load.models)
        tail_s = max(ttft_s + longest * tpot_s if ttft_s and tpot_s else math.inf for ttft_s, tpot_s in tails)
        bounds = [max(model.tp_size for model in self.load.models), math.ceil(needed_s / (self.load.day(1).span_s + tail_s))]
        if not policy_named(policy).on_demand:
            held = sum(self.costs.resident_bytes(m) * m.tp_size for m in self.load.models)
            bounds.append(math.ceil(held / self.costs.gpu_bytes))
        return max(1, *bounds)

    def _fewest(self, policy: str) -> Trial | None:
        below = self.least(policy) - 1
        enough: Trial | None = None
        for low, count in pairwise(_steps(below, self.most)):
            below = low
            enough = self._enough(count, policy)
            if enough is not None:
                break
        while enough is not None and enough.gpus - below > 1:
            middle = (below + enough.gpus) // 2
            fewer = self._enough(middle, policy)
            below, enough = (middle, enough) if fewer is None else (below, fewer)
        return enough

    def _no_more_than(self, policy: str, gpus: int) -> Trial | None:
        """Another policy has shown that so many can be enough; whether they are under this one, and one fewer, and so on."""
        found, least = None, self.least(policy)
        while gpus >= least and (fewer := self._enough(gpus, policy)) is not None:
            found, gpus = fewer, gpus - 1
        return found

    def _enough(self, gpus: int, policy: str) -> Trial | None:
        trial = self.trial(gpus, policy)
        return None if trial.missed(self.target) else trial


def _steps(below: int, ceiling: int) -> Iterator[int]:
    """From a count that is not enough upwards in steps that double, to the last that may be tried."""
    count, step = below, 1
    while count < ceiling:
        yield count
        count, step = min(ceiling, count + step), step * 2
    if count == ceiling:
        yield count
