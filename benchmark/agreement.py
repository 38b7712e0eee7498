"""Whether this benchmark tells what others tell: `sglang.bench_serving` on the same server under the same load, and the
server's own records.

Requests of equal length, so many at a time, one tool after the other in turns; the medians of each latency are compared.
The server's own TTFT comes with the first event of its `/generate`.

    python benchmark/agreement.py [--rounds 3] [--engine sglang|simulated]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: the repository is not a package

from chimera.bench.dialect import dialect_named
from chimera.bench.outcome import peers_keys
from chimera.bench.record import Record, stories
from chimera.bench.session import Load, jobs_of, known_models, measured, prompts_of
from chimera.bench.stream import Target
from chimera.core.metrics import measure
from chimera.trace.trace import Row, Trace

from benchmark.report import Figures, parser
from benchmark.served import MODELS, entry, served

LATENCIES = ("ttft", "tpot", "e2e_latency")
_THEIR_PROGRAM = """
import runpy, sys, types
from chimera import standins
standins.install()
sys.modules.setdefault("datasets", types.SimpleNamespace(load_dataset=None))  # for pictures, which are not asked for
sys.argv[0] = "bench_serving"
runpy.run_module("sglang.bench_serving", run_name="__main__")
"""
SIMULATED = {"step_s": 0.004, "prefill_s_per_token": 0.0002}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--requests", type=int, default=60, help="in each round, of each tool")
    options.add_argument("--concurrency", type=int, default=1, help="more leave it to luck which requests share a step")
    options.add_argument("--prompt-tokens", type=int, default=512)
    options.add_argument("--output-tokens", type=int, default=24)
    options.add_argument("--engine", choices=("sglang", "simulated"), default="sglang")
    arguments = options.parse_args()
    figures = Figures("agreement with others", seed=arguments.seed)
    costs = {"engine_args": SIMULATED} if arguments.engine == "simulated" else {}
    models = [entry("llama", "llama", {"gpu_ids": [0], "on": True}, **costs)]
    theirs: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    gaps: list[float] = []
    with served({"gpus": "1x1GiB", "models": models}, "--engine", arguments.engine) as url:
        asyncio.run(run_ours(url, arguments, 0))  # both sides are warm from here on
        for number in range(1, arguments.rounds + 1):
            theirs.append(run_theirs(url, arguments, number))
            figures_of_ours, records = asyncio.run(run_ours(url, arguments, number))
            ours.append(figures_of_ours)
            gaps += [
                1000 * (story.ttft_s - record.server_ttft_s)
                for record, story in zip(records, stories(records), strict=True)
                if story.ttft_s is not None and record.server_ttft_s is not None
            ]
    for word in LATENCIES:
        key = f"median_{word}_ms"
        mine, other = (statistics.median(run[key] for run in runs) for runs in (ours, theirs))
        figures.add(f"median {word}, ours", mine, "ms")
        figures.add(f"median {word}, sglang.bench_serving", other, "ms")
        figures.add(f"median {word}, difference", 100 * abs(mine / other - 1), "%", at_most=3)
    mine, other = (statistics.median(run["output_throughput"] for run in runs) for runs in (ours, theirs))
    figures.add("output throughput, difference", 100 * abs(mine / other - 1), "%", at_most=3)
    figures.samples("TTFT here less the server's own", gaps, "ms", "within 1", at_most=1, at_least=-1)
    return figures.finish(arguments.json)


async def run_ours(url: str, arguments: argparse.Namespace, number: int) -> tuple[dict[str, float], list[Record]]:
    target, dialect = Target(url), dialect_named("generate")
    load = load_of(arguments, number)
    prompts = prompts_of(load, await known_models(target))
    found = await measured(load, jobs_of(load, prompts, dialect, lambda model: target), dialect)
    return peers_keys(found.records, found.ending, measure(stories(found.records))), found.records


def load_of(arguments: argparse.Namespace, number: int) -> Load:
    row = Row(0.0, "llama", arguments.prompt_tokens, arguments.output_tokens)
    trace = Trace("equal requests", (row,) * arguments.requests)
    return Load(trace=trace, slos={}, concurrency=arguments.concurrency, seed=arguments.seed + number)


def run_theirs(url: str, arguments: argparse.Namespace, number: int) -> dict[str, float]:
    """Prompts of the same lengths and making, none of which the server has seen."""
    prompts = prompts_of(load_of(arguments, 1000 + number), asyncio.run(known_models(Target(url))))
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        out, asked = Path(folder) / "out.jsonl", Path(folder) / "prompts.jsonl"
        turns = [{"conversations": [{"content": prompt}, {"content": "an answer of several words"}]} for prompt in prompts]
        asked.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
        words = ["--backend", "sglang", "--base-url", url, "--model", str(MODELS / "llama"), "--disable-tqdm"]
        words += ["--dataset-name", "custom", "--dataset-path", str(asked), "--num-prompts", str(arguments.requests)]
        words += ["--sharegpt-output-len", str(arguments.output_tokens), "--output-file", str(out)]
        words += ["--max-concurrency", str(arguments.concurrency)]
        told = subprocess.run([sys.executable, "-c", _THEIR_PROGRAM, *words], capture_output=True, text=True)
        if told.returncode or not out.exists():
            raise RuntimeError(f"sglang.bench_serving failed:\n{told.stdout[-2000:]}\n{told.stderr[-2000:]}")
        found: dict[str, float] = json.loads(out.read_text().splitlines()[-1])
        if found["completed"] != arguments.requests:
            raise RuntimeError(f"sglang.bench_serving completed {found['completed']} of {arguments.requests} requests")
        return found


if __name__ == "__main__":
    sys.exit(main())
