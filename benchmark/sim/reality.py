"""The simulator held against the real system: two traces on real engines here, and on paper with a table measured here.

    python -m benchmark.sim.reality [--seconds 40] [--json FILE]

Two tiny models, each on a virtual GPU of its own, for two cores do not take turns as the engines of one GPU do. First the table
is fitted to that very server, by requests that come one at a time: one model gives the coefficients, and the other's factors
follow from its own times. Then traces are cut, their lengths scaled to the contexts and their rates to a part of what an
engine can do, and both sides get the same rows, promises and placement, in the order of their coming. Mean TTFT, p99 TTFT and
joint attainment are to agree within 20 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path

import msgspec
from chimera.bench.dialect import dialect_named
from chimera.bench.record import Record, stories
from chimera.bench.session import Load, jobs_of, known_models, measured, prompts_of
from chimera.bench.stream import Target
from chimera.bench.watch import fetch, snapshot_of
from chimera.config.cost_tables import read_cost_table
from chimera.core.metrics import Metrics, measure
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.snapshot import Snapshot
from chimera.sched.cost import CostTable, Factors
from chimera.sim.placing import promises
from chimera.sim.run import Scenario, simulate
from chimera.trace.reader import read_trace
from chimera.trace.trace import Row, Trace, names_for

from benchmark import report
from benchmark.served import entry, served
from benchmark.sim import fit
from benchmark.sim.bench import TRACES

KINDS = ("llama", "qwen3")
WINDOWS = (("arena_prism18", 0.0), ("azure2023_conv_first30min", 0.0))
LONGEST = 600
"""Tokens of a request's prompt and answer together, at the most."""
MEAN_PROMPT = 150
LONE, LONE_EVERY_S = 40, 0.3
SCALE = 2.5
"""Promises: so many times what a request takes alone."""
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
    table = await _table(url, snapshot, arguments.seed)
    figures = report.Figures("the simulator against the real system", seed=arguments.seed, facts={"costs": table.machine})
    for name, from_s in WINDOWS:
        trace = read_trace(arguments.traces / f"{name}.csv.gz").cut(from_s, from_s + arguments.seconds)
        models, trace = _scaled(snapshot.models, trace, table, arguments)
        real = measure(stories(await _replayed(target, trace, models, arguments.seed)))
        paper = _on_paper(snapshot, trace, models, table)
        for what, of in (
            ("mean TTFT", lambda m: 1e3 * m.ttft.mean_s),
            ("p99 TTFT", lambda m: 1e3 * m.ttft.p99_s),
            ("joint attainment", lambda m: 100 * m.joint_attainment),
        ):
            unit = "%" if what == "joint attainment" else "ms"
            figures.add(f"{name}: {what}, real", of(real), unit)
            figures.add(f"{name}: {what}, on paper", of(paper), unit)
            figures.add(f"{name}: {what}, difference", 100 * abs(of(paper) / of(real) - 1), "%", at_most=WITHIN)
    return figures.finish(arguments.json)


async def _table(url: str, snapshot: Snapshot, seed: int) -> CostTable:
    """Fitted to the first model; what another takes more or less is its factor."""
    models = sorted(snapshot.models, key=lambda model: model.name)
    seen = {model.name: await _lone(url, model, seed) for model in models}
    paces = {model.name: fit.paces(url, model.name, random.Random(seed)) for model in models}
    base = json.loads(read_cost_table("cpu-2-cores")) | {"machine": "this machine, SGLang on tiny models"}
    first = models[0]
    told = fit.fitted(msgspec.to_builtins(first), base, seen[first.name], paces[first.name])
    table = msgspec.convert(told, type=CostTable)
    refined = {}
    for model in models[1:]:
        cost = table.plain(model)
        refined[model.name] = Factors(
            prefill=_ratio([(s - table.request_s, cost.prompt_s(tokens)) for tokens, s in seen[model.name]]),
            decode=_ratio([(s, cost.decode_s(count, count * 40)) for count, s in paces[model.name]]),
        )
    return msgspec.structs.replace(table, refined=refined)


async def _lone(url: str, model: ModelSpec, seed: int) -> fit.Points:
    """TTFT by prompt tokens of requests that come one at a time, by the client and in the words of the replay."""
    rows = tuple(Row(n * LONE_EVERY_S, model.name, 10 + n * LONGEST // LONE, 2) for n in range(LONE))
    records = await _replayed(Target(url), Trace("lone requests", rows), (model,), seed)
    warm = records[2:]  # the first finds no connection, and a front-end that has not read this model's tokenizer
    return [(record.prompt_tokens, story.ttft_s) for record in warm if (story := record.story) and story.ttft_s is not None]


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return max(0.05, sum(seen for seen, _ in pairs) / sum(told for _, told in pairs))


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


async def _replayed(target: Target, trace: Trace, models: tuple[ModelSpec, ...], seed: int) -> list[Record]:
    dialect = dialect_named("generate")
    load = Load(trace=trace, slos={model.name: model.slo for model in models}, seed=seed)
    prompts = prompts_of(load, await known_models(target))
    found = await measured(load, jobs_of(load, prompts, dialect, lambda model: target), dialect)
    print(f"# {trace.source}: {len(trace.rows)} requests, {100 * found.ending.late:.1f} % of them sent late", flush=True)
    return found.records


def _on_paper(snapshot: Snapshot, trace: Trace, models: tuple[ModelSpec, ...], table: CostTable) -> Metrics:
    seats = tuple(Seat(replica=view.replica, gpu_ids=view.gpu_ids) for view in snapshot.replicas)
    filed = Placement(seats)
    scenario = Scenario(models=models, gpus=snapshot.gpus, costs=table, policy="static", local="fcfs", filed=filed)
    return simulate(scenario, trace).metrics


if __name__ == "__main__":
    raise SystemExit(main())
