"""A worker's connections: one to its agent, one to each front-end whose requests it has. Nothing here waits for a peer."""

from __future__ import annotations

import logging
import os
import select
from pathlib import Path

from chimera.errors import ChimeraError
from chimera.msg.stream import Hello
from chimera.wire.blocking import BlockingChannel
from chimera.wire.codec import Message

log = logging.getLogger(__name__)


class AgentGone(ChimeraError):
    """The agent's connection has ended: nobody is left to work for."""


class Ties:
    def __init__(self, worker: str, agent_socket: Path) -> None:
        self._hello = Hello(role="worker", name=worker, pid=os.getpid())
        self._sockets = agent_socket.parent
        self._agent = BlockingChannel.connect(str(agent_socket))
        self._agent.send(self._hello)
        self._fronts: dict[str, BlockingChannel] = {}
        self._put_back: list[Message] = []

    def put_back(self, messages: list[Message]) -> None:
        """They came together with one that had to be dealt with alone; `receive` brings them again, first."""
        self._put_back = messages

    def receive(self, wait_s: float | None) -> list[Message]:
        """The agent's messages; with none there, waits up to `wait_s`, sending meanwhile what peers had no room for."""
        if self._put_back:
            messages, self._put_back = self._put_back, []
            return messages
        full = [front for front in self._fronts.values() if front.unsent_bytes and not front.closed]
        if full and wait_s != 0:
            self._wait_with(full, wait_s)
            wait_s = 0
        messages = self._agent.receive(wait_s)
        if self._agent.closed and not messages:
            raise AgentGone(str(self._agent.fault or "the agent's connection has ended"))
        return messages

    def tell_agent(self, message: Message) -> None:
        self._agent.send(message)

    def tell_front(self, front: str, message: Message) -> None:
        channel = self._fronts.get(front)
        if channel is None or channel.closed:
            channel = self._connect(front)
            if channel is None:
                return
        channel.send(message)

    def _connect(self, front: str) -> BlockingChannel | None:
        try:
            channel = BlockingChannel.connect(str(self._sockets / f"{front}.sock"))
        except OSError as fault:
            # Its requests are taken back by control, which sees the front-end go as well.
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
