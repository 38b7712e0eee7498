"""Those who wait for an answer: an event stream that is written as text comes, or a body that is sent whole.

An event stream is written straight to the client's transport, one write for each piece of news, because at one event per
token anything between the two would cost more than the event. Knows no dialect: the bytes of an event come from one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from aiohttp import HttpVersion11, web

from chimera.errors import RequestError
from chimera.msg.stream import StandingTold
from chimera.server.answer import Answer

_MAX_UNREAD_BYTES = 4 << 20
"""What a client may leave unread before it is taken for gone: some twenty thousand tokens."""
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Dialect(Protocol):
    """How one API says things."""

    def piece(self, text: str, answer: Answer) -> bytes:
        """An event with new text."""

    def close(self, text: str, answer: Answer) -> bytes:
        """The last events of one answer: its last text, which may be empty, and how it ended."""

    def done(self, answers: Sequence[Answer]) -> bytes:
        """What a stream says when all its answers have ended."""

    def failure(self, error: RequestError) -> bytes:
        """The event that ends a stream before its answers have."""

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """The body of answers that are not streamed."""


class EventStream:
    """Server-sent events. The headers wait for the first of them, so that a request that fails before has its status."""

    __slots__ = ("_begun", "_chunked", "_closed", "_dialect", "_early", "_ended", "_expected", "_standing", "_transport")

    def __init__(self, dialect: Dialect, expected: int = 1) -> None:
        loop = asyncio.get_running_loop()
        self._dialect = dialect
        self._expected = expected
        self._closed: list[Answer] = []
        self._standing: dict[str, str] = {}
        self._transport: asyncio.WriteTransport | None = None
        self._chunked = False
        self._early = bytearray()
        self._begun: asyncio.Future[None] = loop.create_future()
        """Done when there is something to send; raises when the request failed before."""
        self._ended: asyncio.Future[None] = loop.create_future()

    async def respond(self, http: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
        """The whole response, from the first text to the last."""
        await self._begun
        response = web.StreamResponse(headers={**STREAM_HEADERS, **headers, **self._standing})
        self._chunked = http.version >= HttpVersion11
        if self._chunked:
            response.enable_chunked_encoding()
        await response.prepare(http)
        self._transport = http.transport
        self._write(bytes(self._early))
        await self._ended
        await response.write_eof()  # with chunks, the empty one that ends the body
        return response

    def waiting(self, told: StandingTold) -> None:
        """A comment, which no client takes for news; the headers go out with the first, and say it too."""
        if not self._begun.done():
            self._standing = {"x-queue-position": str(told.position), "x-estimated-wait": f"{told.wait_s:.3f}"}
        if not self._ended.done():
            place = "next" if told.position == 1 else f"{told.position - 1} before this request"
            self._write(f": {told.why}; {place}; about {told.wait_s:.1f} s\n\n".encode())

    def text(self, text: str, answer: Answer) -> None:
        if not self._ended.done():  # else one answer has failed, and the connection may be another request's by now
            self._write(self._dialect.piece(text, answer))

    def end(self, text: str, answer: Answer) -> None:
        if self._ended.done():
            return
        self._closed.append(answer)
        last = self._dialect.close(text, answer)
        if len(self._closed) < self._expected:
            self._write(last)
        else:
            self._write(last + self._dialect.done(self._closed))
            _settle(self._ended)

    def fail(self, error: RequestError) -> None:
        """One failed answer ends them all."""
        if not self._begun.done():
            self._begun.set_exception(error)
            self._ended.cancel()
        elif not self._ended.done():
            self._write(self._dialect.failure(error))
            _settle(self._ended)

    def _write(self, events: bytes) -> None:
        if not events:  # text that is held back until it is known what it is; an empty chunk would end the body
            return
        transport = self._transport
        if transport is None:
            self._early += events
            _settle(self._begun)
        elif not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events)
            if transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
                transport.abort()


class WholeBody:
    """The answers in one piece."""

    def __init__(self, dialect: Dialect, expected: int = 1) -> None:
        self._dialect = dialect
        self._pieces: list[list[str]] = [[] for _ in range(expected)]
        self._closed: list[Answer] = []
        self._body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def respond(self, http: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
        return web.Response(body=await self._body, content_type="application/json", headers=headers)

    def text(self, text: str, answer: Answer) -> None:
        self._pieces[answer.index].append(text)

    def end(self, text: str, answer: Answer) -> None:
        self._pieces[answer.index].append(text)
        self._closed.append(answer)
        if len(self._closed) == len(self._pieces) and not self._body.done():
            answers = sorted(self._closed, key=lambda one: one.index)
            self._body.set_result(self._dialect.whole(["".join(pieces) for pieces in self._pieces], answers))

    def waiting(self, told: StandingTold) -> None:
        """A body has no place for it."""

    def fail(self, error: RequestError) -> None:
        if not self._body.done():
            self._body.set_exception(error)


class FirstToken:
    """Only wants to know that an engine answers."""

    def __init__(self) -> None:
        self.came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def text(self, text: str, answer: Answer) -> None:
        _settle(self.came)

    def end(self, text: str, answer: Answer) -> None:
        _settle(self.came)

    def waiting(self, told: StandingTold) -> None:
        """Nobody is shown it."""

    def fail(self, error: RequestError) -> None:
        if not self.came.done():
            self.came.set_exception(error)


def _settle(future: asyncio.Future[None]) -> None:
    """A future is done already when there is more news, or cancelled when its client has left."""
    if not future.done():
        future.set_result(None)
