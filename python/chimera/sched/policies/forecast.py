"""Predicts the joint goodput of one GPU from who stands on it: how often its engines are at work together, how full they run,
and whether their caches fit. Pure arithmetic over rates and prices; knows no placement.

An engine at work is slowed by every other engine at work on its GPU, for the driver gives them turns. A model therefore keeps
its TPOT while no more than so many engines are at work; how many are, is taken to be Poisson with the mean of the
engines' shares of time. Beyond that, work that exceeds the GPU is late, and caches that exceed its memory wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.snapshot import Demand
from chimera.sched.cost import CostTable

FULL = 0.8
"""The share of a GPU's time beyond which waiting grows."""
LEAST_LEFT = 0.5
"""Of an engine's time, for decodes, however many prompts come."""
ROUNDS = 3
"""Slowness makes requests overlap more, which makes them slower: so often is that followed."""


class Load(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one model's requests are like, whoever serves them and however many there are."""

    model: str
    running: int
    """The most sequences of one engine."""
    tpot_s: float
    ttft_s: float
    output_tokens: float
    kv_bytes: float
    """Of one request, when it is half through."""
    prompt_cost_s: float
    step_s: float
    """A decode step of nobody."""
    sequence_s: float
    """What each sequence adds to it, its context included."""
    least_cost_s: float
    """What a request takes at the least: decoded in the largest batch that keeps its TPOT."""


class Forecast(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    attained_per_s: float
    """Requests a second that keep both promises."""
    lost_per_s: float
    """And those that do not."""
    attainment: dict[str, float]
    busy: float
    """Share of the GPU's time that the work takes at the least."""


Asked = tuple[Load, float]
"""A model's requests, and how many of them a second."""


def load_of(model: ModelSpec, demand: Demand, costs: CostTable, no_promise_s: float = 10.0) -> Load:
    cost = costs.of(model)
    prompt, output = max(1.0, demand.prompt_tokens), max(1.0, demand.output_tokens)
    tpot_s = model.slo.tpot_s or no_promise_s
    context = prompt + output / 2
    sequence_s = cost.sequence_s + context * cost.context_token_s
    batch = max(1.0, min(costs.running, (tpot_s - cost.step_s) / sequence_s)) if sequence_s else costs.running
    prompt_cost_s = cost.prompt_s(int(prompt))
    return Load(
        model=model.name,
        running=costs.running,
        tpot_s=tpot_s,
        ttft_s=model.slo.ttft_s or no_promise_s,
        output_tokens=output,
        kv_bytes=context * model.kv_bytes_per_token,
        prompt_cost_s=prompt_cost_s,
        step_s=cost.step_s,
        sequence_s=sequence_s,
        least_cost_s=prompt_cost_s + output * (cost.step_s / batch + sequence_s),
    )


def forecast(asked: Sequence[Asked], kv_bytes: float, slowdown: float) -> Forecast:
    """`kv_bytes`: what the GPU has left for caches. `slowdown`: the price of a neighbour, from the cost table."""
    attainment = {load.model: 1.0 for load, _ in asked}
    active = [(load, rate) for load, rate in asked if rate > 0]
    if not active:
        return Forecast(attained_per_s=0.0, lost_per_s=0.0, attainment=attainment, busy=0.0)
    shares = [0.0] * len(active)
    batches = [1.0] * len(active)
    # Prompts go first, so decodes have what they leave.
    left = [max(LEAST_LEFT, 1 - rate * load.prompt_cost_s) for load, rate in active]
    together = 0.0
    for _ in range(ROUNDS):
        before = together
        for i, (load, rate) in enumerate(active):
            slow = 1 + (before - shares[i]) * (1 + slowdown)
            step_s = (load.step_s + batches[i] * load.sequence_s) / left[i]
            stay_s = slow * (load.prompt_cost_s + load.output_tokens * step_s)
            present = rate * stay_s
            batches[i] = 1.0 if present < 1 else min(float(load.running), present)
            share = 1 - math.exp(-present) if present < 50 else 1.0
            together += share - shares[i]
            shares[i] = share
    busy = held_bytes = 0.0
    for batch, (load, rate) in zip(batches, active, strict=True):
        busy += rate * load.least_cost_s
        held_bytes += batch * load.kv_bytes
    in_time = 1.0 if busy <= FULL else (FULL / busy) ** 2
    room = 1.0 if held_bytes <= 0.8 * kv_bytes else max(0.0, 0.8 * kv_bytes / held_bytes)
    attained = asked_per_s = 0.0
    for i, (load, rate) in enumerate(active):
        step_s = (load.step_s + batches[i] * load.sequence_s) / left[i]
        turns = min(load.tpot_s / step_s, load.ttft_s / (load.prompt_cost_s + step_s))
        share = in_time * room * _poisson_at_most((turns - 1) / (1 + slowdown), together - shares[i])
        attainment[load.model] = share
        attained += rate * share
        asked_per_s += rate
    return Forecast(attained_per_s=attained, lost_per_s=asked_per_s - attained, attainment=attainment, busy=busy)


def _poisson_at_most(bound: float, mean: float) -> float:
    """The chance that no more than `bound` are at work; straight between whole numbers, so that small gains show."""
    if bound < 0:
        return math.pow(0.5, 1 - bound)
    whole = int(bound)
    if whole > 12:
        return 1.0
    term = total = math.exp(-mean)
    for k in range(1, whole + 1):
        term *= mean / k
        total += term
    return min(1.0, total + (bound - whole) * term * mean / (whole + 1))
