"""Where leases meet the ledger: the elastic KV memory of one node's replicas.

Hears what replicas want and return, has `sched.shares` divide each GPU, and lets the ledger find the safe way there: what is
recalled must be back before it is granted. A replica is brought up when its weights are reserved and its first pages granted,
not before. Knows no socket: orders and activations that may go ahead are handed out as they come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.lease import LeaseClass
from chimera.core.ledger_view import LedgerView
from chimera.ledger.book import GpuLedger, Life, Order, Survivors
from chimera.ledger.node import NodeLedger
from chimera.msg.actions import Activate, FirstLease
from chimera.msg.events import (
    ActivationFailed,
    Event,
    GpuSampled,
    PagesHeld,
    PagesReturned,
    PagesWanted,
    ReplicaStopped,
    WorkerLost,
)
from chimera.sched.shares import Claim, divide, is_unfair
from chimera.units import MIB, ceil_div, format_bytes

log = logging.getLogger(__name__)

RECALL_WITHIN_S: Final = 0.5
"""How long a replica may take to come down; in the second half its requests yield."""
STOPPED_AFTER_S: Final = 30.0
"""How long past the deadline of a recall its replica is stopped: a step may be long, but not so long."""
_DIVIDE_EVERY_S: Final = 0.05
_LEAST_BYTES: Final = 128 * MIB
"""Enough for the first stripe of any model; less on a GPU that has little."""


@dataclass(slots=True, kw_only=True)
class _Tenancy:
    """A replica with an elastic lease, from the order to activate it until it is gone."""

    worker: str
    gpu_id: int
    weight_pages: int
    claim: Claim
    waiting: Activate | None
    """Empty once it has been told to come up."""


class NodeMemory:
    """`send` takes orders to replicas, `start` activations whose memory is there, `fail` those that can never fit.

    `stop` takes the name of a worker that keeps what was recalled: only its end brings that back.
    """

    def __init__(
        self,
        gpus: Iterable[Gpu],
        agent_start: int,
        *,
        send: Callable[[Order], None],
        start: Callable[[Activate], None],
        fail: Callable[[ActivationFailed], None],
        stop: Callable[[str], None],
        survivors: Mapping[int, Survivors] | None = None,
    ) -> None:
        """`survivors`, by GPU, are workers of an earlier agent that have yet to say what they hold."""
        survivors = survivors or {}
        self.ledger = NodeLedger(GpuLedger(gpu, agent_start=agent_start, survivors=survivors.get(gpu.gpu_id)) for gpu in gpus)
        self._send = send
        self._start = start
        self._fail = fail
        self._stop = stop
        self._tenancies: dict[Life, _Tenancy] = {}
        self._divided_s: dict[int, float] = {}
        self._put_off: dict[int, float] = {}
        """GPUs to be divided anew, and when."""

    def admit(self, activation: Activate, worker: str, now: float) -> None:
        """Have memory set aside for a replica; `start` is called as soon as it is."""
        assert activation.epoch is not None
        seat, life = activation.seat, (activation.seat.replica, activation.epoch)
        gpu = self.ledger[seat.gpu_ids[0]].gpu
        weights = ceil_div(activation.model.weight_bytes, gpu.page_bytes)
        ceiling = gpu.pages if seat.kv_limit_bytes is None else max(1, seat.kv_limit_bytes // gpu.page_bytes)
        least = _least(gpu, ceiling)
        claims = [t.claim.least for t in self._tenancies.values() if t.gpu_id == gpu.gpu_id]
        short = weights + least + sum(claims) - self._elastic_pages(gpu.gpu_id)
        if short > 0:
            self._fail(
                ActivationFailed(
                    replica=life[0],
                    epoch=life[1],
                    reason=f"GPU {gpu.gpu_id} lacks {format_bytes(short * gpu.page_bytes)} for its weights and least KV memory",
                )
            )
            return
        self.ledger[gpu.gpu_id].open(life, worker)
        self._tenancies[life] = _Tenancy(
            worker=worker,
            gpu_id=gpu.gpu_id,
            weight_pages=weights,
            claim=Claim(level=0, least=least, ceiling=ceiling),
            waiting=activation,
        )
        self._divide(gpu.gpu_id, now, f"{life[0]} comes up")

    def take_over(self, activation: Activate, held: PagesHeld, now: float) -> None:
        """A replica goes on that an earlier agent has started."""
        assert activation.epoch is not None and activation.lease is not None
        gpu, ceiling = self.ledger[held.gpu_id].gpu, activation.lease.ceiling
        self._tenancies[activation.seat.replica, activation.epoch] = _Tenancy(
            worker=held.worker,
            gpu_id=held.gpu_id,
            weight_pages=ceil_div(activation.model.weight_bytes, gpu.page_bytes),
            claim=Claim(level=held.level, least=_least(gpu, ceiling), ceiling=ceiling),
            waiting=None,
        )
        self.hear(held, now)

    def waits(self, life: Life) -> bool:
        """Whether the replica has not been told to come up yet."""
        tenancy = self._tenancies.get(life)
        return tenancy is not None and tenancy.waiting is not None

    def hear(self, event: Event, now: float) -> None:
        """Anything that may matter to memory: pages wanted and returned, replicas and workers that end, the time."""
        match event:
            case ActivationFailed(replica=replica, epoch=epoch, reason=reason):
                event = ReplicaStopped(replica=replica, epoch=epoch, reason=reason)
            case PagesWanted(replica=replica, epoch=epoch, level=level):
                tenancy = self._tenancies.get((replica, epoch))
                if tenancy is not None:
                    tenancy.claim = msgspec.structs.replace(tenancy.claim, wanted=level)
            case _:
                pass
        touched = self._forget(event)
        self._pass_on(self.ledger.on(event, now))
        self._start_who_can(now)
        if isinstance(event, PagesWanted | PagesReturned | GpuSampled):
            touched.add(event.gpu_id)
        touched |= {gpu_id for gpu_id, due_s in self._put_off.items() if due_s <= now}
        for gpu_id in touched:
            self._redivide(gpu_id, now)
        for ledger in self.ledger:
            for entry in ledger.overdue(now):
                if entry.overdue_s > STOPPED_AFTER_S:
                    self._stop(entry.worker)

    @property
    def next_wake_s(self) -> float | None:
        """When to `hear` of `Woke`."""
        due = list(self._put_off.values())
        if (ledger_s := self.ledger.next_wake_s) is not None:
            due.append(ledger_s)
        return min(due, default=None)

    def kv_bytes(self, gpu_id: int) -> int:
        """What the caches of all replicas on a GPU may hold together."""
        return self._elastic_pages(gpu_id) * self.ledger[gpu_id].gpu.page_bytes

    def view(self, now: float) -> LedgerView:
        return self.ledger.view(now)

    # Dividing.

    def _redivide(self, gpu_id: int, now: float) -> None:
        """If there is reason to; and not again at once, because every request that comes or ends changes what is wanted."""
        if not is_unfair(self._elastic_pages(gpu_id), self._claims(gpu_id)):
            self._put_off.pop(gpu_id, None)
            return
        due_s = self._divided_s.get(gpu_id, 0.0) + _DIVIDE_EVERY_S
        if now < due_s:
            self._put_off[gpu_id] = due_s
            return
        self._divide(gpu_id, now, "a replica has less than its requests need")

    def _divide(self, gpu_id: int, now: float, reason: str) -> None:
        self._divided_s[gpu_id] = now
        self._put_off.pop(gpu_id, None)
        levels = divide(self._elastic_pages(gpu_id), self._claims(gpu_id))
        # Those that give come first: what is free when the others are granted is then known.
        for life, level in sorted(levels.items(), key=lambda item: item[1] - self._tenancies[item[0]].claim.level):
            tenancy = self._tenancies[life]
            if level == tenancy.claim.level:
                continue
            log.info("allot replica=%s pages=%d before=%d reason=%r", life[0], level, tenancy.claim.level, reason)
            tenancy.claim = msgspec.structs.replace(tenancy.claim, level=level)
            orders = self.ledger[gpu_id].allot(life, level, now=now, deadline_s=now + RECALL_WITHIN_S, reason=reason)
            self._pass_on(orders)
        self._start_who_can(now)

    def _claims(self, gpu_id: int) -> dict[Life, Claim]:
        return {life: tenancy.claim for life, tenancy in self._tenancies.items() if tenancy.gpu_id == gpu_id}

    def _elastic_pages(self, gpu_id: int) -> int:
        """What is left for KV memory beside weights, those of replicas still waiting for room included."""
        view = self.ledger[gpu_id].view(0.0)
        fixed = sum(pages for kind, pages in view.by_class().items() if kind is not LeaseClass.KV)
        coming = sum(t.weight_pages for t in self._tenancies.values() if t.waiting is not None and t.gpu_id == gpu_id)
        return max(0, view.gpu.pages - fixed - coming)

    # Coming and going.

    def _start_who_can(self, now: float) -> None:
        """Of the replicas that wait for memory, those whose weights and first pages there is room for now."""
        for life, tenancy in self._tenancies.items():
            if tenancy.waiting is None:
                continue
            ledger = self.ledger[tenancy.gpu_id]
            leases = (entry.lease for entry in ledger.view(now).entries if entry.epoch == life[1])
            lease = next(lease for lease in leases if lease.lease_class is LeaseClass.KV)
            if lease.level < tenancy.claim.least:
                continue
            if not ledger.reserve(tenancy.worker, LeaseClass.WEIGHTS, tenancy.weight_pages, life=life):
                continue
            activation, tenancy.waiting = tenancy.waiting, None
            first = FirstLease(
                page_bytes=ledger.gpu.page_bytes, revision=lease.revision, level=lease.level, ceiling=tenancy.claim.ceiling
            )
            self._start(msgspec.structs.replace(activation, lease=first))

    def _forget(self, event: Event) -> set[int]:
        """Whoever the event ends; the GPUs they were on."""
        match event:
            case ReplicaStopped(replica=replica, epoch=epoch):
                gone = [(replica, epoch)]
            case WorkerLost(worker=worker):
                gone = [life for life, tenancy in self._tenancies.items() if tenancy.worker == worker]
            case _:
                return set()
        return {self._tenancies.pop(life).gpu_id for life in gone if life in self._tenancies}

    def _pass_on(self, orders: Iterable[Order]) -> None:
        for order in orders:
            tenancy = self._tenancies.get((order.replica, order.epoch))
            if tenancy is None or tenancy.waiting is not None:
                continue  # the level it begins with goes with its activation
            self._send(order)


def _least(gpu: Gpu, ceiling: int) -> int:
    """Pages without which no replica is brought up."""
    return min(ceiling, max(1, min(_LEAST_BYTES, gpu.capacity_bytes // 16) // gpu.page_bytes))
