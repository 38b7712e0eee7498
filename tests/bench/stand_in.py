"""A server of streamed answers for tests: says what it is told to, in the pieces it is told to, and can die."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Reply = Callable[["Asked"], Awaitable[None]]


@dataclass
class Asked:
    """One request, and the way to answer it."""

    method: str
    path: str
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def events(self, *events: object, done: bool = True) -> None:
        told = [b"data: " + (e.encode() if isinstance(e, str) else json.dumps(e).encode()) + b"\n\n" for e in events]
        await self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in [*told, *([b"data: [DONE]\n\n"] if done else [])]:
            await self.raw(chunk(event))
        await self.raw(b"0\r\n\r\n")

    async def json(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.raw(head.encode() + body)

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


async def answer(asked: Asked) -> None:
    """As many tokens as were wanted, at once; and the list of models."""
    if asked.path == "/v1/models":
        await asked.json(200, {"data": [{"id": "m", "max_model_len": 100}, {"id": "n"}]})
    elif asked.method == "GET":
        await asked.json(404, {"error": {"code": "not_found", "message": "nothing there"}})
    else:
        wanted = asked.body["max_tokens"]
        await asked.events(*[piece("x")] * wanted, usage(len(asked.body["prompt"].split()), wanted))


@dataclass
class StandIn:
    reply: Reply = answer
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> StandIn:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *fault: object) -> None:
        self.die()
        assert self._server is not None
        await self._server.wait_closed()

    def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                asked = Asked(method, path, body, writer)
                self.asked.append(asked)
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    await self.reply(asked)
                finally:
                    self.open -= 1
        self._writers.discard(writer)
        writer.close()
