"""Prism's benchmark by its flags, on this project's client: scripts that call Prism's `benchmark.py` run as they are.

    python benchmark/benchmark.py --base-url http://127.0.0.1:30000 --num-models 2 --model-paths model_1 model_2 --req-rate 10
    python benchmark/benchmark.py --base-url … --num-models 18 --num-gpus 8 --e2e-benchmark --real-trace ./real_trace.pkl

What is better here: a latency is held against what is owed in the same unit; prompts are text of exactly so many tokens, not
one repeated word; the base latencies that the SLO scales multiply are measured on this very server, a few requests of each
model with nobody else there. `chimera bench` does the same with more choice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from chimera.bench import outcome, promise
from chimera.bench.campaign import Arm, Campaign
from chimera.bench.dialect import dialect_named
from chimera.bench.session import Known, Load, choose_policy, known_models
from chimera.bench.stream import Target
from chimera.cli.circumstances import circumstances
from chimera.cli.status import table
from chimera.config.keys import client_key
from chimera.core.model import Slo
from chimera.core.snapshot import POLICY_NAMES
from chimera.errors import ChimeraError, ConfigError
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.trace import prism
from chimera.trace.generator import Recipe, generate
from chimera.trace.reader import read_trace
from chimera.trace.sharegpt import Exchange, read_exchanges
from chimera.trace.trace import Row, Trace, names_for

SECONDS = 60.0
LENGTHS = (256, 511)
POPULARITY = 1.1
CALIBRATION = 2
"""Requests of each model that tell what it takes alone."""
CALIBRATION_TOKENS = 32
CLIENT_POLICIES = ("adaptive", "one-queue", "sequential-swapping")
"""In Prism the client switches models by these; here the server does."""


def main(words: Sequence[str] | None = None) -> int:
    arguments = options().parse_args(words)
    try:
        return asyncio.run(measure(arguments))
    except ChimeraError as fault:
        print(fault, file=sys.stderr)
        return 1


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-url")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--num-models", "-n", type=int, default=4)
    add("--model-paths", "-m", nargs="+", metavar="MODEL", help="models by name (default: model_1 … model_N)")
    add("--num-gpus", type=int, default=1, help="kept beside the result; the server knows its own")
    add("--policy", choices=(*POLICY_NAMES, *CLIENT_POLICIES), help="chosen on the server before the run")
    add("--req-rate", type=float, default=20.0)
    add("--uniform-trace", action="store_true", help="every model is asked as often")
    add("--two-phase-trace", action="store_true", help="the first half of the models in the first half of the time")
    add("--real-trace", type=Path, metavar="FILE", help="Prism's .pkl")
    add("--csv-trace", type=Path, metavar="FILE", help="or any other trace that chimera reads")
    add("--dataset", type=Path, metavar="FILE", help="ShareGPT's JSON")
    add("--time-scale", type=float, default=1.0)
    add("--replication", type=int, default=1, help="so often is each request sent")
    add("--e2e-benchmark", action="store_true", help="kept beside the result")
    add("--micro-benchmark", action="store_true", help="kept beside the result")
    add("--ttft-slo-scale", type=float, default=5.0)
    add("--tpot-slo-scale", type=float, default=5.0)
    add("--slo-file", type=Path, metavar="FILE", help="base latencies, instead of measuring them")
    add("--exp-name", default="collocate")
    add("--results-path", type=Path, default=Path("benchmark-results"))
    add("--request-path", type=Path, default=Path("output-requests"))
    add("--append", action="store_true", help="add to the results of that name, instead of beginning anew")
    add("--seed", type=int, default=42)
    add("--length-scale", type=float, default=1.0, help="prompts and answers so many times as long, for small machines")
    add("--most-seconds", type=float, default=float("inf"), metavar="S", help="of the trace")
    for flag in ("--enable-elastic-memory", "--disable-tqdm", "--debug"):
        add(flag, action="store_true", help="taken, and without effect here")
    return parser


async def measure(arguments: argparse.Namespace) -> int:
    key = client_key()
    url = arguments.base_url or f"http://{arguments.host}:{arguments.port}"
    target = Target(url, {} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        return await replay(arguments, target)
    finally:
        target.close()


async def replay(arguments: argparse.Namespace, target: Target) -> int:
    known = await known_models(target)
    if arguments.policy in POLICY_NAMES:
        await choose_policy(target, arguments.policy)
    trace, exchanges = asked(arguments, known)
    for folder in (arguments.results_path, arguments.request_path):
        folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(
        target=target,
        known=known,
        load=Load(trace=trace, slos={}, seed=arguments.seed, exchanges=exchanges),
        facts={**circumstances(), **told(arguments)},
        dialect=dialect_named("completions"),
        out=arguments.request_path,
        say=print,
    )
    slos = await owed(arguments, campaign)
    campaign = replace(campaign, load=replace(campaign.load, slos=slos))
    found = await campaign.run(Arm(arguments.exp_name, target))
    result = arguments.results_path / f"{arguments.exp_name}.jsonl"
    with result.open("a" if arguments.append else "w") as file:
        file.write(json.dumps(outcome.document(found)) + "\n")
    if not found.valid:
        print(outcome.too_late(found))
        return 1
    print(outcome.banner(found, rate="trace" if arguments.real_trace or arguments.csv_trace else f"{arguments.req_rate:g}"))
    head, *rows = outcome.model_table(found)
    print(table(head, rows))
    print(f"results: {result}; requests: {arguments.request_path / arguments.exp_name}.jsonl")
    return int(bool(found.ending.partial) or not found.metrics.answered)


def told(arguments: argparse.Namespace) -> dict[str, object]:
    kept = ("exp_name", "num_gpus", "policy", "req_rate", "time_scale", "replication", "seed", "length_scale")
    mode = "e2e" if arguments.e2e_benchmark else "micro" if arguments.micro_benchmark else "synthetic"
    return {"mode": mode, **{name: getattr(arguments, name) for name in kept}}


def asked(arguments: argparse.Namespace, known: dict[str, Known]) -> tuple[Trace, list[Exchange]]:
    """The trace on the server's models, and the conversations it is made of, if any."""
    if arguments.replication < 1:
        raise ConfigError.single("--replication", f"{arguments.replication} times is never")
    names = arguments.model_paths or [f"model_{number}" for number in range(1, arguments.num_models + 1)]
    exchanges: list[Exchange] = []
    if arguments.real_trace is not None:
        whole = read_trace(arguments.real_trace)
        adapters = prism.ADAPTERS_OF_8 if arguments.model_paths else prism.ADAPTERS_OF_18
        trace = prism.dealt(whole, adapters, names) if any(r.model.startswith("adapter-") for r in whole.rows) else whole
    elif arguments.csv_trace is not None:
        trace = read_trace(arguments.csv_trace)
    else:
        exchanges = conversations(arguments.dataset, known)
        trace = generate(recipe(arguments, names), arguments.seed, exchanges)
    trace = trace.time_scaled(arguments.time_scale).cut(0.0, arguments.most_seconds)
    trace = Trace(trace.source, tuple(row for row in trace.rows for _ in range(arguments.replication)))
    if not trace.rows:
        raise ConfigError.single(trace.source, f"has no request for {', '.join(names)}")
    stand_ins = names_for(trace, list(known))
    for theirs, ours in stand_ins.items():
        if theirs != ours:
            print(f"{theirs} is replayed on {ours}")
    trace, cut = (
        trace.renamed(stand_ins)
        .length_scaled(1.0 if exchanges else arguments.length_scale)
        .clipped({name: model.context_length for name, model in known.items() if model.context_length})
    )
    if cut:
        print(f"{cut} requests were cut to their model's context")
    return trace, exchanges


