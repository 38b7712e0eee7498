"""Whether the benchmark's client is the bottleneck: a thousand requests a second from one core, each at its time.

The server is chimera with a simulated engine, on the other cores; answers are short, so that it can keep up for as long as
it can. What counts here is when requests are sent, whatever becomes of them.

    python benchmark/micro/client.py [--rate 1000] [--seconds 10]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import uvloop
from chimera.bench.dialect import dialect_named
from chimera.bench.load import Run, Terms
from chimera.bench.session import Load, jobs_of, known_models, prompts_of
from chimera.bench.stream import Target
from chimera.trace.generator import Recipe, generate

from benchmark.report import Figures, parser
from benchmark.served import entry, served

CONNECTIONS = 1500
"""Ready beforehand: when one server cannot keep up, many requests are open at a time."""
ENGINE = {"step_s": 0.005, "max_running": 4096, "kv_tokens": 10_000_000}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rate", type=float, default=1000.0)
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--tokens", type=int, default=2, help="of each answer (default: %(default)s)")
    arguments = options.parse_args()
    figures = Figures("the client", seed=arguments.seed)
    cores = sorted(os.sched_getaffinity(0))
    models = [entry("m", "llama", {"gpu_ids": [0], "on": True}, engine_args=ENGINE)]
    with served({"gpus": "1x4GiB", "models": models}, "--engine", "simulated", cores=cores[:-1] or cores) as url:
        os.sched_setaffinity(0, cores[-1:])
        uvloop.run(measure(figures, url, arguments))
        os.sched_setaffinity(0, cores)
    return figures.finish(arguments.json)


async def measure(figures: Figures, url: str, arguments: argparse.Namespace) -> None:
    target, dialect = Target(url), dialect_named("completions")
    lengths = (arguments.tokens, arguments.tokens)
    for rate, seconds in ((100.0, 2.0), (arguments.rate, arguments.seconds)):  # the first warms both sides up
        recipe = Recipe(models=("m",), rate=rate, seconds=seconds, prompt_tokens=(8, 16), output_tokens=lengths)
        load = Load(trace=generate(recipe, arguments.seed), slos={})
        jobs = jobs_of(load, prompts_of(load, await known_models(target)), dialect, lambda model: target)
        run = Run(jobs, dialect, Terms(connections=CONNECTIONS, timeout_s=60.0, drain_s=30.0))
        spent_s = time.process_time()
        ending = await run.open_loop()
        spent_s = time.process_time() - spent_s
    records = [job.record for job in jobs]
    span_s = max(r.sent_s or 0.0 for r in records) - min(r.sent_s or 0.0 for r in records)
    figures.add("requests sent", ending.sent, "", at_least=len(jobs))
    figures.add("rate of sending", ending.sent / span_s, "1/s", at_least=0.98 * arguments.rate)
    figures.add("lag, median", 1000 * ending.lag_p50_s, "ms")
    figures.add("lag, p99", 1000 * ending.lag_p99_s, "ms", at_most=5)
    figures.add("lag, most", 1000 * ending.lag_max_s, "ms")
    figures.add("the client's own work", 1e6 * spent_s / ending.sent, "µs per request")
    figures.add("answered", sum(record.answered for record in records), "")


if __name__ == "__main__":
    sys.exit(main())
