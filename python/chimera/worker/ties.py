"""A worker's connections: one to its agent, one to each front-end whose requests it has. Nothing here waits for a peer.

An agent may die and come back while the worker lives on: it is looked for, and told what the worker is, as soon as it
listens again. A front-end that cannot be reached is gone for good, for no two have the same name.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable
from pathlib import Path

from chimera.errors import ChimeraError
from chimera.msg.events import RequestFinished
from chimera.msg.stream import Hello, Standing
from chimera.wire.blocking import BlockingChannel
from chimera.wire.codec import Message

log = logging.getLogger(__name__)


AGENT_AWAITED_S = 10.0
"""How long a worker goes on without an agent."""
_LOOK_EVERY_S = 0.05


class AgentGone(ChimeraError):
    """The agent has gone and no other has come: nobody is left to work for."""


class Ties:
    def __init__(self, worker: str, agent_socket: Path) -> None:
        self.worker = worker
        self._hello = Hello(role="worker", name=worker, pid=os.getpid())
        self._sockets = agent_socket.parent
        self._agent_socket = str(agent_socket)
        self._agent = BlockingChannel.connect(self._agent_socket)
        self._agent.send(self._hello)
        self._alone_since_s: float | None = None
        self._look_at_s = 0.0
        self._untold: list[RequestFinished] = []
        """Ends of requests that no agent has heard of."""
        self._standing: Callable[[], list[Message]] = _empty
        self._kept: Callable[[], list[Message]] = list
        self._fronts: dict[str, BlockingChannel] = {}
        self._put_back: list[Message] = []

    def put_back(self, messages: list[Message]) -> None:
        """They came together with one that had to be dealt with alone; `receive` brings them again, first."""
        self._put_back = messages

    def stand_as(self, standing: Callable[[], list[Message]] | None) -> None:
        """What the next agent is told first; `None`: that the worker is EMPTY."""
        self._standing = standing or _empty

    def keep_as(self, kept: Callable[[], list[Message]]) -> None:
        """What the next agent is told before that: what there is beside it."""
        self._kept = kept

    def receive(self, wait_s: float | None) -> list[Message]:
        """The agent's messages; with none there, waits up to `wait_s`, sending meanwhile what peers had no room for.

        Without an agent it returns sooner, so that what goes on without one goes on.
        """
        if self._put_back:
            messages, self._put_back = self._put_back, []
            return messages
        if self._agent.closed:
            self._look_for_agent(wait_s)
            return []
        full = [front for front in self._fronts.values() if front.unsent_bytes and not front.closed]
        if full and wait_s != 0:
            self._wait_with(full, wait_s)
            wait_s = 0
        return self._agent.receive(wait_s)

    def tell_agent(self, message: Message) -> None:
        self._agent.send(message)
        if self._agent.closed and isinstance(message, RequestFinished):
            self._untold.append(message)

    def tell_front(self, front: str, message: Message) -> bool:
        """Whether the front-end is there at all."""
        channel = self._fronts.get(front)
        if channel is None or channel.closed:
            channel = self._connect(front)
            if channel is None:
                return False
        channel.send(message)
        return True

    def _look_for_agent(self, wait_s: float | None) -> None:
        now = time.monotonic()
        if self._alone_since_s is None:
            log.warning("agent gone reason=%s", self._agent.fault or "its connection has ended")
            self._alone_since_s = now
            self._agent.close()
        elif now - self._alone_since_s > AGENT_AWAITED_S:
            raise AgentGone(f"no agent for {AGENT_AWAITED_S:g} s")
        if now >= self._look_at_s:
            self._look_at_s = now + _LOOK_EVERY_S
            if self._rejoin():
                return
        left_s = self._look_at_s - now
        time.sleep(left_s if wait_s is None else min(wait_s, left_s))

    def _rejoin(self) -> bool:
        try:
            self._agent = BlockingChannel.connect(self._agent_socket)
        except OSError:  # nobody yet
            return False
        self._alone_since_s = None
        untold, self._untold = self._untold, []
        for message in (self._hello, *self._kept(), *self._standing(), *untold):
            self.tell_agent(message)
        return True

    def _connect(self, front: str) -> BlockingChannel | None:
        try:
            channel = BlockingChannel.connect(str(self._sockets / f"{front}.sock"))
        except OSError as fault:
            log.warning("front-end gone front=%s reason=%s", front, fault)
            self._fronts.pop(front, None)
            return None
        channel.send(self._hello)
        self._fronts[front] = channel
        return channel

    def _wait_with(self, full: list[BlockingChannel], wait_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._agent.fileno(), select.POLLIN)
        for front in full:
            poll.register(front.fileno(), select.POLLOUT)
        poll.poll(None if wait_s is None else wait_s * 1000)
        for front in full:
            front.flush()


def _empty() -> list[Message]:
    return [Standing()]
