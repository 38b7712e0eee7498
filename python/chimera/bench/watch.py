"""What a server tells of itself while it is measured: memory by model, models that come and go. All of it by HTTP.

A server that tells nothing of the kind, which is any but chimera, is measured all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from chimera.bench.stream import Call, Target
from chimera.core.gpu import Gpu
from chimera.core.lease import LeaseClass
from chimera.core.ledger_view import GpuLedgerView, LedgerView
from chimera.core.replica import ReplicaState
from chimera.core.snapshot import Snapshot

_OK = 200
_STRANGERS = (LeaseClass.MARGIN, LeaseClass.STRANGERS)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Who held how much at one moment: bytes by GPU, then by model; and beside it what was free."""

    at_s: float
    held: dict[int, dict[str, int]]
    kv: dict[int, dict[str, int]]
    """Of that, KV memory."""


class Switch(msgspec.Struct, frozen=True, kw_only=True):
    """A replica came up, or went."""

    at_s: float
    model: str
    gpu_ids: tuple[int, ...]
    took_s: float
    """From the decision to the moment it serves."""
    reason: str = ""


class Stay(msgspec.Struct, frozen=True, kw_only=True):
    """A replica of a model served from … to …."""

    model: str
    gpu_ids: tuple[int, ...]
    from_s: float
    to_s: float


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen. Empty when the server tells nothing."""

    gpus: tuple[Gpu, ...] = ()
    samples: tuple[Sample, ...] = ()
    switches: tuple[Switch, ...] = ()
    stays: tuple[Stay, ...] = ()

    def was_up(self, model: str, at_s: float) -> bool:
        """Whether a replica served at that moment. A server that tells nothing is taken to have every model up."""
        if not self.stays:
            return True
        return any(stay.model == model and stay.from_s <= at_s <= stay.to_s for stay in self.stays)

    def charged(self) -> list[int]:
        """Bytes held over all GPUs, sample by sample."""
        return [sum(sum(held.values()) for held in sample.held.values()) for sample in self.samples]


class _News(msgspec.Struct, frozen=True):
    model: str
    index: int
    state: ReplicaState
    reason: str = ""
    gpu_ids: tuple[int, ...] = ()
    load_s: float | None = None
    failed: bool = False


_news = msgspec.json.Decoder(_News)


class Watcher:
    """Watches one server from `start` to `stop`, on the clock it is given."""

    def __init__(self, target: Target, now_s: Callable[[], float], *, every_s: float = 0.25) -> None:
        self._target = target
        self._now_s = now_s
        self._every_s = every_s
        self._sampling: asyncio.Task[None] | None = None
        self._events: Call | None = None
        self._gpus: tuple[Gpu, ...] = ()
        self._samples: list[Sample] = []
        self._switches: list[Switch] = []
        self._stays: list[Stay] = []
        self._up: dict[tuple[str, int], tuple[float, tuple[int, ...]]] = {}
        self._asked: dict[tuple[str, int], float] = {}
        self._begun = False

    async def start(self) -> None:
        snapshot = await snapshot_of(self._target)
        if snapshot is None:
            return
        self._gpus = snapshot.gpus
        for view in snapshot.replicas:
            if view.state is ReplicaState.SERVING:
                self._up[view.replica.model, view.replica.index] = (0.0, view.gpu_ids)
        self._events = Call(
            self._target.message("/models/events", b"", "GET"), lambda: None, self._hear, lambda call, why: None
        )
        self._target.send(self._events)
        self._sampling = asyncio.create_task(self._sample())

    def begin(self) -> None:
        """The run's clock starts: what was seen before is as at its beginning."""
        self._begun = True

    async def stop(self) -> Sighting:
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        if self._events is not None and self._events.connection is not None:
            self._events.connection.abandon()
        now_s = self._now_s()
        for (model, _), (from_s, gpu_ids) in self._up.items():
            self._stays.append(Stay(model=model, gpu_ids=gpu_ids, from_s=from_s, to_s=now_s))
        return Sighting(
            gpus=self._gpus,
            samples=tuple(self._samples),
            switches=tuple(self._switches),
            stays=tuple(sorted(self._stays, key=lambda stay: (stay.model, stay.from_s))),
        )

    def _hear(self, event: bytes) -> bool:
        try:
            news = _news.decode(event)
        except msgspec.DecodeError:  # a word of a later release
            return False
        key, at_s = (news.model, news.index), max(0.0, self._now_s())
        match news.state:
            case ReplicaState.SERVING if key not in self._up:
                self._up[key] = (at_s, news.gpu_ids)
                took_s = at_s - self._asked.pop(key, at_s)
                if self._begun:
                    took_s = news.load_s if news.load_s is not None and not took_s else took_s
                    switch = Switch(at_s=at_s, model=news.model, gpu_ids=news.gpu_ids, took_s=took_s, reason=news.reason)
                    self._switches.append(switch)
            case ReplicaState.LOADING:
                self._asked.setdefault(key, at_s)
            case ReplicaState.SERVING:
                pass
            case _ if key in self._up:
                from_s, gpu_ids = self._up.pop(key)
                self._stays.append(Stay(model=news.model, gpu_ids=gpu_ids, from_s=from_s, to_s=at_s))
        return False

    async def _sample(self) -> None:
        while True:
            body = await fetch(self._target, "/ledger")
            if body is not None and self._begun:
                view = msgspec.json.decode(body, type=LedgerView)
                at_s = self._now_s()
                held = {ledger.gpu.gpu_id: _by_model(ledger, None) for ledger in view.gpus}
                kv = {ledger.gpu.gpu_id: _by_model(ledger, LeaseClass.KV) for ledger in view.gpus}
                self._samples.append(Sample(at_s=at_s, held=held, kv=kv))
            await asyncio.sleep(self._every_s)


def _by_model(ledger: GpuLedgerView, only: LeaseClass | None) -> dict[str, int]:
    sums: dict[str, int] = {}
    for entry in ledger.entries:
        lease = entry.lease
        if lease.lease_class in _STRANGERS or (only is not None and lease.lease_class is not only):
            continue
        name = lease.holder.rpartition("/")[0] or lease.holder
        sums[name] = sums.get(name, 0) + lease.held * ledger.gpu.page_bytes
    return sums


async def fetch(target: Target, path: str, body: bytes = b"", method: str = "GET") -> bytes | None:
    """The body of an answer with status 200; nothing otherwise."""
    done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def ended(call: Call, why: str) -> None:
        if not done.done():
            done.set_result(call.body if call.status == _OK and not why else None)

    target.send(Call(target.message(path, body, method), lambda: None, lambda event: False, ended))
    return await done


async def snapshot_of(target: Target) -> Snapshot | None:
    """What a chimera server says of itself; nothing from any other."""
    body = await fetch(target, "/snapshot")
    try:
        return None if body is None else msgspec.json.decode(body, type=Snapshot)
    except msgspec.DecodeError:
        return None
