"""The simulator held against the real system: two traces on real engines here, and on paper with a table measured here.

    python -m benchmark.sim.reality [--seconds 40] [--json FILE]

Two tiny models, each on a virtual GPU of its own, for two cores do not take turns as the engines of one GPU do. Traces are cut,
their lengths scaled to the contexts and their rates to a part of what an engine can do, and both sides get the same rows,
promises and placement, in the order of their coming. The table is measured on that very server, by requests that are none of
the traces' (`calibration.py`), before, between and after the pieces of each trace. Mean TTFT, p99 TTFT and joint attainment are
to agree within 20 %: also the joint attainment of promises so tight that the real system keeps nine in ten, for where both
sides keep all, agreement says little.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
from chimera.bench.dialect import dialect_named
from chimera.bench.record import Record, stories
from chimera.bench.session import Load, jobs_of, known_models, measured, prompts_of
from chimera.bench.stream import Target
from chimera.bench.watch import fetch, snapshot_of
from chimera.core.metrics import Metrics, Story, measure, percentile
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.snapshot import Snapshot
from chimera.sched.cost import CostTable
from chimera.sim.placing import promises
from chimera.sim.run import Scenario, simulate
from chimera.trace.reader import read_trace
from chimera.trace.trace import Trace, names_for

from benchmark import report
from benchmark.served import entry, served
from benchmark.sim.bench import TRACES
from benchmark.sim.calibration import Calibration

KINDS = ("llama", "qwen3")
WINDOWS = (("arena_prism18", 0.0), ("azure2023_conv_first30min", 0.0))
LONGEST = 600
"""Tokens of a request's prompt and answer together, at the most."""
MEAN_PROMPT = 150
PIECES = 6
"""Of each trace; calibrated once more than that."""
SCALE = 2.5
"""Promises: so many times what a request takes alone."""
TIGHT = 90.0
"""And so tight that the real system keeps them to so many per cent of its requests."""
WITHIN = 20.0


def main() -> int:
    options = report.parser(__doc__)
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--seconds", type=float, default=40.0, help="of each trace")
    options.add_argument("--busy", type=float, default=0.4, help="the part of one engine's time that the load should take")
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    models = [entry(kind, kind, {"gpu_ids": [number], "on": True}) for number, kind in enumerate(KINDS)]
    with served({"gpus": f"{len(KINDS)}x1GiB", "models": models}, "--policy", "static") as url:
        return asyncio.run(_compare(url, arguments))


async def _compare(url: str, arguments: argparse.Namespace) -> int:
    target = Target(url)
    snapshot = await snapshot_of(target)
    assert snapshot is not None, "a server of ours tells its snapshot"
    if await fetch(target, "/policy", msgspec.json.encode({"policy": "static", "local": "fcfs"}), "PUT") is None:
        raise SystemExit("the server does not order its requests by their coming")
    draw = random.Random(arguments.seed)

    async def answered(trace: Trace, concurrency: int | None = None) -> list[Story]:
        return stories(await _replayed(target, trace, snapshot.models, draw.randrange(2**32), concurrency))

    # Who comes first finds no connection, and a front-end that has read no tokenizer.
    await Calibration(snapshot.models, answered, LONGEST).ask(draw)
    figures = report.Figures("the simulator against the real system", seed=arguments.seed)
    for name, from_s in WINDOWS:
        trace = read_trace(arguments.traces / f"{name}.csv.gz").cut(from_s, from_s + arguments.seconds)
        asked = set(names_for(trace, sorted(model.name for model in snapshot.models)).values())
        costs = Calibration([model for model in snapshot.models if model.name in asked], answered, LONGEST)
        await costs.ask(draw)
        models, trace = _scaled(snapshot.models, trace, costs.table(), arguments)
        pieces = [trace.cut(*ends) for ends in pairwise(arguments.seconds / PIECES * n for n in range(PIECES + 1))]
        seen: list[Story] = []
        for piece in pieces:
            seen += stories(await _replayed(target, piece, models, arguments.seed))
            await costs.ask(draw)
        told = _on_paper(snapshot, pieces, models, costs.table())
        _compared(figures, name, measure(seen), measure(told))
        _tightened(figures, name, seen, told)
    return figures.finish(arguments.json)


