"""Predicts the joint goodput of one GPU from who stands on it: how often its engines are at work together, how full they run,
and whether their caches fit. Pure arithmetic over rates and prices; knows no placement.

An engine at work is slowed by every other engine at work on its GPU, for the driver gives them turns. A model therefore keeps
its TPOT while no more than so many engines are at work; how many are, is taken to be Poisson with the mean of the
engines' shares of time. Beyond that, work that exceeds the GPU is late, and caches that exceed its memory wait.
"""

from __future__ import annotations

import math

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.snapshot import Demand
from chimera.sched.cost import CostTable, EngineCost

FULL = 0.8
"""The share of a GPU's time beyond which waiting grows."""
ROUNDS = 3
"""Slowness makes requests overlap more, which makes them slower: so often is that followed."""


class Load(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one replica is asked for."""

    model: str
    rate_per_s: float
    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    tpot_s: float
    running: int
    kv_bytes: float
    """Of one request, when it is half through."""
    prompt_cost_s: float
    least_cost_s: float
    """What a request takes at the least: decoded in the largest batch that keeps its TPOT."""
    cost: EngineCost

    def with_rate(self, rate_per_s: float) -> Load:
        return msgspec.structs.replace(self, rate_per_s=rate_per_s)


class Forecast(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    attained_per_s: float
    """Requests a second that keep both promises."""
    attainment: dict[str, float]
    busy: float
    """Share of the GPU's time that the work takes at the least."""


def load_of(model: ModelSpec, demand: Demand, costs: CostTable, rate_per_s: float, no_promise_s: float = 10.0) -> Load:
    cost = costs.of(model)
    prompt, output = max(1.0, demand.prompt_tokens), max(1.0, demand.output_tokens)
    tpot_s = model.slo.tpot_s or no_promise_s
    context = prompt + output / 2
    per_sequence_s = cost.sequence_s + context * cost.context_token_s
    batch = max(1.0, min(costs.running, (tpot_s - cost.step_s) / per_sequence_s)) if per_sequence_s else costs.running
    return Load(
        model=model.name,
        rate_per_s=rate_per_s,
        prompt_tokens=prompt,
        output_tokens=output,
        ttft_s=model.slo.ttft_s or no_promise_s,
        tpot_s=tpot_s,
        running=costs.running,
        kv_bytes=context * model.kv_bytes_per_token,
        prompt_cost_s=cost.prompt_s(int(prompt)),
        least_cost_s=cost.request_s(prompt, output, batch),
        cost=cost,
    )


def forecast(loads: list[Load], kv_bytes: float, slowdown: float) -> Forecast:
    """`kv_bytes`: what the GPU has left for caches. `slowdown`: the price of a neighbour, from the cost table."""
    active = [load for load in loads if load.rate_per_s > 0]
    if not active:
        return Forecast(attained_per_s=0.0, attainment={load.model: 1.0 for load in loads}, busy=0.0)
    shares = [0.0] * len(active)
    batches = [1.0] * len(active)
    for _ in range(ROUNDS):
        together = sum(shares)
        for i, load in enumerate(active):
            slow = 1 + (together - shares[i]) * (1 + slowdown)
            step_s = load.cost.decode_s(1, 0) + batches[i] * (load.cost.sequence_s + _context(load) * load.cost.context_token_s)
            stay_s = slow * (load.prompt_cost_s + load.output_tokens * step_s)
            batches[i] = min(float(load.running), max(1.0, load.rate_per_s * stay_s))
            shares[i] = 1 - math.exp(-min(50.0, load.rate_per_s * stay_s))
    busy = sum(load.rate_per_s * load.least_cost_s for load in active)
    in_time = 1.0 if busy <= FULL else (FULL / busy) ** 2
    held_bytes = sum(batch * load.kv_bytes for batch, load in zip(batches, active, strict=True))
    room = 1.0 if held_bytes <= 0.8 * kv_bytes else max(0.0, 0.8 * kv_bytes / held_bytes)
    together = sum(shares)
    attainment = {load.model: 1.0 for load in loads}
    attained = 0.0
    for i, load in enumerate(active):
        step_s = load.cost.step_s + batches[i] * (load.cost.sequence_s + _context(load) * load.cost.context_token_s)
        turns = min(load.tpot_s / step_s, load.ttft_s / (load.prompt_cost_s + step_s))
        neighbours = (turns - 1) / (1 + slowdown)
        share = in_time * room * _poisson_at_most(neighbours, together - shares[i])
        attainment[load.model] = share
        attained += load.rate_per_s * share
    return Forecast(attained_per_s=attained, attainment=attainment, busy=busy)


def _context(load: Load) -> float:
    return load.prompt_tokens + load.output_tokens / 2


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
