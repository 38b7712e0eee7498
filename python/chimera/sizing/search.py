"""The fewest GPUs that are enough: enough is what keeps the target on every one of several days like the trace.

A day is the trace with its arrivals drawn anew (`Load.day`), so ten days are ten different bursts of the same load, and one
day on which the target is missed decides that so many GPUs are not enough. Counts are tried from what cannot be undercut, in
growing steps, and then by halving. A first look, at few days of one draw each, says around which count to try whole days.
Where days do not agree, they were too short to tell, and are made as long as it takes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
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
SHARP = 0.9
"""On so many of the days one GPU fewer has to miss the target, or the boundary is soft."""
APART = 2.0
"""Days agree where so many of their standard deviations lie between their mean and the target."""
LOOK_DAYS = 3
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

    def length(self, target: float) -> float:
        """So many times as long the days should be to agree. Four times as long, and the spread between them is half."""
        spread = statistics.stdev(day.metrics.joint_attainment for day in self.days) if len(self.days) > 1 else 0.0
        return (APART * spread / abs(self.mean - target)) ** 2 if spread else 1.0

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

    def settle(self, policies: Sequence[str]) -> Trial | None:
        """The fewest, on days long enough to tell them from one fewer, where days may be so long."""
        found = self.fewest(policies, self._look(policies[0]))
        if found is not None and (longer := self.load.longer(self._length(found))) is not None:
            self.load = longer
            self._whole.clear()
            self._broken_off.clear()
            found = self.fewest(policies, found.gpus)
        return found

    def _look(self, policy: str) -> int:
        glance = self.load.glance(LOOK_DAYS)
        search = self if glance is None else Search(glance, self.costs, self.target, self.most, self._watch)
        found = search._gallop(policy)
        return self.most if found is None else found.gpus

    def _length(self, found: Trial) -> float:
        """Of days, in times of these, on which the answer and one fewer would be told from the target."""
        needed = found.length(self.target)
        if self._is_soft(found):
            needed = max(needed, self.trial(found.gpus - 1, found.policy, decide=False).length(self.target))
        return needed

    def fewest(self, policies: Sequence[str], near: int) -> Trial | None:
        """The policy that needs the fewest; among equals the one whose worst day is best. `None`: `most` are not enough."""
        best: Trial | None = None
        for policy in policies:
            found = self._near(policy, near) if best is None else self._better(policy, best)
            best = found or best
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
            known = self._run(gpus, policy, self.load.rate, day, self.target if decide else None)
            kept = not decide or known.metrics.joint_attainment >= self.target
            (self._whole if kept else self._broken_off)[key] = known
        return known

    def missed(self, gpus: int, policy: str, days: Iterable[int]) -> int:
        """On how many of these days the target is missed."""
        return sum(not self.carries(gpus, policy, self.load.rate, day) for day in days)

    def carries(self, gpus: int, policy: str, rate: float, day: int) -> bool:
        """Whether the GPUs keep the target on a day of another load, laid out as for this one."""
        if rate == self.load.rate:
            return self.outcome(gpus, policy, day, decide=True).metrics.joint_attainment >= self.target
        return self._run(gpus, policy, rate, day, self.target).metrics.joint_attainment >= self.target

    def _run(self, gpus: int, policy: str, rate: float, day: int, least: float | None) -> Outcome:
        """Broken off where the attainment falls below the `least` that is of interest."""
        rows = self.load.day(day, rate)
        title = f"{policy} on {gpus}, day {day}" + (f", ×{rate:.2g}" if rate != 1 else "")
        return simulate(
            self.scenario(gpus, policy),
            rows,
            progress=None if self._watch is None else self._watch(title),
            most_missed=None if least is None else math.floor((1 - least) * len(rows.rows)),
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

    def _near(self, policy: str, count: int) -> Trial | None:
        upwards = (self._enough(gpus, policy) for gpus in range(max(count, self.least(policy)), self.most + 1))
        return self._down(policy, count - 1) or next(filter(None, upwards), None)

    def _gallop(self, policy: str) -> Trial | None:
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

    def _down(self, policy: str, gpus: int) -> Trial | None:
        """If so many are enough, then the fewest that are, one after the other."""
        found, least = None, self.least(policy)
        while gpus >= least and (fewer := self._enough(gpus, policy)) is not None:
            found, gpus = fewer, gpus - 1
        return found

    def _better(self, policy: str, best: Trial) -> Trial | None:
        """This policy, with fewer GPUs; or with as many, if none of its days is as bad as the worst of the best."""
        if (fewer := self._down(policy, best.gpus - 1)) is not None:
            return fewer
        days = []
        for number in range(1, self.load.days + 1):
            day = self._whole.get((best.gpus, policy, number)) or self._run(
                best.gpus, policy, self.load.rate, number, best.worst
            )
            if day.metrics.joint_attainment <= best.worst:
                return None
            days.append(day)
            self._whole[best.gpus, policy, number] = day
        return Trial(gpus=best.gpus, policy=policy, placement=self.placement(best.gpus, policy), days=tuple(days))

    def _is_soft(self, found: Trial) -> bool:
        """One GPU fewer keeps the target on too many days."""
        if not self.possible(found.gpus - 1):
            return False
        kept = 0
        for number in range(1, self.load.days + 1):
            kept += self.carries(found.gpus - 1, found.policy, self.load.rate, number)
            if self.load.days - kept < SHARP * self.load.days:
                return True
        return False

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
