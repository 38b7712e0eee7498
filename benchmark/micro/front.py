"""What the front-end spends on one event of a stream, against the barest aiohttp server of events there can be; and whether
its memory stays flat.

Control, the worker and the clients are played by this process over real sockets; only the front-end's own CPU counts. A
step is one `Tokens` message with a token for every client, and the next waits until all have their event, so no two events
of a client share a write, in neither server. The bare one writes the same constant bytes to every client in one loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.core.model import ModelSpec
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.snapshot import Snapshot
from chimera.msg import stream
from chimera.msg.events import ModelRegistered, Outcome
from chimera.msg.stream import Payload, TokenDelta
from chimera.tiny import vocabulary
from chimera.wire.channel import Channel, connect, serve
from chimera.wire.codec import Message

from benchmark.report import Figures, parser

FRONT = "front-0"
MODEL = "m"
MIB = 1 << 20


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=64, help="streams at a time")
    options.add_argument("--steps", type=int, default=200, help="events of each client in one repetition")
    options.add_argument("--repetitions", type=int, default=15)
    options.add_argument("--requests", type=int, default=100_000, help="for the memory; 0 leaves it out")
    options.add_argument("--bare", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.bare is not None:
        return run(bare_server(arguments.bare, arguments.port))
    return run(measure(arguments))


def run(work: asyncio.coroutines.Coroutine[object, object, int]) -> int:
    import uvloop

    status: int = uvloop.run(work)
    return status


async def measure(arguments: argparse.Namespace) -> int:
    figures = Figures("front-end", seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        stage = Stage(Path(folder), random.Random(arguments.seed))
        await stage.open()
        front_port, bare_port = free_port(), free_port()
        command = [sys.executable, "-m", "chimera.server", "--run-dir", folder, "--name", FRONT, "--log-level", "warning"]
        bare_command = [sys.executable, __file__, "--bare", folder, "--port", str(bare_port)]
        with started([*command, "--port", str(front_port)]) as front, started(bare_command) as bare:
            await stage.meet(bare_port)
            front_us, bare_us, ratios = [], [], []
            for _ in range(arguments.repetitions):  # in turns: what else the machine does hits both
                bare_us.append(await bare_round(stage, bare.pid, bare_port, arguments.clients, arguments.steps))
                front_us.append(await front_round(stage, front.pid, front_port, arguments.clients, arguments.steps))
                ratios.append(front_us[-1] / bare_us[-1])
            figures.samples("bare aiohttp, CPU per event", bare_us, "µs")
            figures.samples("front-end, CPU per event", front_us, "µs")
            figures.samples("front-end to bare", ratios, "×", at_most=1.5)
            if arguments.requests:
                await memory(figures, stage, front.pid, front_port, arguments.requests)
        await stage.close()
    return figures.finish(arguments.json)


async def bare_round(stage: Stage, pid: int, port: int, clients: int, steps: int) -> float:
    """Microseconds of CPU per event."""
    readers = [await Client.open(port, b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(clients)]
    await all_have(readers, 1)
    before = cpu_s(pid)
    for step in range(steps):
        await stage.step_bare()
        await all_have(readers, step + 2)
    spent = cpu_s(pid) - before
    for reader in readers:
        reader.close()
    await stage.end_bare()
    return spent / (steps * clients) * 1e6


async def front_round(stage: Stage, pid: int, port: int, clients: int, steps: int) -> float:
    """Microseconds of CPU per event, from a token in a message to the bytes of its event."""
    stage.answers_at_once = False
    readers = [await Client.open(port, post(stream=True, max_tokens=steps + 2)) for _ in range(clients)]
    requests = [(await stage.asked.get()).request.request_id for _ in range(clients)]
    stage.step(requests)
    await all_have(readers, 2)  # the role comes before the first text
    before = cpu_s(pid)
    for step in range(steps):
        stage.step(requests)
        await all_have(readers, step + 3)
    spent = cpu_s(pid) - before
    stage.step(requests, Outcome.LENGTH)
    await all_have(readers, steps + 4)
    for reader in readers:
        reader.close()
    return spent / (steps * clients) * 1e6


async def memory(figures: Figures, stage: Stage, pid: int, port: int, requests: int) -> None:
    """Short requests, streamed and whole in turns; the first tenth fills what is filled once."""
    stage.answers_at_once = True
    warm = max(1, requests // 10)
    await many_requests(port, warm)
    before, began = resident_bytes(pid), time.perf_counter()
    spent = cpu_s(pid)
    await many_requests(port, requests - warm)
    grown = resident_bytes(pid) - before
    figures.add("front-end, resident after a tenth of the requests", before / MIB, "MiB")
    figures.add(f"growth over {requests - warm} more requests", grown / MIB, "MiB", at_most=2)
    figures.add("CPU per request of 8 tokens", (cpu_s(pid) - spent) / (requests - warm) * 1e6, "µs")
    figures.add("requests per second", (requests - warm) / (time.perf_counter() - began), "1/s")


async def many_requests(port: int, requests: int, at_a_time: int = 32) -> None:
    left = iter(range(requests))

    async def one_after_another() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in left:
            streamed = number % 2 == 0
            writer.write(post(stream=streamed, max_tokens=8))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            if streamed:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            else:
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
        writer.close()

    await asyncio.gather(*(one_after_another() for _ in range(at_a_time)))


class Client(asyncio.Protocol):
    """Counts the events it is sent, and nothing else."""

    def __init__(self) -> None:
        self.events = 0
        self.news = asyncio.Event()
        self._last = b""
        self._transport: asyncio.BaseTransport | None = None

    @classmethod
    async def open(cls, port: int, request: bytes) -> Client:
        transport, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        transport.write(request)
        client._transport = transport
        return client

    def data_received(self, data: bytes) -> None:
        self.events += (self._last + data).count(b"\n\n")
        self._last = data[-1:] if not data.endswith(b"\n\n") else b""
        self.news.set()

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


async def all_have(clients: list[Client], events: int) -> None:
    for client in clients:
        while client.events < events:
            client.news.clear()
            await client.news.wait()


class Stage:
    """Control and one worker, and the signal that makes the bare server take a step."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.asked: asyncio.Queue[stream.Enqueue] = asyncio.Queue()
        self.answers_at_once = False
        self._greeted = asyncio.Event()
        self._folder = folder
        self._dice = dice
        self._tokenizer = vocabulary.train("english", 1024, seed=0)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(vocabulary.CHAT_TEMPLATE)
        unspoken = set(vocabulary.unspoken(self._tokenizer))
        self._words = [t for t in range(5, 1024) if t not in unspoken]
        self._worker: Channel | None = None
        self._bare: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        self._server = await serve(self._folder / "control.sock", self._front_came)

    async def meet(self, bare_port: int) -> None:
        """Both servers have come up."""
        self._worker = await patiently(connect, self._folder / f"{FRONT}.sock")
        self._bare = await patiently(asyncio.open_unix_connection, str(self._folder / "bare.sock"))
        await self._greeted.wait()

    async def close(self) -> None:
        assert self._worker is not None and self._bare is not None
        self._worker.close()
        self._bare[1].close()
        await self._server.close()

    def step(self, requests: list[str], outcome: Outcome | None = None) -> None:
        """One token for each, in one message, as an engine's step makes them."""
        assert self._worker is not None
        words = self._dice.choices(self._words, k=len(requests))
        deltas = [TokenDelta(request, [word], outcome) for request, word in zip(requests, words, strict=True)]
        self._worker.send(stream.Tokens(replica=ReplicaId(MODEL), epoch=Epoch(1, 1), deltas=deltas))

    async def step_bare(self) -> None:
        assert self._bare is not None
        self._bare[1].write(b"s")

    async def end_bare(self) -> None:
        assert self._bare is not None
        self._bare[1].write(b"e")
        await self._bare[0].readexactly(1)

    def _front_came(self, channel: Channel) -> None:
        channel.deliver_to(lambda message: self._hear(channel, message))

    def _hear(self, channel: Channel, message: Message) -> None:
        match message:
            case stream.Hello():
                channel.send(ModelRegistered(model=self._model()))
            case stream.SnapshotWanted():
                channel.send(stream.SnapshotTaken(snapshot=Snapshot(now_s=0.0, policy="static", models=(self._model(),))))
                self._greeted.set()
            case stream.Enqueue() if self.answers_at_once:
                payload = msgspec.msgpack.decode(message.payload, type=Payload)
                for left in range(payload.sampling.max_new_tokens, 0, -1):
                    self.step([message.request.request_id], None if left > 1 else Outcome.LENGTH)
            case stream.Enqueue():
                self.asked.put_nowait(message)

    def _model(self) -> ModelSpec:
        return ModelSpec(
            name=MODEL,
            path=str(self._folder),
            tokenizer_path=str(self._folder),
            architecture="LlamaForCausalLM",
            weight_bytes=1,
            kv_bytes_per_token=1,
            context_length=1 << 20,
        )


