"""One connection between two of our processes, for those that live in an event loop.

Owns the socket, the frames on it and the bound on what a peer may leave unread. Knows no meaning of any message. Two ways
to read: `async for message in channel`, or `channel.deliver_to(on_message, on_end)`, which spends no task and no queue on
a message and is meant for the busy paths. A channel ends once: with the peer's end of file, with `close()`, or with a
fault, a `ProtocolError` that is raised to (or handed to) whoever reads. What is sent after the end is dropped: the end
itself is the news.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

from chimera.errors import ProtocolError
from chimera.wire.address import MAX_UNSENT_BYTES, Address
from chimera.wire.codec import FrameReader, Message, encode

_PAUSE_AT_MESSAGES = 4096
"""How many decoded messages may wait for an iterating reader before the socket is left alone."""
_LAST_WORDS_S = 1.0
"""How long a closing server lets its channels flush and its handlers finish."""

_log = logging.getLogger(__name__)


class Channel(asyncio.Protocol):
    """Made by `connect` and `serve`, never by hand."""

    def __init__(self, on_open: Callable[[Channel], None] | None = None) -> None:
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._arrived: deque[Message] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._paused = False
        self._on_message: Callable[[Message], None] | None = None
        self._on_end: Callable[[ProtocolError | None], None] | None = None
        self._fault: ProtocolError | None = None
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Nothing sent from now on reaches the peer."""
        return self._transport is None or self._transport.is_closing()

    @property
    def fault(self) -> ProtocolError | None:
        """What broke the contract, if that is how the channel ended."""
        return self._fault

    @property
    def unsent_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, message: Message) -> None:
        """Hand the message to the socket, now or as soon as the peer reads; never waits."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(encode(message))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._break(ProtocolError(f"the peer leaves more than {MAX_UNSENT_BYTES} bytes unread; it is cut off"))

    def deliver_to(
        self, on_message: Callable[[Message], None], on_end: Callable[[ProtocolError | None], None] | None = None
    ) -> None:
        """From now on every message is a call of `on_message`, and the end one call of `on_end`."""
        self._on_message, self._on_end = on_message, on_end
        while self._arrived:
            on_message(self._arrived.popleft())
        self._let_flow()
        if self._ended.is_set() and on_end is not None:
            on_end(self._fault)

    def close(self) -> None:
        """Send what was handed over, then end. Returns at once; `wait_closed` waits."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End now; what the socket has not taken is lost."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        await self._ended.wait()

    def __aiter__(self) -> Channel:
        return self

    async def __anext__(self) -> Message:
        while not self._arrived:
            if self._ended.is_set():
                if self._fault is not None:
                    raise self._fault
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        message = self._arrived.popleft()
        if self._paused and len(self._arrived) < _PAUSE_AT_MESSAGES // 2:
            self._let_flow()
        return message

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports are asyncio's in all but their class.
        self._transport = cast(asyncio.Transport, transport)
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                if self._on_message is not None:
                    self._on_message(message)
                else:
                    self._arrived.append(message)
        except ProtocolError as fault:
            self._break(fault)
        if self._arrived:
            self._rouse()
            if len(self._arrived) > _PAUSE_AT_MESSAGES and not self._paused and not self.ended:
                self._paused = True
                assert self._transport is not None
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, cause: Exception | None) -> None:
        self._transport = None
        if self._fault is None and cause is None:
            try:
                self._reader.close()
            except ProtocolError as fault:
                self._fault = fault
        self._ended.set()
        self._rouse()
        if self._on_end is not None:
            self._on_end(self._fault)

    def _break(self, fault: ProtocolError) -> None:
        self._fault = fault
        self.abort()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _let_flow(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()


class Server:
    """A listening socket and the channels that came in through it."""

    def __init__(self, address: Address, handler: Handler) -> None:
        self._address = address
        self._handler = handler
        self._listener: asyncio.Server | None = None
        self._channels: set[Channel] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> Address:
        """Where it listens; with the port that the system chose, if port 0 was asked for."""
        if isinstance(self._address, tuple) and self._listener is not None:
            host, port = self._listener.sockets[0].getsockname()[:2]
            return host, port
        return self._address

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(self._address, tuple):
            self._listener = await loop.create_server(self._channel, *self._address)
            return
        path = os.fspath(self._address)
        with contextlib.suppress(FileNotFoundError):  # a dead process leaves its socket file behind
            os.unlink(path)
        self._listener = await loop.create_unix_server(self._channel, path)

    async def close(self) -> None:
        """Take no more connections and end those there are."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        for channel in self._channels:
            channel.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LAST_WORDS_S)
        for channel in self._channels:
            channel.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not isinstance(self._address, tuple):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address)

    def _channel(self) -> Channel:
        return Channel(self._open)

    def _open(self, channel: Channel) -> None:
        if self._listener is None:  # it was on its way in when we closed
            channel.abort()
            return
        self._channels.add(channel)
        answer = self._handler(channel)
        task = asyncio.ensure_future(self._attend(channel, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attend(self, channel: Channel, answer: Awaitable[None] | None) -> None:
        """A handler that is a coroutine owns the channel while it runs; a plain one owns it until it ends."""
        try:
            if answer is not None:
                await answer
                channel.close()
            await channel.wait_closed()
        except ProtocolError:
            channel.close()
        finally:
            self._channels.discard(channel)
            if channel.fault is not None:
                _log.warning("dropped a connection to %s: %s", self._address, channel.fault)


Handler = Callable[[Channel], Awaitable[None] | None]


async def connect(address: Address) -> Channel:
    """A channel to a listening peer. Raises OSError when nobody listens there."""
    loop = asyncio.get_running_loop()
    if isinstance(address, tuple):
        _, channel = await loop.create_connection(Channel, *address)
    else:
        _, channel = await loop.create_unix_connection(Channel, os.fspath(address))
    return channel


async def serve(address: Address, handler: Handler) -> Server:
    """Listen. `handler(channel)` is called for every connection: a coroutine function reads until it returns, which ends
    the channel; a plain function sets `deliver_to` and returns."""
    server = Server(address, handler)
    await server.start()
    return server
