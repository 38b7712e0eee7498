"""One simulation, from its inputs to its figures. Draws nothing itself: what is random was drawn when the trace was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.metrics import Metrics, Story, Tallies
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.sched.cost import CostTable
from chimera.sched.fleet import Limits
from chimera.sched.policies import policy_named
from chimera.sched.policies.policy import WarmRules
from chimera.sched.queues import local_of
from chimera.sim.chronicle import Chronicle
from chimera.sim.cluster import Cluster, Witness
from chimera.sim.placing import evenly, require_fitting
from chimera.trace.trace import Row, Trace

WARM_UP_S = 60.0
"""The system comes up before the first request is sent."""
COOL_DOWN_S = 300.0
"""So long after the last request an answer still counts."""
LOOK_EVERY = 16
"""After so many requests it is asked whether too many have missed a promise."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[ModelSpec, ...]
    gpus: tuple[Gpu, ...]
    costs: CostTable
    policy: str = "flexible"
    local: str | None = None
    """`None` takes the order that the policy is known with."""
    filed: Placement | None = None
    """`None` places every model once, as an operator without knowledge of the load would."""
    warm: WarmRules = WarmRules()
    limits: Limits = Limits()

    @property
    def local_policy(self) -> str:
        return local_of(self.policy) if self.local is None else self.local


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    policy: str
    local: str
    metrics: Metrics
    by_model: dict[str, Metrics]
    gpu_s: float
    busy_gpu_s: float
    switches: int
    switch_mean_s: float
    moves: int
    requeues: int


def simulate(
    scenario: Scenario,
    trace: Trace,
    *,
    chronicle: Chronicle | None = None,
    progress: Callable[[float], None] | None = None,
    script: Sequence[tuple[float, Callable[[Cluster], None]]] = (),
    keep: Callable[[list[Story]], None] | None = None,
    witness: Witness | None = None,
    most_missed: int | None = None,
) -> Outcome:
    """`script` holds what else happens, by the time of the trace: failures, changes of policy. Once more than `most_missed`
    requests have missed a promise, the run ends: for whoever only asks whether so few do."""
    stories: list[Story] = []
    rows = trace.rows if progress is None else _watched(trace.rows, progress)
    told = None if keep is None else stories.append
    outcome = play(scenario, rows, chronicle=chronicle, script=script, told=told, witness=witness, most_missed=most_missed)
    if keep is not None:
        keep([_on_trace_time(story) for story in stories])
    return outcome


def _watched(rows: Sequence[Row], progress: Callable[[float], None]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if number % 1000 == 0:
            progress(number / len(rows))
        yield row


def play(
    scenario: Scenario,
    rows: Iterable[Row],
    *,
    chronicle: Chronicle | None = None,
    script: Sequence[tuple[float, Callable[[Cluster], None]]] = (),
    told: Callable[[Story], None] | None = None,
    witness: Witness | None = None,
    most_missed: int | None = None,
) -> Outcome:
    """`simulate` for millions: rows are drawn as they are sent, and of a request nothing stays but its figures.

    `told` hears each story as it ends, on the simulation's own time.
    """
    require_fitting(scenario.models, scenario.gpus, scenario.costs)
    static = not policy_named(scenario.policy).on_demand
    filed = scenario.filed
    if filed is None:
        filed = evenly(scenario.models, scenario.gpus, scenario.costs, reserved=static)
    tallies = Tallies()

    def ended(story: Story) -> None:
        tallies.add(story)
        if told is not None:
            told(story)

    cluster = Cluster(
        models=scenario.models,
        gpus=scenario.gpus,
        filed=filed,
        costs=scenario.costs,
        policy=scenario.policy,
        local=scenario.local_policy,
        warm=scenario.warm,
        limits=scenario.limits,
        chronicle=chronicle,
        witness=witness,
        told=ended,
    )
    for at_s, happen in script:
        cluster.clock.at(WARM_UP_S + at_s, lambda happen=happen: happen(cluster))  # type: ignore[misc]
    _replay(cluster, rows, tallies, most_missed)
    span_s = cluster.clock.now - WARM_UP_S
    cluster.close_open()
    cluster.end_spans()
    switches = [switch for switch in cluster.switches if switch.asked_s >= WARM_UP_S]
    return Outcome(
        policy=scenario.policy,
        local=scenario.local_policy,
        metrics=tallies.metrics(),
        by_model=tallies.by_model(),
        gpu_s=len(scenario.gpus) * span_s,
        busy_gpu_s=cluster.busy_gpu_s(),
        switches=len(switches),
        switch_mean_s=sum(switch.took_s for switch in switches) / len(switches) if switches else 0.0,
        moves=sum(switch.move for switch in switches),
        requeues=cluster.requeues,
    )


def _on_trace_time(story: Story) -> Story:
    return msgspec.structs.replace(
        story,
        sent_s=story.sent_s - WARM_UP_S,
        first_token_s=None if story.first_token_s is None else story.first_token_s - WARM_UP_S,
        last_token_s=None if story.last_token_s is None else story.last_token_s - WARM_UP_S,
    )


def _replay(cluster: Cluster, rows: Iterable[Row], tallies: Tallies, most_missed: int | None) -> None:
    """Each row is asked for when the one before it is sent."""
    clock = cluster.clock
    coming = iter(rows)
    due: Row | None = None
    sent = 0
    hopeless = False
    end_s = WARM_UP_S + COOL_DOWN_S

    def expect() -> None:
        nonlocal due, end_s
        due = next(coming, None)
        if due is not None:
            clock.at(WARM_UP_S + due.at_s, arrive)
            end_s = WARM_UP_S + due.at_s + COOL_DOWN_S

    def arrive() -> None:
        nonlocal sent, hopeless
        row = due
        assert row is not None
        sent += 1
        if most_missed is not None and sent % LOOK_EVERY == 0:
            hopeless = tallies.missed() + cluster.late() > most_missed
        expect()
        cluster.send(row)

    expect()
    while not hopeless and (due is not None or (cluster.open and clock.now <= end_s)) and clock.step():
        pass