async def bare_server(folder: Path, port: int) -> int:
    """The least that sends events: no message, no tokens, no JSON, no task that wakes for a client."""
    streams: list[web.StreamResponse] = []
    ended = asyncio.Event()
    text = {"delta": {"content": " word"}, "logprobs": None, "index": 0, "finish_reason": None}
    chunk = {
        "id": "chatcmpl-" + 32 * "0",
        "object": "chat.completion.chunk",
        "created": 10**9,
        "model": MODEL,
        "choices": [text],
    }
    event = b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event)
        streams.append(response)
        await ended.wait()
        return response

    async def steps(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended
        while signal := await reader.read(1):
            if signal == b"s":
                for response in streams:
                    await response.write(event)
            else:
                streams.clear()
                ended.set()
                ended = asyncio.Event()
                writer.write(b"e")

    app = web.Application()
    app.router.add_get("/events", events)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    server = await asyncio.start_unix_server(steps, str(folder / "bare.sock"))
    await server.serve_forever()
    return 0


async def patiently(opening, *arguments):  # type: ignore[no-untyped-def]
    """A server takes a moment to come up."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return await opening(*arguments)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def post(*, stream: bool, max_tokens: int) -> bytes:
    body = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream, "max_tokens": max_tokens}
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_s(pid: int) -> float:
    """What all threads of the process have spent, to the nanosecond."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
