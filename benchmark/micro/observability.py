"""What it costs to see: metrics and records on against off, on the simulated engine at full load.

One server, whose front-end and control can be told to count nothing and tell nothing, as with `--no-metrics`, and to begin
again (`switched/`), under a load that never pauses: so many streamed completions at a time. After each turn of the switch the
server goes on for a moment until what was begun before is through and written down; then a window is measured: the time that
all threads of the server's processes ran, engines included, in nanoseconds of the kernel's, for each event that came. Four
windows (on, off, off, on) are a comparison; the server is started anew a few times.

Whatever else runs on the machine only adds to a window, by what it takes from caches. So what is judged is the cheapest
quarter of the windows of either kind, as one takes the best of several timings; the median of the comparisons is told beside
it. Where the machine is too busy for either to be narrow, the third ratio says more: what `bookkeeping.py` measures of the
parts, set against what an event costs without them. Intervals are bootstraps over the comparisons. A request's rows cost the
same however long its answer is, so with `--tokens 32` they weigh four times as much as with 128. A last question is what a
viewer of the dashboard costs an idle server.

    python benchmark/micro/observability.py [--starts 2] [--comparisons 16] [--at-once 64] [--tokens 128]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import aiohttp

from benchmark.micro import bookkeeping
from benchmark.micro.bookkeeping import cheapest
from benchmark.processes import descendants, ran_s, servers, words_of
from benchmark.report import Figures, parser, percentile
from benchmark.served import entry, served

ENGINE = {"step_s": 0.002, "max_running": 256, "kv_tokens": 1_000_000}
TURNS = (True, False, False, True)
SETTLE_S = 0.6
"""Records are told five times a second and kept four times; an answer takes as long."""
WINDOW_S = 0.8
SWITCHED_WITHIN_S = 10.0
LAST_CHUNK = b"0\r\n\r\n"
RESAMPLED = 2000
Told = dict[bool, list[float]]
"""µs of CPU for each event, on and off."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--starts", type=int, default=2, help="of the server (default: %(default)s)")
    options.add_argument("--comparisons", type=int, default=16, help="after each start (default: %(default)s)")
    options.add_argument("--at-once", type=int, default=64, help="(default: %(default)s)")
    options.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    options.add_argument("--viewing-s", type=float, default=20.0, help="how long a viewer looks on (default: %(default)s)")
    arguments = options.parse_args()
    figures = Figures("what it costs to see", seed=arguments.seed)
    models = [entry(f"m{n}", "llama", {"gpu_ids": [0], "on": True}, engine_args=ENGINE) for n in range(4)]
    placement = {"gpus": "1x4GiB", "models": models}
    comparisons: list[Told] = []
    for start in range(arguments.starts):
        with tempfile.NamedTemporaryFile() as file:
            environment = {"PYTHONPATH": str(Path(__file__).parent / "switched"), "CHIMERA_SWITCHED": file.name}
            with served(placement, "--engine", "simulated", environment=environment) as url:
                house = House(url, servers()[-1], Path(file.name))
                found = asyncio.run(compare(house, arguments))
                print(f"# start {start + 1}: {best(found):.4f} ×, median {paired(found):.4f} ×", flush=True)
                comparisons += found
                if start == arguments.starts - 1:
                    idle, seen = asyncio.run(viewing(house, arguments.viewing_s))
    for on in (True, False):
        us = [one for told in comparisons for one in told[on]]
        figures.samples(f"CPU for each event, {'on' if on else 'off'}", us, "µs")
    dice = random.Random(arguments.seed)
    drawn = [dice.choices(comparisons, k=len(comparisons)) for _ in range(RESAMPLED)]
    for name, ratio, at_most in (("on to off, cheapest windows", best, 1.03), ("on to off, median", paired, None)):
        low, high = (percentile([ratio(some) for some in drawn], p) for p in (2.5, 97.5))
        figures.add(name, ratio(comparisons), "×", at_most=at_most, spread=(low, high))
    whole = cheapest([us for told in comparisons for us in told[False]])
    event, request = bookkeeping.tell(figures, arguments.seed)
    parts = [1 + (one + records / arguments.tokens) / whole for one, records in zip(event, request, strict=True)]
    figures.add("on to off, by what keeping books takes of that", parts[0], "×", at_most=1.03, spread=(parts[1], parts[2]))
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


def best(comparisons: Sequence[Told]) -> float:
    on, off = ([us for told in comparisons for us in told[kind]] for kind in (True, False))
    return cheapest(on) / cheapest(off)


def paired(comparisons: Sequence[Told]) -> float:
    return statistics.median(
        statistics.geometric_mean(told[True]) / statistics.geometric_mean(told[False]) for told in comparisons
    )


async def compare(house: House, arguments: argparse.Namespace) -> list[Told]:
    found = []
    async with load(house.url, arguments.at_once, arguments.tokens) as clients:
        await asyncio.sleep(1.0)  # warms up
        for _ in range(arguments.comparisons):
            told: Told = {True: [], False: []}
            for on in TURNS:
                await house.switch(on)
                await asyncio.sleep(SETTLE_S)
                began_s, began = house.ran_s(), sum(client.events for client in clients)
                await asyncio.sleep(WINDOW_S)
                ran_s, events = house.ran_s() - began_s, sum(client.events for client in clients) - began
                told[on].append(1e6 * ran_s / events)
            found.append(told)
    return found


class Client(asyncio.Protocol):
    """Asks again as soon as it was answered, and does as little as it can: what it takes, the server cannot have."""

    def __init__(self, number: int, tokens: int) -> None:
        body = json.dumps({"model": f"m{number % 4}", "prompt": "hello", "max_tokens": tokens, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._request = head % len(body) + body
        self._tail = b""
        self.events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: ")
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:
            self.transport.write(self._request)


@asynccontextmanager
async def load(url: str, at_once: int, tokens: int) -> AsyncIterator[list[Client]]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    loop = asyncio.get_running_loop()
    clients = [Client(number, tokens) for number in range(at_once)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, host, int(port))
    yield clients
    assert all(client.events for client in clients), "a client had no answer"
    for client in clients:
        client.transport.abort()


async def viewing(house: House, seconds: float) -> tuple[float, float]:
    """The part of a core that an idle server takes, and with one viewer."""
    await asyncio.sleep(2 * SETTLE_S)  # the load is over, and written down
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
