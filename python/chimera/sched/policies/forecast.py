"""Predicts the joint goodput of one GPU from who stands on it: how often its engines are at work together, how full they run,
and whether their caches fit. Pure arithmetic over rates and prices; knows no placement.

An engine at work is slowed by every other engine at work on its GPU, for the driver gives them turns. A first token is in time
while no more than so many neighbours are at work at that moment; a TPOT, while no more are on the average of the answer's
life, so a long answer sees less of chance than a short one. Where more would be, engines take turns (`sched/turns.py`), and
some requests are in time all the same. Beyond that, work that exceeds the GPU is late, and caches that exceed its memory wait.
`tests/sim/test_forecast.py` holds it against the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.snapshot import Demand
from chimera.sched.cost import CostTable

LEAST_LEFT = 0.25
"""Of an engine's time, for decodes, however many prompts come."""
ROUNDS = 3
"""Slowness makes requests overlap more, which makes them slower: so often is that followed."""
CLOSE = 0.01
"""Where engines are mostly alone, no further than to so many of an engine."""
MOST_ECHO = 0.85
"""Where slowness feeds itself, no more of it is followed: batches grow then, and answers end."""
UNKNOWN = 0.5
"""Standard deviation of the neighbours at work that is there even if all of them always are: lengths and batches vary."""
MOST_PROMPTS = 0.95
"""Of an engine's time, for prompts, where their queue is reckoned: beyond it, what work exceeds the GPU says more."""
IN_TURN = 0.4
"""Where engines take turns, so much of what the GPU can bear is in time; the simulator has it so."""


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


Asked = tuple[Load, float, float]
"""A model's requests, how many of them a second, and how many more a second that are late already and yet to be served."""


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


class _Engine:
    """One model's engine while a GPU is reckoned."""

    __slots__ = ("batch", "load", "promised", "prompts", "rate", "served", "share", "stay_s")

    def __init__(self, load: Load, promised: float, late: float) -> None:
        self.load = load
        self.promised = promised
        """Requests a second that are not late yet."""
        self.rate = promised + late
        self.share = 0.0
        """Of the time, in which it is at work."""
        self.batch = 1.0
        """Sequences that are decoded together, as one of them sees it."""
        self.stay_s = 0.0
        """From a request's first step to its last."""
        self.prompts = 0.0
        """Share of its time that prompts take."""
        self.served = 1.0
        """Share of its requests that find a place in a batch."""

    def run_beside(self, neighbours: float, slowdown: float) -> None:
        load, rate = self.load, self.rate
        slow = (1 + neighbours) * (1 + slowdown * neighbours)
        self.prompts = rate * load.prompt_cost_s * slow
        left = 1 - self.prompts if self.prompts < 1 - LEAST_LEFT else LEAST_LEFT  # prompts go first
        self.stay_s = slow * (load.prompt_cost_s + load.output_tokens * self.step_s() / left)
        present = rate * self.stay_s
        crowded = present + 1 > load.running
        self.batch = float(load.running) if crowded else present + 1
        self.served = min(1.0, load.running / present) if crowded else 1.0
        self.share = 1 - math.exp(-present) if present < 50 else 1.0

    def step_s(self) -> float:
        return self.load.step_s + self.batch * self.load.sequence_s

    def bears(self, slowdown: float) -> tuple[float, float]:
        """How many neighbours at work it can bear: for a first token, and for a TPOT."""
        load, step_s = self.load, self.step_s()
        prompts = min(MOST_PROMPTS, self.prompts)
        before_s = self.share * step_s / 2 + prompts / (2 - 2 * prompts) * load.prompt_cost_s
        first = load.ttft_s / (load.prompt_cost_s + before_s)
        steady = load.tpot_s / (step_s + load.tpot_s * self.rate * load.prompt_cost_s)
        return _neighbours(first, slowdown), _neighbours(steady, slowdown)


def forecast(asked: Sequence[Asked], kv_bytes: float, slowdown: float) -> Forecast:
    """`kv_bytes`: what the GPU has left for caches. `slowdown`: the price of a neighbour, from the cost table."""
    attainment = {load.model: 1.0 for load, _, _ in asked}
    engines = [_Engine(load, rate, late) for load, rate, late in asked if rate + late > 0]
    together, echo = _run_together(engines, slowdown)
    busy = sum(engine.rate * engine.load.least_cost_s for engine in engines)
    held_bytes = sum(engine.batch * engine.load.kv_bytes for engine in engines)
    in_time = min(1.0, 1 / busy) if busy else 1.0
    room_bytes = max(0.0, 0.8 * kv_bytes)  # strangers may have taken more than there is
    room = 1.0 if held_bytes <= room_bytes else room_bytes / held_bytes
    attained = asked_per_s = 0.0
    for engine in engines:
        neighbours = together - engine.share
        of_moment, of_life = _variances(engine, engines, echo)
        first, steady = engine.bears(slowdown)
        steadily = _at_most(steady, neighbours, of_life)
        steadily += (1 - steadily) * IN_TURN * min(1.0, (1 + max(0.0, steady)) / (1 + neighbours))
        kept = _at_most(first + 0.5, neighbours, of_moment) * steadily * in_time * room * engine.served
        if engine.promised:
            attainment[engine.load.model] = kept
        attained += engine.promised * kept
        asked_per_s += engine.promised
    return Forecast(attained_per_s=attained, lost_per_s=asked_per_s - attained, attainment=attainment, busy=busy)


def _run_together(engines: Sequence[_Engine], slowdown: float) -> tuple[float, float]:
    """How many are at work at once, on the average, and the echo: how many more each one more makes, by slowing all others."""
    together = echo = 0.0
    for _ in range(ROUNDS):
        followed = echo = 0.0
        for engine in engines:
            neighbours = together - engine.share if together > engine.share else 0.0
            engine.run_beside(neighbours, slowdown)
            followed += engine.share
            slower = (1 + slowdown + 2 * slowdown * neighbours) / ((1 + neighbours) * (1 + slowdown * neighbours))
            echo += (1 - engine.share) * engine.rate * engine.stay_s * slower
        echo = min(MOST_ECHO, echo)
        more = (followed - together) / (1 - echo)
        together = min(float(len(engines)), max(0.0, together + more))
        if abs(more) < CLOSE and together < 1:
            break
    return together, echo


def _variances(engine: _Engine, engines: Sequence[_Engine], echo: float) -> tuple[float, float]:
    """Of the number of neighbours at work: at one moment, and of its mean over the life of a request of `engine`.

    Chance echoes as well. A neighbour that comes and goes many times in that life counts with its mean; one that outlasts it,
    as it happens to be.
    """
    of_moment = of_life = UNKNOWN * UNKNOWN
    for other in engines:
        if other is not engine:
            variance = other.share * (1 - other.share) / (1 - echo)
            of_moment += variance
            of_life += variance * 2 * other.share / (2 * other.share + engine.stay_s * other.rate)
    return of_moment, of_life


def _neighbours(times: float, slowdown: float) -> float:
    """How many neighbours at work make a step so many times as long: n with (1 + n)(1 + slowdown × n) = times."""
    if times <= 1 or not slowdown:
        return (times - 1) / (1 + slowdown)
    one = 1 + slowdown
    return (math.sqrt(one * one + 4 * slowdown * (times - 1)) - one) / (2 * slowdown)


def _at_most(bound: float, mean: float, variance: float) -> float:
    """The chance that no more are at work: the normal distribution, by the logistic curve that is closest to it."""
    return 1 / (1 + math.exp(min(50.0, 1.702 * (mean - bound) / math.sqrt(variance))))
