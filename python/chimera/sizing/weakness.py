"""How much more load an answer carries, and what breaks then: which model, which promise, and for want of what.

The cause is found by trying: the load that broke is replayed on GPUs of twice the memory, and on GPUs twice as fast. Whatever
mends more was short; memory, where both mend as much, since who is done sooner frees memory too.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from chimera.core.metrics import Metrics
from chimera.core.placement import Placement
from chimera.sched.cost import CostTable
from chimera.sim.placing import gpus_of
from chimera.sim.run import Scenario, simulate
from chimera.sizing.search import Search, Trial

STEP = 1.1
"""Loads are tried in steps of a tenth."""
DAYS = 3
"""So many of the days are tried at other loads: a step is far more than what lies between days."""
MOST_STEPS = 48
"""Beyond ninety times the load nobody asks."""


class Break(msgspec.Struct, frozen=True, kw_only=True):
    """What gives way first."""

    rate: float
    """At so many times the trace."""
    model: str
    promise: str
    """`TTFT`, `TPOT`, or `answers` where requests were not answered at all."""
    short_of: str
    """`memory`, `compute`, or `neither` where twice of either would mend nothing."""
    kept: float
    kept_with_twice_the_memory: float
    kept_with_twice_the_speed: float


def headroom(search: Search, trial: Trial) -> tuple[float, Break | None]:
    """The highest load that the GPUs of the answer carry, as a multiple of the trace, and what breaks one step above it."""

    days = range(1, min(DAYS, search.load.days) + 1)

    def carries(step: int) -> bool:
        return all(search.carries(trial.gpus, trial.policy, _rate(search, step), day) for day in days)

    low, high = 0, 1
    while high < MOST_STEPS and carries(high):
        low, high = high, min(MOST_STEPS, high * 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if carries(middle) else (low, middle)
    return _rate(search, low), weakest(search, trial, _rate(search, high), days)


def weakest(search: Search, trial: Trial, rate: float, days: Iterable[int]) -> Break | None:
    """Of the first of these days on which so much load is too much. `None`: each of them is carried."""
    day = next((day for day in days if not search.carries(trial.gpus, trial.policy, rate, day)), None)
    if day is None:
        return None
    rows = search.load.day(day, rate)
    scenario = search.scenario(trial.gpus, trial.policy)
    outcome = simulate(scenario, rows)
    model, metrics = max(outcome.by_model.items(), key=lambda one: (_let_down(one[1]), one[0]))
    kept = outcome.metrics.joint_attainment
    roomy = simulate(_with_twice_the_memory(scenario), rows).metrics.joint_attainment
    fast = simulate(msgspec.structs.replace(scenario, costs=twice_as_fast(search.costs)), rows).metrics.joint_attainment
    cause = "neither" if max(roomy, fast) <= kept else "memory" if roomy >= fast else "compute"
    return Break(
        rate=rate,
        model=model,
        promise=_promise(metrics),
        short_of=cause,
        kept=kept,
        kept_with_twice_the_memory=roomy,
        kept_with_twice_the_speed=fast,
    )


def twice_as_fast(costs: CostTable) -> CostTable:
    return msgspec.structs.replace(
        costs,
        step_s=costs.step_s / 2,
        step_sequence_s=costs.step_sequence_s / 2,
        gang_step_s=costs.gang_step_s / 2,
        weight_bytes_per_s=costs.weight_bytes_per_s * 2,
        kv_bytes_per_s=costs.kv_bytes_per_s * 2,
        prefill_weight_bytes_per_s=costs.prefill_weight_bytes_per_s * 2,
        prefill_kv_bytes_per_s=costs.prefill_kv_bytes_per_s * 2,
    )


def _rate(search: Search, step: int) -> float:
    return search.load.rate * STEP**step


def _with_twice_the_memory(scenario: Scenario) -> Scenario:
    """Where caches are reserved, their shares grow by what is new."""
    more_bytes = scenario.costs.gpu_bytes
    assert scenario.filed is not None, "a plan has a placement"
    seats = []
    for seat in scenario.filed.seats:
        if seat.kv_limit_bytes is not None:
            sharing = max(len(scenario.filed.on_gpu(gpu_id)) for gpu_id in seat.gpu_ids)
            seat = msgspec.structs.replace(seat, kv_limit_bytes=seat.kv_limit_bytes + more_bytes // sharing)
        seats.append(seat)
    return msgspec.structs.replace(scenario, gpus=gpus_of(len(scenario.gpus), 2 * more_bytes), filed=Placement(tuple(seats)))


def _let_down(metrics: Metrics) -> float:
    return metrics.sent * (1 - metrics.joint_attainment)


def _promise(metrics: Metrics) -> str:
    unanswered = metrics.sent - metrics.answered
    late = metrics.sent * (1 - metrics.ttft_attainment) - unanswered
    slow = metrics.sent * (1 - metrics.tpot_attainment) - unanswered
    worst = max((late, "TTFT"), (slow, "TPOT"), (float(unanswered), "answers"), key=lambda one: one[0])
    return worst[1]
