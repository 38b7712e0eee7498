"""Clients that vanish in the middle of their streams, all at once: how soon nothing of them is left.

    python benchmark/micro/vanish.py [--clients 200] [--rounds 5] [--engine sglang]

Each has had its first words when its connection is cut. From the last cut on the server's own account is read: requests that
run or wait (slots), and tokens of KV memory in use (bytes), which with SGLang includes cached prefixes; so there it is the
slots that are emptied first, and then a flush shows that nobody holds what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import aiohttp
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from benchmark.micro.server import ours
from benchmark.report import Figures, parser

MODEL = "llama"
TOKENS = 1500
GONE_WITHIN_S = 30.0


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=200)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--engine", choices=("sglang", "simulated"), default="simulated")
    arguments = options.parse_args()
    figures = Figures("vanish", seed=arguments.seed, facts={"engine": arguments.engine})
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        make(MODELS[MODEL], Path(folder) / MODEL, seed=0)
        with ours(placement(Path(folder), arguments.engine), "--engine", arguments.engine) as port:
            took_s = asyncio.run(rounds(f"http://127.0.0.1:{port}", arguments))
    figures.add("clients that vanish at once", arguments.clients, "", at_least=200)
    figures.samples("until nothing of them is left", took_s, "s")
    figures.add("slowest of the rounds", max(took_s), "s", at_most=1.0)
    return figures.finish(arguments.json)


def placement(folder: Path, engine: str) -> Path:
    entry = {"model_name": MODEL, "model_path": str(folder / MODEL), "init_placements": [{"gpu_ids": [0]}]}
    if engine == "simulated":  # slow enough that nobody's answer ends by itself
        entry |= {"engine_args": {"step_s": 0.02}}
    file = folder / "placement.json"
    file.write_text(json.dumps([entry]))
    return file


async def rounds(url: str, arguments: argparse.Namespace) -> list[float]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as watcher:
        return [await vanish(url, arguments.clients, watcher) for _ in range(arguments.rounds)]


async def vanish(url: str, clients: int, watcher: aiohttp.ClientSession) -> float:
    """Seconds from the last cut until the server's account is empty."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as crowd:
        streams = await asyncio.gather(*(begun(crowd, url) for _ in range(clients)))
        await until(watcher, url, lambda slots, tokens: slots == clients and tokens > 0)  # workers count four times a second
        for stream in streams:
            stream.close()  # its connection is cut, not closed in order: there is more to read
    cut_s = time.perf_counter()
    await until(watcher, url, lambda slots, _: slots == 0)
    async with watcher.post(f"{url}/flush_cache") as response:
        assert response.status == 200, await response.text()
    await until(watcher, url, lambda slots, tokens: slots == tokens == 0)
    return time.perf_counter() - cut_s


async def begun(crowd: aiohttp.ClientSession, url: str) -> aiohttp.ClientResponse:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    response = await crowd.post(f"{url}/v1/completions", json=body)
    assert response.status == 200, await response.text()
    assert (await response.content.readline()).startswith(b"data: ")
    return response


async def until(watcher: aiohttp.ClientSession, url: str, is_so: Callable[[int, int], bool]) -> None:
    deadline_s = time.perf_counter() + GONE_WITHIN_S
    while not is_so(*(found := await account(watcher, url))):
        assert time.perf_counter() < deadline_s, f"{found[0]} slots and {found[1]} tokens are in use"
        await asyncio.sleep(0.005)


async def account(watcher: aiohttp.ClientSession, url: str) -> tuple[int, int]:
    """Slots and tokens in use, by the server's own snapshot."""
    async with watcher.get(f"{url}/snapshot") as response:
        snapshot = await response.json()
    views = snapshot["replicas"]
    slots = sum(view["running"] + view["queued"] for view in views) + sum(snapshot["waiting"].values())
    return slots, sum(view["kv_used_tokens"] for view in views)


if __name__ == "__main__":
    sys.exit(main())
