"""Links come back after their peer has died; vigils see a process go."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from chimera.msg.stream import Hello
from chimera.wire.channel import Channel, Server, serve
from chimera.wire.codec import Message
from chimera.wire.link import Link
from chimera.wire.vigil import Vigil


def hello(name: str) -> Hello:
    return Hello(role="cli", name=name, pid=1)


def process(source: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", source])


SLEEPER = "import signal; signal.pause()"


class Peer:
    """Listens at `path`; may go away and come back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.got: asyncio.Queue[Message] = asyncio.Queue()
        self.channel: Channel | None = None
        self.server: Server | None = None

    async def come(self) -> None:
        self.server = await serve(self.path, self._take)

    async def go(self) -> None:
        assert self.server is not None
        await self.server.close()

    def _take(self, channel: Channel) -> None:
        self.channel = channel
        channel.deliver_to(self.got.put_nowait)

    async def next(self) -> Message:
        return await asyncio.wait_for(self.got.get(), 5)


async def test_a_link_waits_for_its_peer_and_greets_it_after_every_return(tmp_path: Path) -> None:
    peer = Peer(tmp_path / "peer.sock")
    ends: asyncio.Queue[None] = asyncio.Queue()
    answers: asyncio.Queue[Message] = asyncio.Queue()
    link = Link(
        peer.path,
        on_open=lambda: link.send(hello("greeting")),
        on_message=answers.put_nowait,
        on_end=lambda: ends.put_nowait(None),
    )
    link.start()
    link.send(hello("nobody hears this"))
    await peer.come()
    assert await peer.next() == hello("greeting")
    assert link.up
    assert peer.channel is not None
    peer.channel.send(hello("answer"))
    assert await asyncio.wait_for(answers.get(), 5) == hello("answer")

    await peer.go()
    await asyncio.wait_for(ends.get(), 5)
    assert not link.up
    await peer.come()
    assert await peer.next() == hello("greeting")

    link.send(hello("last words"))
    await link.close()
    assert await peer.next() == hello("last words")
    await peer.go()


async def test_a_peer_that_ends_every_connection_at_once_is_not_besieged(tmp_path: Path) -> None:
    calls: asyncio.Queue[float] = asyncio.Queue()

    def send_away(channel: Channel) -> None:
        calls.put_nowait(asyncio.get_running_loop().time())
        channel.close()

    server = await serve(tmp_path / "peer.sock", send_away)
    link = Link(tmp_path / "peer.sock", on_open=lambda: None, on_message=lambda _: None)
    link.start()
    async with asyncio.timeout(5):
        came = [await calls.get() for _ in range(6)]
    await link.close()
    await server.close()
    pauses = [after - before for before, after in pairwise(came)]
    assert pauses[-1] > 0.1, pauses


async def test_a_vigil_sees_a_killed_process_go() -> None:
    sleeper = process(SLEEPER)
    gone = asyncio.Event()
    vigil = Vigil(sleeper.pid, gone.set)
    assert not vigil.over
    vigil.signal(signal.SIGKILL)
    await asyncio.wait_for(gone.wait(), 5)
    assert vigil.over
    vigil.signal(signal.SIGKILL)  # nobody is hit
    assert sleeper.wait() == -signal.SIGKILL


async def test_a_vigil_over_a_process_that_is_gone_says_so() -> None:
    gone = process("")
    gone.wait()
    with pytest.raises(ProcessLookupError):
        Vigil(gone.pid, lambda: None)


async def test_a_vigil_that_looks_away_says_nothing() -> None:
    sleeper = process(SLEEPER)
    calls: list[None] = []
    vigil, witness_done = Vigil(sleeper.pid, lambda: calls.append(None)), asyncio.Event()
    Vigil(sleeper.pid, witness_done.set)
    vigil.close()
    sleeper.kill()
    await asyncio.wait_for(witness_done.wait(), 5)
    sleeper.wait()
    assert calls == []
