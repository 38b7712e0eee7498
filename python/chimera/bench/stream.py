"""HTTP/1.1 as far as streamed answers need it: connections that are used again, chunks, server-sent events.

A client that is to send a thousand requests a second on one core beside the server it measures has some hundred
microseconds for each; an HTTP library takes more. So this parses what it must and copies nothing twice.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

from chimera.errors import ConfigError

_AT_ONCE = 64
"""Connections that are opened together: a server's backlog is about twice that."""

Hear = Callable[[bytes], bool]
"""Takes the data of one event; true when no more is wanted."""


class Call:
    """One request under way. Its owner is told of events as they come, and once of the end."""

    __slots__ = ("body", "connection", "done", "fresh", "hear", "message", "status", "written")

    def __init__(self, message: bytes, written: Callable[[], None], hear: Hear, done: Callable[[Call, str], None]) -> None:
        self.message = message
        self.written = written
        """Its bytes are given to the kernel, or a connection for them is asked for: a client waits from here on."""
        self.hear = hear
        self.done = done
        """With an empty text when the answer came whole; else with what went wrong."""
        self.status = 0
        self.body = b""
        """Of an answer that is no stream of events."""
        self.fresh = False
        """Whether its connection was opened for it."""
        self.connection: Connection | None = None

    def give_up(self, why: str) -> None:
        """Its connection is closed, and with it the request at the server."""
        if self.connection is not None:
            self.connection.abandon()
        self.done(self, why)


class Target:
    """One server, and the connections to it."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError.single("--url", f"{url!r} is not a server's address", hint="like http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": parts.netloc, **(headers or {})}.items())
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()

    def message(self, path: str, body: bytes, method: str = "POST") -> bytes:
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{kind}\r\n".encode() + body

    def send(self, call: Call) -> None:
        """At once when a connection is idle; else as soon as a new one is open."""
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                call.fresh = False
                connection.begin(call)
                call.written()
                return
        call.fresh = True
        call.written()
        task = asyncio.create_task(self._open_for(call))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def warm(self, connections: int) -> None:
        """So many connections stand ready. OSError when the server is not there."""
        while connections > 0:
            some = min(connections, _AT_ONCE)
            self._idle += await asyncio.gather(*(self._connect() for _ in range(some)))
            connections -= some

    async def is_there(self) -> bool:
        try:
            connection = await self._connect()
        except OSError:
            return False
        self._idle.append(connection)
        return True

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        for task in self._opening:
            task.cancel()

    def take_back(self, connection: Connection) -> None:
        self._idle.append(connection)

    async def _open_for(self, call: Call) -> None:
        try:
            connection = await self._connect()
        except OSError as fault:
            call.done(call, f"unreachable: {fault.strerror or fault}")
            return
        connection.begin(call)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self), self.host, self.port, ssl=self._ssl)
        return connection


class Connection(asyncio.Protocol):
    """One answer at a time: a head, then a body in chunks, of a known length, or to the end of the connection."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._buffer = b""
        self._in_head = True
        self._chunked = False
        self._events = False
        self._keep = True
        self._left = 0
        """Bytes of the body, or of the present chunk, that have not come; -1: until the connection ends."""
        self._gap = 0
        self._text = b""
        self._heard_enough = False

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, call: Call) -> None:
        assert self._transport is not None
        self._call = call
        self._buffer = self._text = b""
        self._in_head, self._heard_enough = True, False
        self._left = self._gap = 0
        call.connection = self
        self._transport.write(call.message)

    def abandon(self) -> None:
        self._call = None
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def connection_lost(self, fault: Exception | None) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        if not self._in_head and not self._chunked and self._left < 0:
            call.done(call, "")
        elif self._in_head and not self._buffer and not call.fresh:
            self._target.send(call)  # it was closed while idle; the server has not seen the request
        else:
            call.done(call, f"broken: {fault or 'the server closed the connection'}")

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if self._in_head and not self._read_head():
            return
        if self._call is None:
            return
        if self._chunked:
            self._read_chunks()
        else:
            self._read_plain()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._buffer[:end].lower()
        self._buffer = self._buffer[end + 4 :]
        assert self._call is not None
        try:
            self._call.status = int(head.split(b" ", 2)[1][:3])
            self._chunked = b"\r\ntransfer-encoding: chunked" in head
            length = head.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0]
            self._left = 0 if self._chunked else int(length) if length else -1
        except (IndexError, ValueError):
            self._fail("broken: it does not speak HTTP")
            return False
        self._events = b"\r\ncontent-type: text/event-stream" in head
        self._keep = b"\r\nconnection: close" not in head and self._left >= 0
        self._in_head = False
        return True

    def _read_plain(self) -> None:
        taken = self._buffer if self._left < 0 else self._buffer[: self._left]
        if self._left >= 0:
            self._left -= len(taken)
        self._buffer = b""
        self._take(taken)
        if self._left == 0:
            self._finish()

    def _read_chunks(self) -> None:
        buffer, at = self._buffer, 0
        while self._call is not None:
            if self._left:
                taken = buffer[at : at + self._left]
                at += len(taken)
                self._left -= len(taken)
                if taken:
                    self._take(taken)
                if self._left:
                    break
                self._gap = 2  # the line's end behind a chunk's data
                continue
            if self._gap:
                skipped = min(self._gap, len(buffer) - at)
                at += skipped
                self._gap -= skipped
                if self._gap:
                    break
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            try:
                self._left = int(buffer[at:end].split(b";", 1)[0], 16)
            except ValueError:
                self._fail("broken: its chunks have no length")
                return
            if not self._left:
                if len(buffer) < end + 4:
                    break
                self._buffer = b""
                self._finish()
                return
            at = end + 2
        self._buffer = buffer[at:]

    def _take(self, data: bytes) -> None:
        call = self._call
        assert call is not None
        if not self._events:
            call.body += data
            return
        text = self._text + data if self._text else data
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        at = 0
        while (end := text.find(b"\n\n", at)) >= 0:
            for line in text[at:end].split(b"\n"):
                if line.startswith(b"data:") and not self._heard_enough:
                    self._heard_enough = call.hear(line[5:].strip())
            at = end + 2
        self._text = text[at:]

    def _finish(self) -> None:
        call, self._call = self._call, None
        if self._keep and self.alive:
            self._target.take_back(self)
        else:
            self.close()
        if call is not None:
            call.done(call, "")

    def _fail(self, why: str) -> None:
        call, self._call = self._call, None
        self.close()
        if call is not None:
            call.done(call, why)
