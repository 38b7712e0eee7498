"""The sockets of a front-end: one to control, kept up; one that workers connect to. Passes on what comes, decides nothing."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from chimera.core.measures import Measures
from chimera.core.sight import Past, Sight
from chimera.core.snapshot import Snapshot
from chimera.errors import ProtocolError, RequestError
from chimera.msg.actions import Reject, Requeue
from chimera.msg.events import LoadWanted, ModelRegistered, ModelRemoved, PolicyChosen, ResizeWanted, UnloadWanted
from chimera.msg.stream import (
    EntryFiled,
    Flush,
    Flushed,
    Hello,
    MeasuresTaken,
    MeasuresWanted,
    PastTaken,
    PastWanted,
    Refiled,
    ReloadWanted,
    ReplicaNews,
    SightTaken,
    SightWanted,
    SnapshotTaken,
    SnapshotWanted,
    StandingTold,
)
from chimera.server.account import Account
from chimera.server.catalogue import Catalogue
from chimera.server.desk import Desk
from chimera.wire.channel import Channel, Server, serve
from chimera.wire.codec import Message
from chimera.wire.link import Link

_ANSWER_WITHIN_S = 5.0

_MOST_UNREAD_NEWS = 1024
"""A watcher that leaves more unread is gone."""

News = ReplicaNews | Reject | Refiled | Flushed | None
"""Of replicas; what came of an order, if that is told; or nothing, because control went away."""

Order = (
    LoadWanted | UnloadWanted | ResizeWanted | ModelRegistered | ModelRemoved | PolicyChosen | ReloadWanted | EntryFiled | Flush
)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Watch:
    """Somebody who wants to know what becomes of replicas, and maybe of one order."""

    def __init__(self, order: str) -> None:
        self.order = order
        self.news: asyncio.Queue[News] = asyncio.Queue(_MOST_UNREAD_NEWS)

    def tell(self, news: News) -> None:
        if not self.news.full():
            self.news.put_nowait(news)


class Relay:
    def __init__(self, run_dir: Path, name: str, catalogue: Catalogue, desk: Desk, account: Account | None = None) -> None:
        self._name = name
        self._account = account
        self._worker_path = run_dir / f"{name}.sock"
        self._catalogue = catalogue
        self._desk = desk
        self._workers: Server | None = None
        self._control = Link(
            run_dir / "control.sock", on_open=self._control_came, on_message=self._on_control, on_end=self._control_went
        )
        self.in_touch = False
        """Control is there, and has told of all its models since it came."""
        self._asked: dict[type, asyncio.Future[Any]] = {}
        """What everyone who asked control for something waits for, by the kind of its answer."""
        self._watches: set[Watch] = set()

    async def start(self) -> None:
        self._workers = await serve(self._worker_path, self._worker_came)
        self._control.start()

    async def close(self) -> None:
        if self._workers is not None:
            await self._workers.close()
        await self._control.close()

    async def snapshot(self, *, after: Order | None = None) -> Snapshot:
        """The state of the whole system, from control; `after` it has carried out an order, and told here what that changes."""
        if after is not None:
            self.order(after)
            if SnapshotTaken in self._asked:  # that is of the time before
                await self._ask(SnapshotWanted(), SnapshotTaken)
        return (await self._ask(SnapshotWanted(), SnapshotTaken)).snapshot

    async def measures(self) -> tuple[Measures, Snapshot]:
        """All that the whole server has counted, what happened here up to now included."""
        if self._account is not None and MeasuresTaken not in self._asked:
            self._account.tell()
        taken = await self._ask(MeasuresWanted(), MeasuresTaken)
        return taken.measures, taken.snapshot

    async def sight(self, *, cast: int, after: int) -> Sight:
        """The newest second, as viewers see it."""
        return (await self._ask(SightWanted(cast=cast, after=after), SightTaken)).sight

    async def past(self) -> Past:
        """The last minutes, for a viewer who has just come."""
        return (await self._ask(PastWanted(), PastTaken)).past

    async def _ask(self, question: Message, kind: type[T]) -> T:
        """Control's answer; who asks while it is on its way waits for the same one."""
        if not self._control.up:
            raise RequestError("service_unavailable", "the server's control process is away", retry_after_s=1)
        future: asyncio.Future[T] | None = self._asked.get(kind)
        if future is None:
            future = self._asked[kind] = asyncio.get_running_loop().create_future()
            self._control.send(question)
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                return await asyncio.shield(future)
        except TimeoutError:
            raise RequestError("gateway_timeout", f"control said nothing for {_ANSWER_WITHIN_S:g} s") from None

    def tell(self, message: Message) -> bool:
        """Whether control is there to hear it."""
        if self._control.up:
            self._control.send(message)
        return self._control.up

    @contextmanager
    def watch(self, order: str = "") -> Iterator[Watch]:
        watch = Watch(order)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def order(self, order: Order) -> None:
        """An operator's word, to control."""
        if not self._control.up:
            raise RequestError("service_unavailable", "the server's control process is away", retry_after_s=1)
        self._control.send(order)

    @property
    def name(self) -> str:
        return self._name

    def _control_came(self) -> None:
        _log.info("control is there")
        self._control.send(Hello(role="front", name=self._name, pid=os.getpid()))
        self._control.send(SnapshotWanted())  # its answer comes after the last model's registration
        self._desk.control_is_there(self._control.send)
        if self._account is not None:
            self._account.tell()

    def _control_went(self) -> None:
        _log.warning("control is away")
        self.in_touch = False
        self._desk.control_is_lost()
        for watch in self._watches:
            watch.tell(None)
        gone = RequestError("service_unavailable", "the server's control process went away", retry_after_s=1)
        for kind in list(self._asked):
            self._settle(kind).set_exception(gone)

    def _on_control(self, message: Message) -> None:
        match message:
            case Reject() | Requeue():
                self._desk.on_control(message)
                for watch in self._watches:
                    if isinstance(message, Reject) and watch.order == message.request_id:
                        watch.tell(message)
            case StandingTold():
                self._desk.on_standing(message)
            case Refiled(order=order) | Flushed(order=order):
                for watch in self._watches:
                    if watch.order == order:
                        watch.tell(message)
            case ReplicaNews():
                for watch in self._watches:
                    watch.tell(message)
            case ModelRegistered(model=model):
                self._catalogue.register(model)
            case ModelRemoved(model=name):
                self._catalogue.remove(name)
            case SnapshotTaken(snapshot=snapshot):
                self._catalogue.keep_only(model.name for model in snapshot.models)
                self.in_touch = True
                self._answered(message)
            case MeasuresTaken() | SightTaken() | PastTaken():
                self._answered(message)
            case _:
                _log.debug("control sent a %s, which is not for a front-end", type(message).__name__)

    def _answered(self, answer: Message) -> None:
        if type(answer) in self._asked:
            self._settle(type(answer)).set_result(answer)

    def _settle(self, kind: type) -> asyncio.Future[Any]:
        future = self._asked.pop(kind)
        future.add_done_callback(lambda done: done.exception())  # whoever waited may have left
        return future

    def _worker_came(self, channel: Channel) -> None:
        channel.deliver_to(partial(self._desk.on_worker, channel), partial(self._worker_went, channel))

    def _worker_went(self, channel: Channel, fault: ProtocolError | None) -> None:
        self._desk.worker_is_gone(channel)
