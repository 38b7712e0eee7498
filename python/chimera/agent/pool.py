"""The node's worker processes: forked from the preloaded parent when one is needed, used again when they are EMPTY, and
watched until the kernel confirms that they are gone. Those that have outlived an earlier agent are found again.

Knows processes and connections. Which model goes where is the scheduler's; how several workers are one replica is the gang's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from chimera.agent.gang import Gang, Worker
from chimera.agent.roster import Entry, Roster, born
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.actions import Activate
from chimera.msg.stream import Fork, Forked, Hello, Prepare, Stop
from chimera.wire.channel import Channel, Server, serve
from chimera.wire.codec import Message
from chimera.wire.link import Link
from chimera.wire.vigil import Vigil

log = logging.getLogger(__name__)

KILL_AFTER_S = 2.0
"""How long a worker that was told to leave, and has nothing left to drain, may take to be gone."""

SPEAK_WITHIN_S = 3.0
"""How long a worker that has outlived its agent may take to find this one: its step may be long, but not so long."""


class WorkerPool:
    """`on_message(worker, message)` has what workers say, `on_lost(worker, reason)` comes once for each that is gone.

    `spare` workers are kept EMPTY and ready, so that an activation need not wait for a fork.
    """

    def __init__(
        self,
        *,
        prefix: str,
        socket: Path,
        parent_socket: Path,
        on_message: Callable[[Worker, Message], None],
        on_lost: Callable[[Worker, str], None],
        on_complete: Callable[[], None] = lambda: None,
        roster: Roster | None = None,
        spare: int = 0,
    ) -> None:
        """`on_complete` comes once: when all who have outlived an earlier agent have spoken, or are gone."""
        self._prefix = prefix
        self._spare = spare
        self._socket = socket
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_complete = on_complete
        self._roster = roster
        self.survivors: list[Entry] = [] if roster is None else roster.living()
        """Who was here before this agent."""
        self._missing: set[str] = set()
        self._search: asyncio.TimerHandle | None = None
        self._forked = 0
        self._workers: dict[str, Worker] = {}
        self._server: Server | None = None
        self._stopping = False
        self._all_gone = asyncio.Event()
        self._parent = Link(parent_socket, on_open=self._ask_again, on_message=self._parent_says)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    async def start(self) -> None:
        self._expect_survivors()
        self._server = await serve(self._socket, self._greet)
        self._parent.start()
        if not self._missing:
            self._complete()

    def employ(self, activation: Activate) -> Gang:
        """Have workers become `activation`, one for each of its GPUs: those that are EMPTY, else new ones as soon as they are
        there."""
        gang = self.promise(activation)
        gang.start(activation)
        return gang

    def promise(self, activation: Activate) -> Gang:
        """The workers that shall become `activation` when they are told to `start`."""
        members = []
        for _ in activation.seat.gpu_ids:
            worker = self._free_worker(activation.model.name)
            worker.activation, worker.started, worker.settled = activation, False, False
            members.append(worker)
        gang = Gang(activation, members, meeting=self._socket.parent / f"{self._prefix}.{activation.epoch}.gang")
        for worker in members:
            worker.gang = gang
        self._keep_spare()
        self._note()
        return gang

    def prepare(self, chore: Prepare) -> None:
        """Have a worker do it that is EMPTY, and stays so."""
        worker = self._free_worker()
        worker.chore, worker.settled = chore, False
        worker.send(chore)
        self._note()

    def gang(self, replica: ReplicaId, epoch: Epoch | None) -> Gang | None:
        """The workers of this life of the replica."""
        return next((w.gang for w in self._workers.values() if w.replica == replica and w.epoch == epoch), None)

    def vacate(self, worker: Worker) -> None:
        """Its replica has left; the process may become another."""
        worker.activation, worker.gang, worker.started, worker.chore = None, None, False, None
        self.settle(worker)

    def settle(self, worker: Worker) -> None:
        """It is all that it was told to be: should this agent die, it can tell the next one."""
        worker.settled = True
        self._note()

    def found(self, worker: Worker, activation: Activate | None) -> None:
        """It has told what it is."""
        worker.activation, worker.started, worker.missed = activation, True, False
        if activation is not None:
            worker.gang = Gang(activation, (worker,))
            worker.gang.is_up = True
        self.settle(worker)
        self._miss_no_more(worker)

    def kill(self, worker: Worker, reason: str) -> None:
        """Its exit is what counts as its loss; this is why."""
        if worker.vigil is not None:
            log.error("killed worker=%s replica=%s reason=%s", worker.name, worker.replica, reason)
            worker.verdict = reason
            worker.vigil.signal(signal.SIGKILL)

    async def stop(self, drain_s: float) -> None:
        """Let every worker drain and leave; what has not left in time is killed. Nothing is left when this returns."""
        self._stopping = True
        if self._search is not None:
            self._search.cancel()
        await self._parent.close()
        for worker in list(self._workers.values()):
            if worker.vigil is None:  # its fork is not confirmed: when it greets, it finds nobody and leaves
                del self._workers[worker.name]
            worker.send(Stop(drain_s=drain_s))
            if worker.chore is not None and worker.vigil is not None:
                worker.vigil.signal(signal.SIGKILL)  # what it has not finished, nobody sees
        if not await self._gone_within(drain_s + KILL_AFTER_S):
            for worker in self._workers.values():
                log.warning("killed worker=%s replica=%s reason=it did not leave in time", worker.name, worker.replica)
                if worker.vigil is not None:
                    worker.vigil.signal(signal.SIGKILL)
            await self._all_gone.wait()
        if self._server is not None:
            await self._server.close()
        if self._roster is not None:
            self._roster.remove()

    async def _gone_within(self, patience_s: float) -> bool:
        if not self._workers:
            return True
        self._all_gone.clear()
        try:
            await asyncio.wait_for(self._all_gone.wait(), patience_s)
        except TimeoutError:
            return False
        return True

    # Forking.

    def _free_worker(self, model: str = "") -> Worker:
        """One in which the model is parked, else one that is there, else one that is being forked, else a new one.

        Whoever comes for the first time goes where the least is parked that may have to make room for it.
        """
        free = [worker for worker in self._workers.values() if worker.free]
        free.sort(key=lambda w: (model not in w.parked, w.channel is None, len(w.parked)))
        return free[0] if free else self._fork()

    def _keep_spare(self) -> None:
        while not self._stopping and sum(w.free for w in self._workers.values()) < self._spare:
            self._fork()

    def _fork(self) -> Worker:
        self._forked += 1
        worker = Worker(f"{self._prefix}.{self._forked}")
        self._workers[worker.name] = worker
        self._parent.send(Fork(worker=worker.name, agent_socket=os.fspath(self._socket)))
        return worker

    def _ask_again(self) -> None:
        """The parent is there, or there again: what it was asked before it died is asked anew."""
        for worker in self._workers.values():
            if worker.vigil is None:
                self._parent.send(Fork(worker=worker.name, agent_socket=os.fspath(self._socket)))

    def _parent_says(self, message: Message) -> None:
        if isinstance(message, Forked):
            worker = self._workers.get(message.worker)
            if worker is not None:
                self._watch(worker, message.pid)

    # Watching.

    def _greet(self, channel: Channel) -> None:
        """Whoever connects says first which worker it is."""

        def first(message: Message) -> None:
            worker = self._workers.get(message.name) if isinstance(message, Hello) and message.role == "worker" else None
            if worker is None or worker.channel is not None or not isinstance(message, Hello):
                log.warning("sent away a stranger said=%r", message)
                channel.close()
                return
            self._take_in(worker, channel, message.pid)

        channel.deliver_to(first)

    def _take_in(self, worker: Worker, channel: Channel, pid: int) -> None:
        worker.channel = channel
        worker.settled = worker.settled or worker.free
        self._watch(worker, pid)

        def heard(message: Message) -> None:
            worker.silent_looks = 0
            self._on_message(worker, message)

        channel.deliver_to(heard, lambda _: self._cut_off(worker))
        log.info("greeted worker=%s pid=%d", worker.name, pid)
        if self._stopping:
            worker.send(Stop())
        elif worker.started:
            worker.start()
        elif worker.chore is not None:
            worker.send(worker.chore)

    def _watch(self, worker: Worker, pid: int) -> None:
        if worker.vigil is None:
            try:
                worker.vigil, worker.born = Vigil(pid, lambda: self._exited(worker)), born(pid)
            except ProcessLookupError:
                asyncio.get_running_loop().call_soon(self._exited, worker)
        self._note()

    def _cut_off(self, worker: Worker) -> None:
        """A worker that cannot be spoken to is of no use; its exit, not this, is what counts as its loss."""
        if not self._stopping and worker.vigil is not None:
            worker.vigil.signal(signal.SIGKILL)

    def _exited(self, worker: Worker) -> None:
        if self._workers.pop(worker.name, None) is None:
            return
        if worker.channel is not None:
            worker.channel.close()
        self._note()
        if not self._workers:
            self._all_gone.set()
        if worker.channel is not None:  # else it died at birth, and so would its successor, and the next
            self._keep_spare()
        pid = worker.vigil.pid if worker.vigil is not None else None
        reason = f"the worker was killed: {worker.verdict}" if worker.verdict else "the worker's process has exited"
        self._on_lost(worker, reason + (f" (pid {pid})" if pid is not None else ""))
        self._miss_no_more(worker)

    # Those who have outlived an earlier agent.

    def _expect_survivors(self) -> None:
        for entry in self.survivors:
            worker = self._workers[entry.name] = Worker(entry.name)
            worker.missed = True
            self._missing.add(entry.name)
            self._watch(worker, entry.pid)
            if worker.vigil is not None and not entry.settled:
                log.info("killed worker=%s reason=it was half-way when its agent died", worker.name)
                worker.vigil.signal(signal.SIGKILL)
        if self._missing:
            self._search = asyncio.get_running_loop().call_later(SPEAK_WITHIN_S, self._give_up_silent)

    def _give_up_silent(self) -> None:
        for worker in self._workers.values():
            if worker.missed and worker.vigil is not None:
                log.warning("killed worker=%s reason=silent for %g s after its agent's death", worker.name, SPEAK_WITHIN_S)
                worker.vigil.signal(signal.SIGKILL)

    def _miss_no_more(self, worker: Worker) -> None:
        if worker.name in self._missing:
            self._missing.discard(worker.name)
            if not self._missing and not self._stopping:
                self._complete()

    def _complete(self) -> None:
        if self._search is not None:
            self._search.cancel()
        self._keep_spare()
        self._on_complete()

    def _note(self) -> None:
        """What the next agent will know, should this one die now."""
        if self._roster is None:
            return
        self._roster.write(
            Entry(
                name=worker.name,
                pid=worker.vigil.pid,
                born=worker.born,
                replica="" if worker.replica is None else str(worker.replica),
                gpu_ids=() if worker.activation is None else worker.activation.seat.gpu_ids,
                settled=worker.settled,
            )
            for worker in self._workers.values()
            if worker.vigil is not None
        )
