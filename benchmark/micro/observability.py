"""What it costs to see: metrics and records on against off, on the simulated engine at full load.

One server, whose front-end and control can be told to count nothing and tell nothing, as with `--no-metrics`, and to begin
again (`switched/`). A block is so many streamed completions, so many of them at a time; four blocks (on, off, off, on) are a
comparison, so what drifts meanwhile is in both. What is compared is the time that all threads of the server's processes ran,
engines included, in nanoseconds of the kernel's, for each token, what is written down after the block with it. The ratio is
the median of all comparisons, its interval a bootstrap over them; the server is started anew a few times. A request's rows
cost the same however long its answer is, so with `--tokens 32` they weigh four times as much as with 128. A third question is
what a viewer of the dashboard costs an idle server.

    python benchmark/micro/observability.py [--starts 3] [--comparisons 12] [--requests 128] [--tokens 128]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import aiohttp

from benchmark.processes import descendants, ran_s, servers, words_of
from benchmark.report import Figures, parser, percentile
from benchmark.served import entry, served

ENGINE = {"step_s": 0.002, "max_running": 256, "kv_tokens": 1_000_000}
TURNS = (True, False, False, True)
SETTLE_S = 0.6
"""Until what a block left behind is written down as well: records are told five times a second, and kept four times."""
SWITCHED_WITHIN_S = 10.0
RESAMPLED = 4000


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--starts", type=int, default=3, help="of the server (default: %(default)s)")
    options.add_argument("--comparisons", type=int, default=12, help="after each start (default: %(default)s)")
    options.add_argument("--requests", type=int, default=128, help="in a block (default: %(default)s)")
    options.add_argument("--at-once", type=int, default=64, help="(default: %(default)s)")
    options.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    options.add_argument("--viewing-s", type=float, default=20.0, help="how long a viewer looks on (default: %(default)s)")
    arguments = options.parse_args()
    figures = Figures("what it costs to see", seed=arguments.seed)
    models = [entry(f"m{n}", "llama", {"gpu_ids": [0], "on": True}, engine_args=ENGINE) for n in range(4)]
    placement = {"gpus": "1x4GiB", "models": models}
    costs: dict[bool, list[float]] = {True: [], False: []}
    logs: list[float] = []
    for start in range(arguments.starts):
        with tempfile.NamedTemporaryFile() as file:
            environment = {"PYTHONPATH": str(Path(__file__).parent / "switched"), "CHIMERA_SWITCHED": file.name}
            with served(placement, "--engine", "simulated", environment=environment) as url:
                house = House(url, servers()[-1], Path(file.name))
                found = asyncio.run(compare(house, costs, arguments))
                print(f"# start {start + 1}: {math.exp(statistics.median(found)):.4f} ×", flush=True)
                logs += found
                if start == arguments.starts - 1:
                    idle, seen = asyncio.run(viewing(house, arguments.viewing_s))
    for on, us in costs.items():
        figures.samples(f"CPU for each token, {'on' if on else 'off'}", us, "µs")
    dice = random.Random(arguments.seed)
    medians = [statistics.median(dice.choices(logs, k=len(logs))) for _ in range(RESAMPLED)]
    low, high = (math.exp(percentile(medians, p)) for p in (2.5, 97.5))
    figures.add("on to off", math.exp(statistics.median(logs)), "×", at_most=1.03, spread=(low, high))
    figures.add("an idle server", 100 * idle, "% of a core")
    figures.add("the same with a viewer of the dashboard, above that", 100 * (seen - idle), "% of a core", at_most=1.0)
    return figures.finish(arguments.json)


class House:
    def __init__(self, url: str, pid: int, acknowledged: Path) -> None:
        self.url = url
        self._pid = pid
        self._acknowledged = acknowledged

    def ran_s(self) -> float:
        return ran_s(descendants(self._pid))

    async def switch(self, on: bool) -> None:
        """Until both have."""
        self._acknowledged.write_text("")
        asked = [pid for pid in descendants(self._pid) if {"chimera.server", "chimera.control"} & set(words_of(pid))]
        for pid in asked:
            os.kill(pid, signal.SIGUSR1 if on else signal.SIGUSR2)
        wanted = {f"{pid} {'on' if on else 'off'}" for pid in asked}
        async with asyncio.timeout(SWITCHED_WITHIN_S):
            while set(self._acknowledged.read_text().splitlines()) != wanted:  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.01)


async def compare(house: House, costs: dict[bool, list[float]], arguments: argparse.Namespace) -> list[float]:
    """The logarithm of the ratio, once for each comparison."""
    await block(house, arguments)  # warms up
    found = []
    for _ in range(arguments.comparisons):
        told: dict[bool, list[float]] = {True: [], False: []}
        for on in TURNS:
            await house.switch(on)
            before_s = house.ran_s()
            await block(house, arguments)
            us = 1e6 * (house.ran_s() - before_s) / (arguments.requests * arguments.tokens)
            costs[on].append(us)
            told[on].append(math.log(us))
        found.append(statistics.fmean(told[True]) - statistics.fmean(told[False]))
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
    await asyncio.sleep(SETTLE_S)


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
    before, began_s = house.ran_s(), time.monotonic()
    await asyncio.sleep(seconds)
    return (house.ran_s() - before) / (time.monotonic() - began_s)


if __name__ == "__main__":
    sys.exit(main())
