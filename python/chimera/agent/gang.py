"""A worker as its agent sees it, and the workers that are one replica together: there as a whole, or not at all.

A gang has one worker for each GPU of its replica. They become the model together; the first has the agent's orders. When one
is lost, or cannot serve, the others are ended too: without it none of them can take another step. What has become of the
replica is known when the last is out. A replica on one GPU is a gang of one. Knows no socket, and starts no process.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from chimera.core.replica import Epoch, ReplicaId, WorkerState
from chimera.msg.actions import Activate, Place
from chimera.msg.events import ActivationFailed, ReplicaReady, ReplicaStopped, WorkerLost
from chimera.msg.stream import Prepare
from chimera.wire.channel import Channel
from chimera.wire.codec import Message
from chimera.wire.vigil import Vigil

End = ReplicaStopped | ActivationFailed | WorkerLost


class Worker:
    """One process, from the order to fork it until its exit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.activation: Activate | None = None
        """What it was told to be; `None` while it is EMPTY."""
        self.gang: Gang | None = None
        """Those with whom it is that."""
        self.started = False
        """Whether it may become that yet."""
        self.chore: Prepare | None = None
        """What it does meanwhile, being EMPTY."""
        self.channel: Channel | None = None
        """Empty until it has greeted."""
        self.vigil: Vigil | None = None
        """Empty until its process id is known."""
        self.born = 0
        self.settled = False
        """It is EMPTY, or all it was told to be."""
        self.parked: tuple[str, ...] = ()
        """Models that would be there at once if they came back."""
        self.silent_looks = 0
        """How often its watchdog has looked since it last said something."""
        self.verdict = ""
        """Why it was killed, if it was."""
        self.missed = False
        """It has outlived the agent before this one, and has not spoken yet."""

    @property
    def replica(self) -> ReplicaId | None:
        return None if self.activation is None else self.activation.seat.replica

    @property
    def epoch(self) -> Epoch | None:
        return None if self.activation is None else self.activation.epoch

    @property
    def state(self) -> WorkerState:
        return WorkerState.EMPTY if self.activation is None else WorkerState.SERVING

    @property
    def free(self) -> bool:
        """EMPTY, promised to nobody, and without a chore."""
        return self.activation is None and self.chore is None and not self.missed

    def start(self) -> None:
        """Become what was promised, now or when it has greeted."""
        self.started = True
        if self.activation is not None:
            self.send(self.activation)

    def send(self, message: Message) -> None:
        if self.channel is not None:
            self.channel.send(message)


class Gang:
    def __init__(self, activation: Activate, members: Sequence[Worker], meeting: Path = Path()) -> None:
        """`members` by rank; `meeting` is where they find each other."""
        self.replica = activation.seat.replica
        self.epoch = activation.epoch
        self.members = tuple(members)
        self.end: End | None = None
        """What has become of it, by the worst that was heard."""
        self.is_up = False
        """All have become the model."""
        self._meeting = meeting
        self._inside = list(members)
        self._ready: dict[Worker, ReplicaReady] = {}

    @property
    def first(self) -> Worker:
        return self.members[0]

    @property
    def is_alone(self) -> bool:
        return len(self.members) == 1

    @property
    def is_over(self) -> bool:
        return not self._inside

    def start(self, activation: Activate) -> None:
        """Become what was promised, each at its place."""
        for rank, worker in enumerate(self.members):
            place = None if self.is_alone else Place(rank=rank, meeting=str(self._meeting))
            worker.activation = msgspec.structs.replace(activation, place=place)
            worker.start()

    def tell(self, message: Message) -> None:
        if self.first in self._inside:
            self.first.send(message)

    def tell_all(self, message: Message) -> None:
        for worker in self._inside:
            worker.send(message)

    def all_ready(self, worker: Worker, ready: ReplicaReady) -> ReplicaReady | None:
        """What the first has said, when with this worker all have become the model."""
        self._ready[worker] = ready
        self.is_up = self.end is None and len(self._ready) == len(self.members)
        return self._ready[self.first] if self.is_up else None

    def leave(self, worker: Worker, end: End) -> None:
        """A worker is out: EMPTY again, or gone."""
        self._inside.remove(worker)
        self._note(end)

    def break_up(self, end: End) -> list[Worker]:
        """End all who are still inside, without asking. The answer are those that were told nothing yet: they are EMPTY."""
        spared = [worker for worker in self._inside if not worker.started or worker.channel is None]
        self._inside = [worker for worker in self._inside if worker not in spared]
        self._note(end)
        for worker in self._inside:
            if worker.vigil is not None:
                worker.vigil.signal(signal.SIGKILL)
        return spared

    def _note(self, end: End) -> None:
        if self.end is None or isinstance(self.end, ReplicaStopped):
            self.end = end
        if self.is_over and not self.is_alone:
            for path in self._meeting.parent.glob(f"{self._meeting.name}*"):
                path.unlink(missing_ok=True)
