"""The worker pool alone, with a real parent: who becomes what, who is kept ready, and who does chores meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from chimera.agent.gang import Worker
from chimera.agent.pool import WorkerPool
from chimera.core.replica import Epoch
from chimera.msg import events, stream
from chimera.msg.actions import Activate
from chimera.wire.codec import Message

from tests.agent.rig import model, on_gpu, parent

PATIENCE_S = 10.0
M = TypeVar("M")


@pytest.fixture(scope="module")
def parent_socket() -> Iterator[Path]:
    with parent() as socket:
        yield socket


class Desk:
    """A pool, and what it hears."""

    def __init__(self, folder: Path, parent_socket: Path, spare: int) -> None:
        self.said: asyncio.Queue[tuple[Worker, Message]] = asyncio.Queue()
        self.lost: asyncio.Queue[Worker] = asyncio.Queue()
        self._epochs = itertools.count(1)
        self.socket = folder / "agent-t.sock"
        self.pool = WorkerPool(
            prefix="t",
            socket=self.socket,
            parent_socket=parent_socket,
            on_message=lambda worker, message: self.said.put_nowait((worker, message)),
            on_lost=lambda worker, _: self.lost.put_nowait(worker),
            spare=spare,
        )

    def employ(self, name: str) -> Worker:
        epoch = Epoch(1, next(self._epochs))
        return self.pool.employ(Activate(model=model(name), seat=on_gpu(name), epoch=epoch, reason="a test wants it")).first

    async def hears(self, kind: type[M]) -> tuple[Worker, M]:
        while True:
            worker, message = await asyncio.wait_for(self.said.get(), PATIENCE_S)
            if isinstance(message, kind):
                return worker, message

    @property
    def free(self) -> int:
        return sum(worker.free for worker in self.pool)

    @property
    def all(self) -> int:
        return len(list(self.pool))


@asynccontextmanager
async def desk(parent_socket: Path, spare: int = 0) -> AsyncIterator[Desk]:
    with tempfile.TemporaryDirectory(prefix="chimera-test-") as folder:
        made = Desk(Path(folder), parent_socket, spare)
        await made.pool.start()
        try:
            yield made
        finally:
            await made.pool.stop(drain_s=0.0)
        assert made.all == 0


async def test_a_spare_worker_stays_ready_beside_those_at_work(parent_socket: Path) -> None:
    async with desk(parent_socket, spare=1) as made:
        for count, name in enumerate(("a", "b"), 1):
            made.employ(name)
            await made.hears(events.ReplicaReady)
            assert (made.free, made.all) == (1, count + 1)


async def test_a_worker_that_is_there_goes_before_one_still_being_forked(parent_socket: Path) -> None:
    async with desk(parent_socket) as made:
        first = made.employ("a")
        await made.hears(events.ReplicaReady)
        made.pool._fork()
        made.pool.vacate(first)
        assert made.employ("b") is first


async def test_a_model_goes_back_to_where_it_is_parked(parent_socket: Path) -> None:
    async with desk(parent_socket) as made:
        workers = {name: made.employ(name) for name in ("a", "b")}
        for _ in workers:
            await made.hears(events.ReplicaReady)
        for name, worker in workers.items():
            worker.parked = (name,)
            made.pool.vacate(worker)
        assert made.employ("b") is workers["b"]
        assert made.employ("a") is workers["a"]


async def test_a_model_that_is_parked_nowhere_disturbs_the_fewest(parent_socket: Path) -> None:
    async with desk(parent_socket) as made:
        workers = [made.employ(name) for name in ("a", "b")]
        for _ in workers:
            await made.hears(events.ReplicaReady)
        for worker, parked in zip(workers, (("a", "x"), ("b",)), strict=True):
            worker.parked = parked
            made.pool.vacate(worker)
        assert made.employ("c") is workers[1]


async def test_a_chore_is_done_by_a_worker_that_stays_empty(parent_socket: Path) -> None:
    async with desk(parent_socket) as made:
        made.pool.prepare(stream.Prepare(model=model("a")))
        worker, prepared = await made.hears(stream.Prepared)
        assert (prepared.model, prepared.fault) == ("a", "") and not worker.free
        made.pool.vacate(worker)
        assert made.employ("b") is worker


async def test_a_worker_at_a_chore_is_not_given_a_model(parent_socket: Path) -> None:
    async with desk(parent_socket) as made:
        made.pool.prepare(stream.Prepare(model=model("a")))
        (at_chore,) = made.pool
        assert made.employ("b") is not at_chore
        await made.hears(events.ReplicaReady)


async def test_a_spare_worker_that_dies_is_replaced(parent_socket: Path) -> None:
    async with desk(parent_socket, spare=1) as made:
        # Answered by the spare one: now it has greeted.
        made.pool.prepare(stream.Prepare(model=model("a")))
        worker, _ = await made.hears(stream.Prepared)
        made.pool.vacate(worker)
        assert worker.vigil is not None
        worker.vigil.signal(signal.SIGKILL)
        assert await asyncio.wait_for(made.lost.get(), PATIENCE_S) is worker
        assert made.free >= 1 and worker not in list(made.pool)


async def test_a_spare_worker_that_dies_at_birth_is_not_followed_by_another(parent_socket: Path) -> None:
    async with desk(parent_socket, spare=1) as made:
        worker = made.employ("a")
        await made.hears(events.ReplicaReady)
        made.socket.unlink()  # whoever is born from now on finds no agent
        assert worker.vigil is not None
        worker.vigil.signal(signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while made.all:
                await made.lost.get()
                for spare in made.pool:
                    if spare.vigil is not None and spare.channel is not None:
                        spare.vigil.signal(signal.SIGKILL)
