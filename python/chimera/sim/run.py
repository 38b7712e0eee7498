"""One simulation, from its inputs to its figures. Draws nothing itself: what is random was drawn when the trace was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.metrics import Metrics, Story, measure, measure_by_model
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
from chimera.trace.trace import Trace

WARM_UP_S = 60.0
"""The system comes up before the first request is sent."""
COOL_DOWN_S = 300.0
"""So long after the last request an answer still counts."""


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
) -> Outcome:
    """`script` holds what else happens, by the time of the trace: failures, changes of policy."""
    require_fitting(scenario.models, scenario.gpus, scenario.costs)
    static = not policy_named(scenario.policy).on_demand
    filed = scenario.filed
    if filed is None:
        filed = evenly(scenario.models, scenario.gpus, scenario.costs, reserved=static)
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
    )
    for at_s, happen in script:
        cluster.clock.at(WARM_UP_S + at_s, lambda happen=happen: happen(cluster))  # type: ignore[misc]
    _replay(cluster, trace, progress)
    span_s = cluster.clock.now - WARM_UP_S
    cluster.close_open()
    cluster.end_spans()
    stories = cluster.stories
    if keep is not None:
        keep([_on_trace_time(story) for story in stories])
    switches = [switch for switch in cluster.switches if switch.asked_s >= WARM_UP_S]
    return Outcome(
        policy=scenario.policy,
        local=scenario.local_policy,
        metrics=measure(stories),
        by_model=measure_by_model(stories),
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


def _replay(cluster: Cluster, trace: Trace, progress: Callable[[float], None] | None) -> None:
    rows = trace.rows
    clock = cluster.clock
    coming = False

    def arrive(number: int) -> None:
        if progress is not None and number % 1000 == 0:
            progress(number / len(rows))
        expect(number + 1)
        cluster.send(rows[number])

    def expect(number: int) -> None:
        nonlocal coming
        coming = number < len(rows)
        if coming:
            clock.at(WARM_UP_S + rows[number].at_s, lambda: arrive(number))

    expect(0)
    end_s = WARM_UP_S + (rows[-1].at_s if rows else 0.0) + COOL_DOWN_S
    while (coming or cluster.open) and clock.now <= end_s and clock.step():
        pass