def _compared(figures: report.Figures, name: str, real: Metrics, paper: Metrics) -> None:
    for what, of in (
        ("mean TTFT", lambda m: 1e3 * m.ttft.mean_s),
        ("p99 TTFT", lambda m: 1e3 * m.ttft.p99_s),
        ("joint attainment", lambda m: 100 * m.joint_attainment),
    ):
        unit = "%" if what == "joint attainment" else "ms"
        figures.add(f"{name}: {what}, real", of(real), unit)
        figures.add(f"{name}: {what}, on paper", of(paper), unit)
        figures.add(f"{name}: {what}, difference", 100 * abs(of(paper) / of(real) - 1), "%", at_most=WITHIN)


def _tightened(figures: report.Figures, name: str, real: Sequence[Story], paper: Sequence[Story]) -> None:
    limit = percentile(sorted(map(_strain, real)), TIGHT)
    promise = f"{name}: joint attainment at {limit:.2f} of the promises"
    kept = [100 * sum(_strain(story) <= limit for story in stories) / len(stories) for stories in (real, paper)]
    figures.add(f"{promise}, real", kept[0], "%")
    figures.add(f"{promise}, on paper", kept[1], "%")
    figures.add(f"{promise}, difference", 100 * abs(kept[1] / kept[0] - 1), "%", at_most=WITHIN)


def _strain(story: Story) -> float:
    """The part of its promises that a request took, of the one that it took more of."""
    if not story.answered:
        return math.inf
    pairs = ((story.ttft_s, story.slo.ttft_s), (story.tpot_s, story.slo.tpot_s))
    return max((value / promise for value, promise in pairs if value is not None and promise), default=0.0)


def _scaled(
    models: tuple[ModelSpec, ...], trace: Trace, table: CostTable, arguments: argparse.Namespace
) -> tuple[tuple[ModelSpec, ...], Trace]:
    """The models with promises, and the trace as long and as dense as they can bear."""
    trace = trace.renamed(names_for(trace, sorted(model.name for model in models)))
    mean = sum(row.prompt_tokens for row in trace.rows) / len(trace.rows)
    trace, _ = trace.length_scaled(MEAN_PROMPT / mean).clipped({model.name: LONGEST for model in models})
    known = {model.name: model for model in models}
    work_s = sum(table.of(known[row.model]).request_s(row.prompt_tokens, row.output_tokens, 2.0) for row in trace.rows)
    trace = trace.rate_scaled(arguments.busy * arguments.seconds / work_s, arguments.seed)
    return promises(models, trace, table, SCALE), trace


async def _replayed(
    target: Target, trace: Trace, models: tuple[ModelSpec, ...], seed: int, concurrency: int | None = None
) -> list[Record]:
    dialect = dialect_named("generate")
    load = Load(trace=trace, slos={model.name: model.slo for model in models}, seed=seed, concurrency=concurrency)
    prompts = prompts_of(load, await known_models(target))
    return (await measured(load, jobs_of(load, prompts, dialect, lambda model: target), dialect)).records


def _on_paper(snapshot: Snapshot, pieces: Sequence[Trace], models: tuple[ModelSpec, ...], table: CostTable) -> list[Story]:
    filed = Placement(tuple(Seat(replica=view.replica, gpu_ids=view.gpu_ids) for view in snapshot.replicas))
    scenario = Scenario(models=models, gpus=snapshot.gpus, costs=table, policy="static", local="fcfs", filed=filed)
    told: list[Story] = []
    for piece in pieces:
        simulate(scenario, piece, keep=told.extend)
    return told


if __name__ == "__main__":
    raise SystemExit(main())
