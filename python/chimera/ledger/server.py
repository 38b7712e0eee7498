"""A loop around a node's ledger: holders come in over sockets, orders go out to them, and the dead are noticed at once.

Owns the connections, the vigil over each holder's process and the one timer. An `Arbiter` decides who gets what; this only
carries. An agent, which has a loop of its own, embeds the `NodeLedger` there instead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from chimera.errors import ProtocolError
from chimera.ledger.book import Life, Order
from chimera.ledger.node import NodeLedger
from chimera.msg.events import Event, PagesHeld, Woke, WorkerLost
from chimera.msg.stream import Hello
from chimera.wire.address import Address
from chimera.wire.channel import Channel, Server, serve
from chimera.wire.codec import Message
from chimera.wire.vigil import Vigil

_log = logging.getLogger(__name__)

Arbiter = Callable[[NodeLedger, Event, float], Iterable[Order]]
"""Asked after every event: what to allot now that it has happened."""


class LedgerServer:
    def __init__(self, ledger: NodeLedger, arbiter: Arbiter) -> None:
        self.ledger = ledger
        self._arbiter = arbiter
        self._listener: Server | None = None
        self._channels: dict[Life, Channel] = {}
        self._vigils: dict[str, Vigil] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, address: Address) -> None:
        self._listener = await serve(address, self._welcome)
        self._set_timer()

    async def close(self) -> None:
        """Holders live on; a later server learns from them what they have."""
        if self._timer is not None:
            self._timer.cancel()
        for vigil in self._vigils.values():
            vigil.close()
        if self._listener is not None:
            await self._listener.close()

    def watch(self, worker: str, pid: int) -> None:
        """Only the end of the process, not of its connection, frees what it has. Survivors are watched before they speak."""
        if worker in self._vigils:
            return
        try:
            self._vigils[worker] = Vigil(pid, partial(self._lost, worker))
        except ProcessLookupError:
            self._lost(worker)

    def feed(self, event: Event) -> None:
        """The one door: everything that happens comes through here, one event at a time."""
        now = time.monotonic()
        self._send(self.ledger.on(event, now))
        self._send(self._arbiter(self.ledger, event, now))
        self._set_timer()

    def _welcome(self, channel: Channel) -> None:
        channel.deliver_to(partial(self._first_words, channel))

    def _first_words(self, channel: Channel, message: Message) -> None:
        if not isinstance(message, Hello) or message.role != "worker":
            raise ProtocolError(f"a holder's first word is Hello, not {type(message).__name__}")
        channel.deliver_to(partial(self._hear, channel), partial(self._forget, channel))
        self.watch(message.name, message.pid)

    def _hear(self, channel: Channel, message: Message) -> None:
        if isinstance(message, PagesHeld) and message.replica is not None and message.epoch is not None:
            self._channels[message.replica, message.epoch] = channel
        if not isinstance(message, Event):
            raise ProtocolError(f"a holder sends events, not {type(message).__name__}")
        self.feed(message)

    def _forget(self, channel: Channel, _: ProtocolError | None) -> None:
        self._channels = {life: other for life, other in self._channels.items() if other is not channel}

    def _lost(self, worker: str) -> None:
        self._vigils.pop(worker, None)
        self.feed(WorkerLost(worker=worker, reason="its process has exited"))

    def _send(self, orders: Iterable[Order]) -> None:
        for order in orders:
            channel = self._channels.get((order.replica, order.epoch))
            if channel is not None:
                channel.send(order)
            _log.debug(
                "%s replica=%s revision=%d pages=%d reason=%r",
                type(order).__name__.lower(),
                order.replica,
                order.revision,
                order.level,
                order.reason,
            )

    def _set_timer(self) -> None:
        due_s = self.ledger.next_wake_s
        if self._timer is not None:
            if self._timer.when() == due_s:
                return
            self._timer.cancel()
        self._timer = None if due_s is None else asyncio.get_running_loop().call_at(due_s, self.feed, Woke())
