"""The sockets of a front-end: one to control, kept up; one that workers connect to. Passes on what comes, decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from functools import partial
from pathlib import Path

from chimera.core.snapshot import Snapshot
from chimera.errors import ProtocolError, RequestError
from chimera.msg.actions import Reject, Requeue
from chimera.msg.events import ModelRegistered, ModelRemoved
from chimera.msg.stream import Hello, SnapshotTaken, SnapshotWanted
from chimera.server.catalogue import Catalogue
from chimera.server.desk import Desk
from chimera.wire.channel import Channel, Server, connect, serve
from chimera.wire.codec import Message

_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 0.5
_SNAPSHOT_WITHIN_S = 5.0

_log = logging.getLogger(__name__)


class Relay:
    def __init__(self, run_dir: Path, name: str, catalogue: Catalogue, desk: Desk) -> None:
        self._name = name
        self._control_path = run_dir / "control.sock"
        self._worker_path = run_dir / f"{name}.sock"
        self._catalogue = catalogue
        self._desk = desk
        self.in_touch = False
        """Control is there, and has told of all its models since it came."""
        self._server: Server | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._control: Channel | None = None
        self._snapshot: asyncio.Future[Snapshot] | None = None
        """What everyone who asked for the system's state waits for."""

    async def start(self) -> None:
        self._server = await serve(self._worker_path, self._worker_came)
        self._keeping = asyncio.create_task(self._keep_control())

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        if self._server is not None:
            await self._server.close()
        if self._control is not None:
            self._control.close()
            await self._control.wait_closed()

    async def snapshot(self) -> Snapshot:
        """The state of the whole system, from control."""
        if self._control is None:
            raise RequestError("service_unavailable", "the server's control process is away", retry_after_s=1)
        if self._snapshot is None:
            self._snapshot = asyncio.get_running_loop().create_future()
            self._control.send(SnapshotWanted())
        try:
            async with asyncio.timeout(_SNAPSHOT_WITHIN_S):
                return await asyncio.shield(self._snapshot)
        except TimeoutError:
            raise RequestError("gateway_timeout", f"control said nothing for {_SNAPSHOT_WITHIN_S:g} s") from None

    async def _keep_control(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                channel = await connect(self._control_path)
            except OSError:  # not up yet, or being started again
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                continue
            wait_s = _FIRST_WAIT_S
            self._control_came(channel)
            await channel.wait_closed()
            self._control_went(channel)

    def _control_came(self, channel: Channel) -> None:
        _log.info("control is there")
        self._control = channel
        channel.send(Hello(role="front", name=self._name, pid=os.getpid()))
        channel.send(SnapshotWanted())  # its answer comes after the last model's registration
        channel.deliver_to(self._on_control)
        self._desk.control_is_there(channel.send)

    def _control_went(self, channel: Channel) -> None:
        _log.warning("control is away: %s", channel.fault or "it closed the connection")
        self._control = None
        self.in_touch = False
        self._desk.control_is_lost()
        if self._snapshot is not None:
            self._settle_snapshot().set_exception(
                RequestError("service_unavailable", "the server's control process went away", retry_after_s=1)
            )

    def _on_control(self, message: Message) -> None:
        match message:
            case Reject() | Requeue():
                self._desk.on_control(message)
            case ModelRegistered(model=model):
                self._catalogue.register(model)
            case ModelRemoved(model=name):
                self._catalogue.remove(name)
            case SnapshotTaken(snapshot=snapshot):
                self._catalogue.keep_only(model.name for model in snapshot.models)
                self.in_touch = True
                if self._snapshot is not None:
                    self._settle_snapshot().set_result(snapshot)
            case _:
                _log.debug("control sent a %s, which is not for a front-end", type(message).__name__)

    def _settle_snapshot(self) -> asyncio.Future[Snapshot]:
        assert self._snapshot is not None
        future, self._snapshot = self._snapshot, None
        future.add_done_callback(lambda done: done.exception())  # whoever waited may have left
        return future

    def _worker_came(self, channel: Channel) -> None:
        channel.deliver_to(partial(self._desk.on_worker, channel), partial(self._worker_went, channel))

    def _worker_went(self, channel: Channel, fault: ProtocolError | None) -> None:
        self._desk.worker_is_gone(channel)
