"""A connection that is made again whenever it ends, because the process at the other side may die and come back.

Owns the trying again, and nothing of what is said: whoever holds the link greets the peer anew in `on_open` and tells it
what it has missed. What is sent while there is no connection is dropped, for the same reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from chimera.wire.address import Address
from chimera.wire.channel import Channel, connect
from chimera.wire.codec import Message

FIRST_RETRY_S = 0.01
LAST_RETRY_S = 0.2
"""A peer that is not there is tried so often; one that takes connections and ends them at once, as well."""

_log = logging.getLogger(__name__)


class Link:
    def __init__(
        self,
        address: Address,
        *,
        on_open: Callable[[], None],
        on_message: Callable[[Message], None],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._address = address
        self._on_open = on_open
        self._on_message = on_message
        self._on_end = on_end
        self._channel: Channel | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self._channel is not None and not self._channel.ended

    def start(self) -> None:
        """Begin trying. Returns at once: a peer that is still starting is the usual case."""
        self._task = asyncio.create_task(self._keep())

    def send(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.send(message)

    async def close(self) -> None:
        """Send what was handed over, end, and try no more."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        if self._channel is not None:
            self._channel.close()
            await self._channel.wait_closed()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = 0.0
        while True:
            channel = await self._connect()
            opened_s = loop.time()
            self._channel = channel
            self._on_open()
            channel.deliver_to(self._on_message)
            await channel.wait_closed()
            self._channel = None
            if channel.fault is not None:
                _log.warning("lost the connection to %s: %s", self._address, channel.fault)
            if self._on_end is not None:
                self._on_end()
            lasted = loop.time() - opened_s > LAST_RETRY_S
            pause_s = 0.0 if lasted else min(max(FIRST_RETRY_S, 2 * pause_s), LAST_RETRY_S)
            await asyncio.sleep(pause_s)

    async def _connect(self) -> Channel:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                return await connect(self._address)
            except OSError:  # nobody listens yet, or not any more
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
