"""Two workers that serve one model together, as their agent sees them: orders go to the first, on behalf of both GPUs."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import actions, events

from tests.worker.stage import Hired, Stage


class Pair(Hired):
    """The first, with the second at its side."""

    def __init__(self, first: Hired, second: Hired, folder: Path) -> None:
        super().__init__(first.stage, first.channel, first.pid)
        self.inbox = first.inbox
        self.second = second
        self._folder = folder

    def activate(self, spec: ModelSpec, kv_limit_bytes: int | None = None, lease: actions.FirstLease | None = None) -> Epoch:
        self.counter += 1
        epoch = Epoch(1, self.counter)
        for rank, member in enumerate((self, self.second)):
            order = actions.Activate(
                model=spec,
                seat=Seat(replica=ReplicaId(spec.name), gpu_ids=(0, 1), kv_limit_bytes=kv_limit_bytes),
                epoch=epoch,
                leases=() if lease is None else (lease, lease),
                place=actions.Place(rank=rank, meeting=str(self._folder / f"meeting-{self.pid}-{self.counter}")),
                reason="a test wants it",
            )
            member.channel.send(order)
        return epoch

    def become(
        self, spec: ModelSpec, kv_limit_bytes: int | None = None, lease: actions.FirstLease | None = None
    ) -> tuple[Epoch, events.ReplicaReady]:
        told = super().become(spec, kv_limit_bytes, lease)
        self.second.inbox.next(events.ReplicaReady)
        return told

    def grant_at(self, gpu_id: int, spec: ModelSpec, epoch: Epoch, revision: int, level: int) -> None:
        order = {"replica": ReplicaId(spec.name), "epoch": epoch, "gpu_id": gpu_id, "revision": revision, "level": level}
        self.channel.send(actions.Grant(**order, reason="a test gives"))

    def recall_at(self, gpu_id: int, spec: ModelSpec, epoch: Epoch, revision: int, level: int, within_s: float) -> None:
        order = {"replica": ReplicaId(spec.name), "epoch": epoch, "gpu_id": gpu_id, "revision": revision, "level": level}
        self.channel.send(actions.Recall(**order, deadline_s=time.monotonic() + within_s, reason="a test takes"))

    def dismiss(self) -> None:
        """Ranks that have come out of step wait for each other, and read no order to stop."""
        try:
            super().dismiss()
            self.second.dismiss()
        finally:
            for pid in (self.pid, self.second.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class RestlessPair:
    """Every 50 ms the lease on one GPU or the other goes to a random level, often in a hurry."""

    def __init__(self, pair: Pair, spec: ModelSpec, epoch: Epoch, *, levels: tuple[int, int], seed: int = 3) -> None:
        self.revisions = [1, 1]
        self.levels = [0, 0]
        self._pair, self._spec, self._epoch, self._range = pair, spec, epoch, levels
        self._chance = random.Random(seed)
        self._due_s = 0.0

    def __call__(self, now: float) -> None:
        if now < self._due_s:
            return
        self._due_s = now + 0.05
        gpu_id = self._chance.randrange(2)
        self.revisions[gpu_id] += 1
        before, level = self.levels[gpu_id], self._chance.randint(*self._range)
        self.levels[gpu_id] = level
        terms: tuple[Any, ...] = (gpu_id, self._spec, self._epoch, self.revisions[gpu_id], level)
        if level >= before:
            self._pair.grant_at(*terms)
        else:
            self._pair.recall_at(*terms, self._chance.choice((0.0, 0.02, 0.2)))


def hire_pair(stage: Stage) -> Pair:
    return Pair(stage.hire("w0"), stage.hire("w1"), stage.folder)
