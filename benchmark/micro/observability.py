"""What it costs to see: metrics and records on against off, on the simulated engine at full load.

Two servers, alike but for `--no-metrics`. A block is so many streamed completions, so many of them at a time, to one of the
two; four blocks (on, off, off, on) are a comparison, so what drifts meanwhile is in both. What is compared is the time that
all threads of the server's processes ran, engines included, in nanoseconds of the kernel's, for each token; what a block
leaves to be written down later is counted with the same server's next one. Servers are started anew every few comparisons:
two that run the same program may differ by where things lie in memory. The ratio is the median of all comparisons, its
interval a bootstrap over them. A request's rows cost the same however long its answer is, so with `--tokens 32` they weigh
four times as much as with 128. A third question is what a viewer of the dashboard costs an idle server.

    python benchmark/micro/observability.py [--starts 4] [--comparisons 10] [--requests 128] [--tokens 128]
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

from benchmark.processes import cpu_s, descendants, ran_s, servers
from benchmark.report import Figures, parser, percentile
from benchmark.served import entry, served

ENGINE = {"step_s": 0.002, "max_running": 256, "kv_tokens": 1_000_000}
FLAGS = {"on": (), "off": ("--no-metrics",)}
TURNS = ("on", "off", "off", "on")
RESAMPLED = 4000


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--starts", type=int, default=4, help="of both servers (default: %(default)s)")
    options.add_argument("--comparisons", type=int, default=10, help="after each start (default: %(default)s)")
    options.add_argument("--requests", type=int, default=128, help="in a block (default: %(default)s)")
    options.add_argument("--at-once", type=int, default=64, help="(default: %(default)s)")
    options.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    options.add_argument("--viewing-s", type=float, default=20.0, help="how long a viewer looks on (default: %(default)s)")
    arguments = options.parse_args()
    figures = Figures("what it costs to see", seed=arguments.seed)
    models = [entry(f"m{n}", "llama", {"gpu_ids": [0], "on": True}, engine_args=ENGINE) for n in range(4)]
    placement = {"gpus": "1x4GiB", "models": models}
    costs: dict[str, list[float]] = {name: [] for name in FLAGS}
    logs: list[float] = []
    for start in range(arguments.starts):
        with ExitStack() as stack:
            houses: dict[str, House] = {}
            for name in FLAGS if start % 2 else reversed(FLAGS):
                before = servers()
                url = stack.enter_context(served(placement, "--engine", "simulated", *FLAGS[name]))
                houses[name] = House(url, next(pid for pid in servers() if pid not in before))
            found = asyncio.run(compare(houses, costs, arguments))
            print(f"# start {start + 1}: {math.exp(statistics.median(found)):.4f} ×", flush=True)
            logs += found
            if start == arguments.starts - 1:
                idle, seen = asyncio.run(viewing(houses["on"], arguments.viewing_s))
    for name, us in costs.items():
        figures.samples(f"CPU for each token, {name}", us, "µs")
    dice = random.Random(arguments.seed)
    medians = [statistics.median(dice.choices(logs, k=len(logs))) for _ in range(RESAMPLED)]
    low, high = (math.exp(percentile(medians, p)) for p in (2.5, 97.5))
    figures.add("on to off", math.exp(statistics.median(logs)), "×", at_most=1.03, spread=(low, high))
    figures.add("an idle server", 100 * idle, "% of a core")
    figures.add("the same with a viewer of the dashboard, above that", 100 * (seen - idle), "% of a core", at_most=1.0)
    return figures.finish(arguments.json)


class House:
    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._pid = pid
        self._counted_s = 0.0

    @property
    def cpu_s(self) -> float:
        return cpu_s(descendants(self._pid))

    def ran_s(self) -> float:
        """Since this was last asked."""
        before, self._counted_s = self._counted_s, ran_s(descendants(self._pid))
        return self._counted_s - before


async def compare(houses: dict[str, House], costs: dict[str, list[float]], arguments: argparse.Namespace) -> list[float]:
    """The logarithm of the ratio, once for each comparison."""
    tokens = arguments.requests * arguments.tokens
    found = []
    for name in TURNS:  # warms up
        await block(houses[name], arguments)
    for house in houses.values():
        house.ran_s()
    for _ in range(arguments.comparisons):
        told: dict[str, list[float]] = {name: [] for name in FLAGS}
        for name in TURNS:
            await block(houses[name], arguments)
            us = 1e6 * houses[name].ran_s() / tokens
            costs[name].append(us)
            told[name].append(math.log(us))
        found.append(statistics.fmean(told["on"]) - statistics.fmean(told["off"]))
    return found


async def block(house: House, arguments: argparse.Namespace) -> None:
    waiting = list(range(arguments.requests))

    async with aiohttp.ClientSession(house.url) as client:

        async def one() -> None:
            while waiting:
                number = waiting.pop()
                body = {"model": f"m{number % 4}", "prompt": "hello", "max_tokens": arguments.tokens, "stream": True}
                async with client.post("/v1/completions", json=body) as response:
                    assert (await response.read()).endswith(b"data: [DONE]\n\n")

        await asyncio.gather(*(one() for _ in range(arguments.at_once)))


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
