"""The forecast that `flexible` goes by, held against the simulator: one GPU, drawn models, drawn loads."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

from chimera.cli.costs import table_named
from chimera.config.paper_models import read_paper_models
from chimera.core.snapshot import Demand
from chimera.sched.policies.forecast import forecast, load_of
from chimera.sim.placing import evenly, gpus_of, promises
from chimera.sim.run import Scenario, simulate
from chimera.trace.trace import Row, Trace

COSTS = table_named("h100-80g-like")
MODELS = read_paper_models(Path(__file__).parents[2] / "benchmark/sim/models/18.json")
LENGTHS = (((128, 512), (32, 256)), ((64, 256), (64, 512)), ((1024, 4096), (16, 64)), ((256, 2048), (64, 256)))
SECONDS = 60.0


def predicted_and_seen(seed: int) -> tuple[float, float]:
    """The share of requests that keep both promises, as the forecast says and as the simulator does."""
    dice = random.Random(seed)
    chosen = dice.sample(MODELS, dice.randint(2, 7))
    while sum(COSTS.resident_bytes(model) for model in chosen) > 0.9 * COSTS.gpu_bytes:
        chosen.pop()
    prompts, answers = dice.choice(LENGTHS)
    weights = [dice.expovariate(1.0) for _ in chosen]
    rates = {m.name: dice.uniform(0.5, 4.0) * weight / sum(weights) for m, weight in zip(chosen, weights, strict=True)}
    rows = []
    for name, rate in rates.items():
        at_s = dice.expovariate(rate)
        while at_s < SECONDS:
            rows.append(Row(at_s, name, dice.randint(*prompts), dice.randint(*answers)))
            at_s += dice.expovariate(rate)
    trace = Trace("drawn", tuple(sorted(rows, key=lambda row: row.at_s)))
    models = promises(chosen, trace, COSTS, 5.0)
    gpus = gpus_of(1, COSTS.gpu_bytes)
    filed = evenly(models, gpus, COSTS, reserved=False)
    told = simulate(Scenario(models=models, gpus=gpus, costs=COSTS, policy="static", local="goodput", filed=filed), trace)
    demand = Demand(prompt_tokens=sum(prompts) / 2, output_tokens=sum(answers) / 2)
    asked = [(load_of(model, demand, COSTS), rates[model.name], 0.0) for model in models]
    free_bytes = COSTS.gpu_bytes - sum(COSTS.resident_bytes(model) for model in models)
    known = forecast(asked, free_bytes, COSTS.neighbour_slowdown)
    return known.attained_per_s / (known.attained_per_s + known.lost_per_s), told.metrics.joint_attainment


def test_the_forecast_is_what_the_simulator_sees() -> None:
    pairs = [predicted_and_seen(seed) for seed in range(24)]
    assert min(seen for _, seen in pairs) < 0.4 and max(seen for _, seen in pairs) > 0.95, "loads of every kind"
    assert statistics.fmean(abs(predicted - seen) for predicted, seen in pairs) <= 0.06
    assert abs(statistics.fmean(predicted - seen for predicted, seen in pairs)) <= 0.03


def test_late_requests_take_their_turns_and_count_for_nothing() -> None:
    model = promises(MODELS[:1], Trace("none", (Row(0.0, MODELS[0].name, 256, 128),)), COSTS, 5.0)[0]
    load = load_of(model, Demand(prompt_tokens=256, output_tokens=128), COSTS)
    calm = forecast([(load, 2.0, 0.0)], 4e10, COSTS.neighbour_slowdown)
    late = forecast([(load, 2.0, 200.0)], 4e10, COSTS.neighbour_slowdown)
    assert calm.attained_per_s > 1.9
    assert late.attained_per_s < 0.5
    assert late.attained_per_s + late.lost_per_s == 2.0


def test_where_strangers_took_all_memory_nothing_is_kept_and_nobody_is_no_loss() -> None:
    model = promises(MODELS[:1], Trace("none", (Row(0.0, MODELS[0].name, 256, 128),)), COSTS, 5.0)[0]
    load = load_of(model, Demand(prompt_tokens=256, output_tokens=128), COSTS)
    for asked, lost_per_s in (([], 0.0), ([(load, 0.0, 0.0)], 0.0), ([(load, 2.0, 0.0)], 2.0)):
        assert forecast(asked, -1e9, COSTS.neighbour_slowdown).lost_per_s == lost_per_s
