"""Policies compared on loads that nobody tuned them for: drawn by chance, of other shapes and hours than those of cells.json.

    python -m benchmark.sim.elsewhere [--draws 40] [--seed N] [--policies a,b] [--json FILE]

Half of the loads are made of recipes, as `chimera trace` makes them: popularity by a power law, even, in two phases or in
turns; arrivals from regular to bursty; short and long prompts and answers. The others are two minutes out of the shipped
traces, wherever chance begins them. Each has a cluster drawn for it, and a rate at which its work takes a tenth to 1.2 of what
the GPUs could do if they decoded `TOGETHER` requests at a time. Another seed draws other loads. Every load is a line, losses
included.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from chimera.config.paper_models import read_paper_models
from chimera.core.model import ModelSpec
from chimera.sched.cost import CostTable
from chimera.sim.placing import gpus_of, promises
from chimera.sim.run import Scenario, simulate
from chimera.sizing.layout import work_of
from chimera.trace.generator import Recipe, generate
from chimera.trace.reader import read_trace
from chimera.trace.trace import Trace, names_for

from benchmark import report
from benchmark.sim.bench import HERE, SLO_SCALE, TRACES, costs

OURS = "flexible"
POLICIES = ("static", "time-sharing", "space-sharing", "simple-global", "kvpr", "static+goodput", OURS)
CLUSTERS = (("8", 2), ("8", 4), ("18", 2), ("18", 4), ("18", 6), ("18", 8), ("hetero12", 2), ("hetero12", 4))
SHIPPED = (
    "arena_prism18",
    "azure2023_code_first30min",
    "azure2023_conv_first30min",
    "mooncake_conv_first30min",
    "servegen_18tenants_day",
)
LENGTHS = (
    ((128, 512), (32, 256)),
    ((64, 256), (64, 512)),
    ((1024, 4096), (16, 64)),
    ((32, 128), (512, 1024)),
)
SECONDS = 120.0
LEAST = 10
"""Requests of a cut: chance may find two minutes in which nobody asks."""
BUSY = (0.1, 1.2)
TOGETHER = 8.0
WITHIN = 0.01


class Load(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    models: tuple[ModelSpec, ...]
    gpus: int
    trace: Trace


def main() -> int:
    options = report.parser(__doc__, seed=1)
    options.add_argument("--draws", type=int, default=40)
    options.add_argument("--policies", default=",".join(POLICIES))
    options.add_argument("--traces", type=Path, default=TRACES)
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    policies = arguments.policies.split(",")
    table = costs()
    facts = {"costs": table.machine, "draws": str(arguments.draws)}
    figures = report.Figures("policies elsewhere", seed=arguments.seed, facts=facts)
    kept: dict[str, list[float]] = {policy: [] for policy in policies}
    for load in drawn(arguments.draws, arguments.seed, arguments.traces, table):
        for policy in policies:
            kept[policy].append(_kept(load, table, policy))
            figures.add(f"{load.name} {policy}", 100 * kept[policy][-1], "% joint")
    _verdict(figures, kept)
    return figures.finish(arguments.json)


def _verdict(figures: report.Figures, kept: dict[str, list[float]]) -> None:
    means = {policy: statistics.fmean(values) for policy, values in kept.items()}
    for policy, mean in means.items():
        figures.add(f"mean {policy}", 100 * mean, "% joint")
    others = [policy for policy in kept if policy != OURS]
    if OURS not in kept or not others:
        return
    behind = [max(best) - ours for ours, *best in zip(kept[OURS], *(kept[policy] for policy in others), strict=True)]
    near = sum(gap <= WITHIN for gap in behind)
    figures.add("loads where ours is within 1 % of the best of the others", near, f"of {len(behind)}")
    figures.add("the most by which another was better", 100 * max(0.0, *behind), "points")
    margin = means[OURS] - max(means[policy] for policy in others)
    figures.add("ours over the best of the others, over all loads", 100 * margin, "points", "> 0", at_least=1e-9)


def drawn(draws: int, seed: int, traces: Path, table: CostTable) -> Iterator[Load]:
    for number in range(draws):
        dice = random.Random(f"elsewhere/{seed}/{number}")
        fleet, gpus = dice.choice(CLUSTERS)
        models = read_paper_models(HERE / "models" / f"{fleet}.json")
        names = [model.name for model in models]
        dice.shuffle(names)
        what, trace = _made(dice, names) if number % 2 else _cut(dice, names, traces)
        models = promises(models, trace, table, SLO_SCALE)
        busy = dice.uniform(*BUSY)
        work_s = sum(work_of(models, trace, table, TOGETHER).values())
        trace = trace.rate_scaled(busy * gpus * SECONDS / work_s, number)
        name = f"{number:02} {what}, {fleet}/{gpus}, {busy:.1f} busy"
        yield Load(name=name, models=models, gpus=gpus, trace=trace)


def _made(dice: random.Random, names: list[str]) -> tuple[str, Trace]:
    prompts, answers = dice.choice(LENGTHS)
    recipe = Recipe(
        models=tuple(names),
        rate=20.0,
        seconds=SECONDS,
        arrivals=dice.choice(("poisson", "constant", "gamma")),
        cv=dice.choice((2.0, 4.0)),
        shape=dice.choice(("uniform", "power-law", "two-phase", "on-off")),
        alpha=dice.choice((1.0, 2.0)),
        period_s=dice.choice((20.0, 60.0)),
        on_share=dice.choice((0.25, 0.5)),
        prompt_tokens=prompts,
        output_tokens=answers,
    )
    return f"{recipe.shape} {recipe.arrivals} {prompts[0]}+{answers[0]}", generate(recipe, dice.randrange(2**32))


def _cut(dice: random.Random, names: list[str], traces: Path) -> tuple[str, Trace]:
    source = dice.choice(SHIPPED)
    whole = read_trace(traces / f"{source}.csv.gz")
    trace, from_s = Trace(source, ()), 0.0
    while len(trace.rows) < LEAST:
        from_s = dice.uniform(0.0, whole.span_s - SECONDS)
        trace = whole.cut(from_s, from_s + SECONDS)
    return f"{source.split('_first')[0]}@{from_s:.0f}", trace.renamed(names_for(trace, names))


def _kept(load: Load, table: CostTable, policy: str) -> float:
    name, _, local = policy.partition("+")
    gpus = gpus_of(load.gpus, table.gpu_bytes)
    scenario = Scenario(models=load.models, gpus=gpus, costs=table, policy=name, local=local or None)
    return simulate(scenario, load.trace).metrics.joint_attainment


if __name__ == "__main__":
    raise SystemExit(main())
