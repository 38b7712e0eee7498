"""What it costs to see: metrics and records on against off, on the simulated engine at full load.

Two servers, alike but for `--no-metrics`. A block is so many streamed completions, so many of them at a time, to one of the
two; whose turn it is changes in pairs (on, off, off, on). What is compared is the CPU time of all the server's processes,
engines included, for each token; the ratio's interval is a bootstrap over the pairs. A request's rows cost the same however
long its answer is, so with `--tokens 32` they weigh four times as much as with 128. A third question is what a viewer of the
dashboard costs an idle server.

    python benchmark/micro/observability.py [--pairs 12] [--requests 300] [--tokens 128]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import aiohttp

from benchmark.processes import cpu_s, descendants, servers
from benchmark.report import Figures, parser, percentile
from benchmark.served import entry, served

ENGINE = {"step_s": 0.002, "max_running": 256, "kv_tokens": 1_000_000}
SETTLE_S = 0.6
"""Until what a block left behind is written down as well: records go to the disk four times a second."""
RESAMPLED = 4000


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=12, help="of blocks (default: %(default)s)")
    options.add_argument("--requests", type=int, default=300, help="in a block (default: %(default)s)")
    options.add_argument("--at-once", type=int, default=64, help="(default: %(default)s)")
    options.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    options.add_argument("--viewing-s", type=float, default=20.0, help="how long a viewer looks on (default: %(default)s)")
    arguments = options.parse_args()
    figures = Figures("what it costs to see", seed=arguments.seed)
    models = [entry(f"m{n}", "llama", {"gpu_ids": [0], "on": True}, engine_args=ENGINE) for n in range(4)]
    placement = {"gpus": "1x4GiB", "models": models}
    with ExitStack() as stack:
        houses: dict[str, House] = {}
        for name, flags in (("on", ()), ("off", ("--no-metrics",))):
            before = servers()
            url = stack.enter_context(served(placement, "--engine", "simulated", *flags))
            houses[name] = House(url, next(pid for pid in servers() if pid not in before))
        asyncio.run(measure(figures, houses, arguments))
    return figures.finish(arguments.json)


class House:
    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._pid = pid

    @property
    def cpu_s(self) -> float:
        return cpu_s(descendants(self._pid))


async def measure(figures: Figures, houses: dict[str, House], arguments: argparse.Namespace) -> None:
    told: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(arguments.pairs + 1):
        for name in ("on", "off") if number % 2 else ("off", "on"):
            us = await block(houses[name], arguments)
            if number:  # the first warms up
                told[name].append(us)
    for name, costs in told.items():
        figures.samples(f"CPU for each token, {name}", costs, "µs")
    logs = [math.log(on / off) for on, off in zip(told["on"], told["off"], strict=True)]
    dice = random.Random(arguments.seed)
    means = [statistics.fmean(dice.choices(logs, k=len(logs))) for _ in range(RESAMPLED)]
    low, high = (math.exp(percentile(means, p)) for p in (2.5, 97.5))
    ratio = math.exp(statistics.fmean(logs))
    figures.add("on to off", ratio, "×", at_most=1.03, spread=(low, high))
    idle, seen = await viewing(houses["on"], arguments.viewing_s)
    figures.add("an idle server", 100 * idle, "% of a core")
    figures.add("the same with a viewer of the dashboard, above that", 100 * (seen - idle), "% of a core", at_most=1.0)


async def block(house: House, arguments: argparse.Namespace) -> float:
    """µs of CPU for each token."""
    before = house.cpu_s
    waiting = list(range(arguments.requests))

    async with aiohttp.ClientSession(house.url) as client:

        async def one() -> None:
            while waiting:
                number = waiting.pop()
                body = {"model": f"m{number % 4}", "prompt": "hello", "max_tokens": arguments.tokens, "stream": True}
                async with client.post("/v1/completions", json=body) as response:
                    assert (await response.read()).endswith(b"data: [DONE]\n\n")

        await asyncio.gather(*(one() for _ in range(arguments.at_once)))
    await asyncio.sleep(SETTLE_S)
    return 1e6 * (house.cpu_s - before) / (arguments.requests * arguments.tokens)


async def viewing(house: House, seconds: float) -> tuple[float, float]:
    """The part of a core that an idle server takes, and with one viewer."""
    async with aiohttp.ClientSession(house.url) as client:
        idle = await taken(house, seconds)
        async with client.get("/sight") as stream:
            reading = asyncio.create_task(sights(stream))
            seen = await taken(house, seconds)
            reading.cancel()
    return idle, seen


async def sights(stream: aiohttp.ClientResponse) -> None:
    async for _ in stream.content:
        pass


async def taken(house: House, seconds: float) -> float:
    before, began_s = house.cpu_s, time.monotonic()
    await asyncio.sleep(seconds)
    return (house.cpu_s - before) / (time.monotonic() - began_s)


if __name__ == "__main__":
    sys.exit(main())
