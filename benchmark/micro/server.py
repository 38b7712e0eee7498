"""The whole server against stock `sglang.launch_server`: the same tiny model and the same load, in turns.

A round is a number of streamed chats, so many of them at a time. Whose turn it is changes in pairs (ours, stock, stock, ours),
so that what else the machine does hits both; while ours has its turn, stock's processes are stopped, because they would poll.
Time to first token is from the request's first byte to its first event with text; throughput is output tokens a second over a
round. With `--requests` ours is then asked so often on its simulated engine, and the memory of all its processes is watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from benchmark.report import Figures, parser

ROOT = Path(__file__).parents[2]
MODEL = "llama"
UP_WITHIN_S = 300.0
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box in the old garden by night".split()  # noqa: SIM905
MIB = 1 << 20
STUDENT_95 = 1.7
"""Of a one-sided 95 % bound, from fifteen samples on; a little more than the normal's 1.645."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=16, help="of each server")
    options.add_argument("--chats", type=int, default=30, help="in a round")
    options.add_argument("--at-once", type=int, default=4)
    options.add_argument("--tokens", type=int, default=32, help="of each answer")
    options.add_argument("--requests", type=int, default=0, help="for the memory, on the simulated engine")
    arguments = options.parse_args()
    figures = Figures("server", seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        make(MODELS[MODEL], Path(folder) / MODEL, seed=0)
        if arguments.rounds:
            compare(figures, Path(folder), arguments)
        if arguments.requests:
            memory(figures, Path(folder), arguments.requests)
    return figures.finish(arguments.json)


@dataclass
class Turns:
    """What one server did in all its rounds."""

    ttft_ms: list[float] = field(default_factory=list)
    """The median of each round."""
    tokens_per_s: list[float] = field(default_factory=list)


def compare(figures: Figures, folder: Path, arguments) -> None:  # type: ignore[no-untyped-def]
    dice = random.Random(arguments.seed)
    told: dict[str, Turns] = {"ours": Turns(), "stock": Turns()}
    with ours(folder / MODEL) as our_port, stock(folder / MODEL) as (stock_port, group):
        for number in range(arguments.rounds + 1):
            asks = [chat(dice, arguments.tokens) for _ in range(arguments.chats)]
            for name in ("ours", "stock") if number % 2 else ("stock", "ours"):
                os.killpg(group, signal.SIGCONT if name == "stock" else signal.SIGSTOP)
                port = our_port if name == "ours" else stock_port
                began_s = time.perf_counter()
                answers = asyncio.run(round_of(port, asks, arguments.at_once))
                took_s = time.perf_counter() - began_s
                if number:  # the first warms up
                    told[name].ttft_ms.append(statistics.median(ttft_s for ttft_s, _ in answers) * 1000)
                    told[name].tokens_per_s.append(sum(tokens for _, tokens in answers) / took_s)
        os.killpg(group, signal.SIGCONT)
    figures.add("chats of each server", arguments.rounds * arguments.chats, "", at_least=400)
    for name, turns in told.items():
        figures.samples(f"time to first token, {name}", turns.ttft_ms, "ms")
        figures.samples(f"throughput, {name}", turns.tokens_per_s, "tokens/s")
    ttfts = zip(told["ours"].ttft_ms, told["stock"].ttft_ms, strict=True)
    figures.samples("time to first token, ours above stock", [a - b for a, b in ttfts], "ms", at_most=1.0)
    rates = zip(told["ours"].tokens_per_s, told["stock"].tokens_per_s, strict=True)
    logs = [math.log(a / b) for a, b in rates]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    figures.add("throughput, ours to stock", math.exp(mean), "×", spread=math.exp(mean) * error * STUDENT_95)
    figures.add("throughput ratio, lower bound of 95 %", math.exp(mean - STUDENT_95 * error), "×", at_least=0.97)


def chat(dice: random.Random, tokens: int) -> dict[str, object]:
    said = " ".join(dice.choices(WORDS, k=40))
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": said}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def round_of(port: int, asks: list[dict[str, object]], at_once: int) -> list[tuple[float, int]]:
    """Of each chat, its time to first token and how many tokens it had."""
    waiting = list(reversed(asks))
    answers = []

    async def client() -> None:
        while waiting:
            answers.append(await one(port, waiting.pop()))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return answers


async def one(port: int, ask: dict[str, object]) -> tuple[float, int]:
    """A connection of its own, read as plainly as can be."""
    body = json.dumps(ask).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.perf_counter()
    writer.write(head.encode() + body)
    ttft_s, tokens = 0.0, 0
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: ") and (text := _text(line)):
            ttft_s = ttft_s or time.perf_counter() - began_s
            tokens += bool(text)
    writer.close()
    assert ttft_s, "an answer without text"
    return ttft_s, int(str(ask["max_tokens"]))


def _text(line: bytes) -> str:
    choices = json.loads(line[6:])["choices"]
    return (choices and choices[0]["delta"].get("content")) or ""


@contextlib.contextmanager
def ours(model: Path, *words: str) -> Iterator[int]:
    command = [sys.executable, "-m", "chimera", "serve", str(model), "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"ready in .*http://[^:]+:(\d+)", line)))
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        process.wait(30)


@contextlib.contextmanager
def stock(model: Path) -> Iterator[tuple[int, int]]:
    """Its port and its process group."""
    port = free_port()
    command = [sys.executable, "-m", "benchmark.micro.cold_server", "--model-path", str(model), "--served-model-name", MODEL]
    command += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--dtype", "float32"]
    command += ["--disable-cuda-graph", "--max-running-requests", "16", "--max-total-tokens", "8192", "--port", str(port)]
    command += ["--log-level", "error", "--sleep-on-idle"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    }
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=sys.stderr)
    try:
        asyncio.run(answers_soon(port, process))
        yield port, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def answers_soon(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + UP_WITHIN_S
    ask = chat(random.Random(0), 2)
    while True:
        try:
            await one(port, ask)
            return
        except (OSError, AssertionError, ValueError, KeyError):
            assert process.poll() is None, "stock SGLang did not start"
            assert time.monotonic() < deadline_s, f"stock SGLang did not answer within {UP_WITHIN_S:g} s"
            await asyncio.sleep(0.5)


def memory(figures: Figures, folder: Path, requests: int) -> None:
    """Between the first tenth and the end, all of ours together may grow by no more than what chance makes of it."""
    with ours(folder / MODEL, "--engine", "simulated") as port:
        sizes = asyncio.run(asked_often(port, requests))
    grown = (sizes[-1] - sizes[0]) / MIB
    figures.add(f"memory after {requests} requests, above that after a tenth", grown, "MiB", at_most=16.0)


async def asked_often(port: int, requests: int) -> list[int]:
    """The resident memory of all our processes after each tenth."""
    dice = random.Random(0)
    sizes = []
    for _ in range(10):
        left = [{**chat(dice, 4), "stream": bool(n % 2)} for n in range(requests // 10)]
        await asyncio.gather(*(persistent(port, left) for _ in range(16)))
        sizes.append(sum(resident_bytes(pid) for pid in descendants(os.getpid())))
    return sizes


async def persistent(port: int, left: list[dict[str, object]]) -> None:
    """One connection for many requests."""
    import aiohttp

    async with aiohttp.ClientSession() as client:
        while left:
            async with client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=left.pop()) as response:
                body = await response.read()
                assert response.status == 200, body


def descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