def recipe(arguments: argparse.Namespace, names: Sequence[str]) -> Recipe:
    """Prism's synthetic requests: a minute, a few models popular, prompts and answers of 256 tokens and more."""
    shape = "uniform" if arguments.uniform_trace else "two-phase" if arguments.two_phase_trace else "power-law"
    return Recipe(
        models=tuple(names),
        rate=arguments.req_rate,
        seconds=SECONDS,
        shape=shape,
        alpha=POPULARITY,
        prompt_tokens=LENGTHS,
        output_tokens=LENGTHS,
    )


def conversations(path: Path | None, known: dict[str, Known]) -> list[Exchange]:
    if path is None:
        return []
    folder = next((model.tokenizer_path for model in known.values() if model.tokenizer_path), None)
    if folder is None:
        return read_exchanges(path, lambda text: len(text.split()))
    tokenizer = ModelTokenizer.load(folder)
    return read_exchanges(path, lambda text: len(tokenizer.encode(text)))


async def owed(arguments: argparse.Namespace, campaign: Campaign) -> dict[str, Slo]:
    models = campaign.load.trace.models
    if arguments.slo_file is not None:
        base = promise.read_slos(arguments.slo_file.read_bytes(), str(arguments.slo_file))
    else:
        base = await calibration(campaign)
    kept = arguments.request_path / f"{arguments.exp_name}-base-slos.json"
    kept.write_bytes(msgspec.json.format(msgspec.json.encode(base), indent=2) + b"\n")
    return promise.promised(models, base, ttft_scale=arguments.ttft_slo_scale, tpot_scale=arguments.tpot_slo_scale)


async def calibration(campaign: Campaign) -> dict[str, Slo]:
    """A few of each model's own requests, one at a time. The first of each, which may bring the model up, does not count."""
    rows = []
    for model in campaign.load.trace.models:
        first = [row for row in campaign.load.trace.rows if row.model == model][:CALIBRATION]
        rows += [Row(0.0, model, row.prompt_tokens, min(row.output_tokens, CALIBRATION_TOKENS)) for row in [first[0], *first]]
    load = replace(campaign.load, trace=Trace("calibration", tuple(rows)), concurrency=1, seed=campaign.load.seed + 1)
    _, records = await replace(campaign, load=load).run_with_records(Arm("calibration", campaign.target))
    seen: set[str] = set()
    counted = [record for record in records if record.model in seen or seen.add(record.model)]
    return promise.calibrated(counted)


if __name__ == "__main__":
    sys.exit(main())
