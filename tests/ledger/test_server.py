"""The ledger's loop over real sockets, with real processes that die."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chimera.core.lease import LeaseClass
from chimera.core.replica import Epoch, ReplicaId
from chimera.ledger.book import GpuLedger, Order, Survivors
from chimera.ledger.holder import Holder
from chimera.ledger.node import NodeLedger
from chimera.ledger.server import LedgerServer
from chimera.msg.events import Event, GpuSampled, PagesWanted, WorkerLost
from chimera.msg.stream import Hello, Stop
from chimera.wire.channel import Channel, connect

from tests.ledger.builders import gpu

SOON_S = 5.0


class GiveWhatIsWanted:
    """The arbiter of these tests; it also lets a test await an event."""

    def __init__(self) -> None:
        self.seen: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, node: NodeLedger, event: Event, now: float) -> Iterable[Order]:
        self.seen.put_nowait(event)
        if isinstance(event, PagesWanted):
            life = (event.replica, event.epoch)
            return node[0].allot(life, event.level, now=now, deadline_s=now + 1, reason="it wanted them")
        return []

    async def see(self, kind: type[Event]) -> Event:
        async with asyncio.timeout(SOON_S):
            while True:
                event = await self.seen.get()
                if isinstance(event, kind):
                    return event


@asynccontextmanager
async def serving(path: Path, ledger: GpuLedger) -> AsyncIterator[tuple[LedgerServer, GiveWhatIsWanted]]:
    arbiter = GiveWhatIsWanted()
    server = LedgerServer(NodeLedger([ledger]), arbiter)
    await server.start(path / "ledger.sock")
    try:
        yield server, arbiter
    finally:
        await server.close()


@pytest.fixture
def path() -> Iterable[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        yield Path(folder)


@pytest.fixture
def process() -> Iterable[subprocess.Popen[bytes]]:
    """A process that waits to be killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


async def introduced(path: Path, holder: Holder, pid: int) -> Channel:
    channel = await connect(path / "ledger.sock")
    channel.send(Hello(role="worker", name=holder.worker, pid=pid))
    channel.send(holder.announce(kept={LeaseClass.CONTEXT: 1}))
    return channel


async def obey_next(channel: Channel, holder: Holder) -> Order:
    async with asyncio.timeout(SOON_S):
        order = await anext(channel)
    assert isinstance(order, Order)
    channel.send(holder.obey(order))
    return order


def a_holder(name: str) -> Holder:
    return Holder(ReplicaId(name), Epoch(1, 0), worker=f"w-{name}", gpu_id=0)


async def test_a_holder_gets_its_orders_over_its_own_connection(path: Path) -> None:
    async with serving(path, GpuLedger(gpu(16))):
        a, b = a_holder("a"), a_holder("b")
        to_a, to_b = await introduced(path, a, os.getpid()), await introduced(path, b, os.getpid())
        to_a.send(a.want(5))
        assert (await obey_next(to_a, a)).level == 5
        to_b.send(b.want(20))
        assert (await obey_next(to_b, b)).level == 9
        to_a.send(a.want(0))
        assert (await obey_next(to_a, a)).level == 0
        assert (await obey_next(to_b, b)).level == 14
        to_a.close(), to_b.close()


async def test_a_holder_killed_with_9_has_its_pages_back_within_a_second(path: Path, process: subprocess.Popen[bytes]) -> None:
    async with serving(path, GpuLedger(gpu(16))) as (server, arbiter):
        a = a_holder("a")
        channel = await introduced(path, a, process.pid)
        channel.send(a.want(9))
        await obey_next(channel, a)
        assert server.ledger[0].free == 6
        killed_s = time.monotonic()
        process.send_signal(signal.SIGKILL)
        await arbiter.see(WorkerLost)
        assert server.ledger[0].free == 16
        assert time.monotonic() - killed_s < 1.0
        channel.close()


async def test_a_connection_that_ends_frees_nothing(path: Path) -> None:
    async with serving(path, GpuLedger(gpu(16))) as (server, _):
        a = a_holder("a")
        channel = await introduced(path, a, os.getpid())
        channel.send(a.want(9))
        await obey_next(channel, a)
        channel.close()
        await channel.wait_closed()
        server.feed(GpuSampled(gpu_id=0, strangers_bytes=0))
        assert server.ledger[0].free == 6
        again = await introduced(path, a, os.getpid())
        again.send(a.want(10))
        assert (await obey_next(again, a)).level == 10
        again.close()


async def test_a_process_that_is_gone_before_it_is_watched_holds_nothing(path: Path, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    async with serving(path, GpuLedger(gpu(16))) as (server, arbiter):
        channel = await introduced(path, a_holder("a"), process.pid)
        await arbiter.see(WorkerLost)
        assert server.ledger[0].free == 16
        channel.close()


async def test_a_restarted_ledger_learns_from_its_holders_and_misses_no_death(
    path: Path, process: subprocess.Popen[bytes]
) -> None:
    a = a_holder("a")
    async with serving(path, GpuLedger(gpu(16))):
        channel = await introduced(path, a, os.getpid())
        channel.send(a.want(9))
        await obey_next(channel, a)
        channel.close()
    survivors = Survivors(until_s=time.monotonic() + 60, workers=frozenset({"w-a", "w-b"}))
    ledger = GpuLedger(gpu(16), agent_start=2, survivors=survivors)
    async with serving(path, ledger) as (server, arbiter):
        server.watch("w-b", process.pid)
        channel = await introduced(path, a, os.getpid())
        channel.send(a.want(12))
        await arbiter.see(PagesWanted)
        assert (ledger.learning, ledger.free) == (True, 0)
        process.kill()
        assert (await obey_next(channel, a)).level == 12
        assert not ledger.learning
        channel.close()


async def test_an_unanswered_order_is_repeated_by_the_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chimera.ledger.book.PATIENCE_S", 0.01)
    async with serving(path, GpuLedger(gpu(16))):
        a = a_holder("a")
        channel = await introduced(path, a, os.getpid())
        channel.send(a.want(9))
        async with asyncio.timeout(SOON_S):
            first, second = await anext(channel), await anext(channel)
        assert first == second
        channel.close()


@pytest.mark.parametrize(
    "words", [[Stop()], [Hello(role="cli", name="x", pid=1)], [Hello(role="worker", name="x", pid=1), Stop()]]
)
async def test_a_peer_that_is_no_holder_is_cut_off(path: Path, words: list[Hello | Stop]) -> None:
    async with serving(path, GpuLedger(gpu(16))) as (server, _):
        channel = await connect(path / "ledger.sock")
        for word in words:
            channel.send(word)
        async with asyncio.timeout(SOON_S):
            await channel.wait_closed()
        assert server.ledger[0].free == 16


@pytest.mark.slow
def test_many_processes_on_one_ledger_break_nothing(tmp_path: Path) -> None:
    """The benchmark itself, made small: it exits 1 when an invariant is broken, a page leaks or a death goes unnoticed."""
    script = Path(__file__).parents[2] / "benchmark" / "micro" / "ledger.py"
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(script), "--processes", "4", "--operations", "500", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = {figure["name"]: figure["value"] for figure in json.loads(figures.read_text())["figures"]}
    assert (told["invariants broken"], told["pages leaked"]) == (0, 0)
