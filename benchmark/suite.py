"""What `make bench` runs: real engines with tiny models on virtual GPUs, by HTTP, from a trace to a report.

*policies*: eighteen models on two GPUs that hold ten of them, under `arena_prism18` with shorter prompts and answers; four
policies in turn on one server, the same requests each. What is static are the ten models that are asked for most.
*bursts*: the mix of `benchmark/micro/bursts.py`: two models whose bursts alternate, with the memory split half and half and
with leases that follow the need; a request attains its goal if its first token comes within half the time that a burst takes a
model that has all memory to itself, measured first.

    python benchmark/suite.py [--part policies|bursts|all] [--out DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: the repository is not a package

from chimera.bench import page, paired
from chimera.bench.campaign import Arm, Campaign, compare, comparison
from chimera.bench.dialect import dialect_named
from chimera.bench.load import Terms
from chimera.bench.outcome import Outcome
from chimera.bench.record import Record
from chimera.bench.session import Load, known_models
from chimera.bench.stream import Target
from chimera.cli.circumstances import circumstances
from chimera.core.model import Slo
from chimera.trace.generator import Recipe, generate
from chimera.trace.reader import read_trace
from chimera.trace.trace import Row, Trace

from benchmark.report import Figures, parser
from benchmark.served import entry, served

Runs = list[tuple[Outcome, list[Record]]]

ROOT = Path(__file__).parents[1]
TRACES = Path(os.environ.get("CHIMERA_TRACES", ROOT / "../shared/traces"))

# Policies.
POLICIES = ("static", "time-sharing", "space-sharing", "flexible")
KINDS = ("llama", "qwen3", "gemma2", "mistral", "moe")
GPUS = "2x92MiB"
ON_AT_FIRST = 10
MOST_KV_GB = 0.06
CONTEXT = 1024
LENGTHS = 0.125
"""Of the trace's prompts and answers: what two cores can make of its tokens."""
FROM_S = 20.0
"""From here on fourteen models are asked in a minute; later fewer."""
PROMISE = {"ttft_ms": 1000, "tpot_ms": 100}

# Bursts, as in benchmark/micro/bursts.py.
BURST, BURSTS, EVERY_S = 32, 8, 7.0
PROMPT, ANSWER = 128, 64
PATIENCE = 0.5
AT_ONCE = 48
BURST_GPU = "1x48MiB"
HALF_GB = 0.0126
"""Of what the weights leave: all of it holds one burst, half of it little more than half of one."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--part", choices=("policies", "bursts", "all"), default="all")
    options.add_argument("--policies", type=lambda text: text.split(","), default=list(POLICIES), metavar="A,B")
    options.add_argument("--seconds", type=float, default=80.0, help="of the trace, for each policy (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=1, help="of all policies (default: %(default)s)")
    options.add_argument("--out", type=Path, default=Path("bench-results/suite"), help="default: %(default)s")
    arguments = options.parse_args()
    for part in ("policies", "bursts"):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
    figures = Figures("replay on real engines", seed=arguments.seed)
    if arguments.part in ("policies", "all"):
        runs = asyncio.run(policies(arguments))
        judge_policies(figures, runs)
        write_report(arguments.out / "policies", "Four policies, eighteen models, two GPUs", runs)
    if arguments.part in ("bursts", "all"):
        runs = asyncio.run(bursts(arguments))
        judge_bursts(figures, runs)
        write_report(arguments.out / "bursts", "Bursts in turn: memory in halves, and leases", runs)
    return figures.finish(arguments.json)


# Four policies.


async def policies(arguments: argparse.Namespace) -> Runs:
    trace = arena(arguments.seconds, arguments.seed)
    with served(eighteen(trace), "--policy", "static") as url:
        ready = await prepared(arguments.out / "policies", url, trace, arguments.seed)
        arms = [Arm(policy, ready.target, policy) for policy in arguments.policies]
        runs = await compare(ready, arms, arguments.rounds)
    print(comparison(runs))
    return runs


def arena(seconds: float, seed: int) -> Trace:
    """A piece of `arena_prism18`; without that file, requests that are spread over models as it is."""
    path = TRACES / "arena_prism18.csv.gz"
    if path.is_file():
        return read_trace(path, FROM_S, FROM_S + seconds).length_scaled(LENGTHS)
    print(f"# {path} is not there: made-up requests instead")
    names = tuple(f"model_{number:02}" for number in range(1, 19))
    lengths = {"prompt_tokens": (4, 68), "output_tokens": (4, 138)}
    recipe = Recipe(models=names, rate=3.3, seconds=seconds, arrivals="gamma", cv=1.5, shape="power-law", alpha=1.2, **lengths)
    return generate(recipe, seed)


def eighteen(trace: Trace) -> dict[str, Any]:
    """The placement file: those that are asked for most are on at first."""
    asked = {name: sum(row.model == name for row in trace.rows) for name in (f"model_{number:02}" for number in range(1, 19))}
    models = []
    for rank, name in enumerate(sorted(asked, key=lambda name: (-asked[name], name))):
        seat = {"gpu_ids": [rank % 2], "on": rank < ON_AT_FIRST, "max_memory_pool_size": MOST_KV_GB}
        kind = KINDS[int(name[-2:]) % len(KINDS)]
        models.append(entry(name, kind, seat, context_length=CONTEXT, slo=PROMISE))
    return {"gpus": GPUS, "models": models}


def judge_policies(figures: Figures, runs: Runs) -> None:
    """Of several rounds of one policy the mean counts."""
    goodputs: dict[str, list[float]] = {}
    for found, records in runs:
        name = str(found.facts["policy"])
        goodputs.setdefault(name, []).append(found.metrics.goodput_per_s)
        joint = paired.attainment(records, paired.MEASURES["joint"])
        spread = (100 * joint.low, 100 * joint.high)
        figures.add(f"{found.name}, both promises kept", 100 * joint.value, "%", spread=spread)
        figures.add(f"{found.name}, joint goodput", found.metrics.goodput_per_s, "requests/s")
        figures.add(f"{found.name}, sent late", 100 * found.ending.late, "%", at_most=5)
    means = {name: sum(values) / len(values) for name, values in goodputs.items()}
    others = [value for name, value in means.items() if name != "flexible"]
    if "flexible" in means and others:
        figures.add(
            "joint goodput, flexible against the best other", means["flexible"] / max(*others, 1e-9), "×", at_least=0.99
        )


# Bursts.


def burst_trace(bursts: int = BURSTS, models: Sequence[str] = ("a", "b")) -> Trace:
    moments = [(burst * EVERY_S, models[burst % len(models)]) for burst in range(bursts)]
    return Trace("bursts in turn", tuple(Row(at_s, model, PROMPT, ANSWER) for at_s, model in moments for _ in range(BURST)))


async def bursts(arguments: argparse.Namespace) -> Runs:
    runs: Runs = []
    within_s = None
    at_once = {"max_running_requests": AT_ONCE}
    for name, asked, seat, flags in (
        ("alone", ("a",), {}, []),
        ("halves", ("a", "b"), {"max_memory_pool_size": HALF_GB}, ["--static"]),
        ("leases", ("a", "b"), {}, []),
    ):
        models = [entry(model, "qwen3", {"gpu_ids": [0], "on": True, **seat}, engine_args=at_once) for model in asked]
        trace = burst_trace(2 if name == "alone" else BURSTS, asked)
        with served({"gpus": BURST_GPU, "models": models}, *flags) as url:
            ready = await prepared(arguments.out / "bursts", url, trace, arguments.seed, Slo(ttft_s=within_s))
            run = await ready.run_with_records(Arm(name, ready.target))
        if name == "alone":
            within_s = PATIENCE * max((record.ended_s or 0.0) - (record.sent_s or 0.0) for record in run[1][BURST:])
            print(f"# a burst's own time is {within_s / PATIENCE:.2f} s")
        else:
            runs.append(run)
    print(comparison(runs))
    return runs


def judge_bursts(figures: Figures, runs: Runs) -> None:
    attained = {}
    for found, records in runs:
        share = paired.attainment(records, paired.MEASURES["ttft"])
        attained[found.name] = share.value
        figures.add(f"{found.name}, answered", found.metrics.answered, "requests", at_least=BURST * BURSTS)
        figures.add(f"{found.name}, first token in time", 100 * share.value, "%", spread=(100 * share.low, 100 * share.high))
    figures.add("TTFT attainment, leases against halves", attained["leases"] / max(attained["halves"], 1e-9), "×", at_least=1.5)


# What both need.


async def prepared(out: Path, url: str, trace: Trace, seed: int, slo: Slo | None = None) -> Campaign:
    target = Target(url)
    known = await known_models(target)
    slos = {name: slo or model.slo for name, model in known.items()}
    clipped, cut = trace.clipped({name: model.context_length or CONTEXT for name, model in known.items()})
    facts = {
        **circumstances(),
        "trace": Path(trace.source).name,
        "requests": len(trace.rows),
        "seconds": round(trace.span_s, 1),
        "length_scale": LENGTHS,
        "cut_to_context": cut,
        "seed": seed,
    }
    dialect = dialect_named("completions")
    load = Load(trace=clipped, slos=slos, seed=seed, terms=Terms(drain_s=30.0, timeout_s=60.0))
    return Campaign(target=target, known=known, load=load, facts=facts, dialect=dialect, out=out, say=print)


def write_report(folder: Path, title: str, runs: Runs) -> None:
    print(f"# report: {page.write(folder, title, runs)[0]}")


if __name__ == "__main__":
    sys.exit(main())
