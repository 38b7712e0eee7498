"""Where leases meet the ledger: the elastic KV memory of one node's replicas.

Hears what replicas want and return, has `sched.shares` divide each GPU, and lets the ledger find the safe way there: what is
recalled must be back before it is granted. A replica is brought up when its weights are reserved and its first pages granted,
not before. One over several GPUs is given all of them in one go or none, and holds the same on each. Knows no socket: orders
and activations that may go ahead are handed out as they come.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.lease import Lease, LeaseClass
from chimera.core.ledger_view import LedgerView
from chimera.ledger.book import GpuLedger, Life, Order, Survivors
from chimera.ledger.node import NodeLedger
from chimera.msg.actions import Activate, FirstLease
from chimera.msg.events import (
    ActivationFailed,
    Event,
    GpuSampled,
    Kept,
    PagesHeld,
    PagesKept,
    PagesReturned,
    PagesWanted,
    ReplicaStopped,
    WorkerLost,
)
from chimera.msg.stream import LetGo
from chimera.sched.shares import Claim, divide_all, is_unfair
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
class _Share:
    """What a replica has on one GPU."""

    worker: str
    weight_pages: int
    claim: Claim
    most: int
    """Pages that it has addresses for, whatever its claim's ceiling is now."""


@dataclass(slots=True, kw_only=True)
class _Tenancy:
    """A replica with an elastic lease on each of its GPUs, from the order to activate it until it is gone."""

    shares: dict[int, _Share]
    """By GPU, in rank order."""
    waiting: Activate | None
    """Empty once it has been told to come up."""


class NodeMemory:
    """`send` takes orders to replicas, `start` activations whose memory is there, `fail` those that can never fit.

    `stop` takes the name of a worker that keeps what was recalled: only its end brings that back. `let_go` takes a worker that
    is to keep less of models that have left, and the order.
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
        let_go: Callable[[str, LetGo], None],
        survivors: Mapping[int, Survivors] | None = None,
    ) -> None:
        """`survivors`, by GPU, are workers of an earlier agent that have yet to say what they hold."""
        survivors = survivors or {}
        self.ledger = NodeLedger(GpuLedger(gpu, agent_start=agent_start, survivors=survivors.get(gpu.gpu_id)) for gpu in gpus)
        self._send = send
        self._start = start
        self._fail = fail
        self._stop = stop
        self._let_go = let_go
        self._asked: dict[tuple[str, int], int] = {}
        """Pages to which workers were asked to come down, by GPU; they have not answered yet."""
        self._tenancies: dict[Life, _Tenancy] = {}
        self._divided_s: dict[int, float] = {}
        self._put_off: dict[int, float] = {}
        """GPUs to be divided anew, and when."""

    def admit(self, activation: Activate, workers: Sequence[str], now: float) -> None:
        """Have memory set aside for a replica, whose workers are named by rank; `start` is called as soon as it is."""
        assert activation.epoch is not None
        seat, life = activation.seat, (activation.seat.replica, activation.epoch)
        shares = {}
        for gpu_id, worker in zip(seat.gpu_ids, workers, strict=True):
            gpu = self.ledger[gpu_id].gpu
            ceiling = gpu.pages if seat.kv_limit_bytes is None else max(1, seat.kv_limit_bytes // gpu.page_bytes)
            weights = ceil_div(activation.model.weight_bytes, gpu.page_bytes)
            claim = Claim(level=0, least=_least(gpu, ceiling), ceiling=ceiling)
            shares[gpu_id] = _Share(worker=worker, weight_pages=weights, claim=claim, most=ceiling)
        for gpu_id, share in shares.items():
            short = self._short(gpu_id, share)
            if short > sum(self.ledger[gpu_id].kept().values()):
                lacks = format_bytes(short * self.ledger[gpu_id].gpu.page_bytes)
                reason = f"GPU {gpu_id} lacks {lacks} for its weights and least KV memory"
                self._fail(ActivationFailed(replica=life[0], epoch=life[1], reason=reason))
                return
        for gpu_id, share in shares.items():
            self._make_room(gpu_id, self._short(gpu_id, share), f"{life[0]} comes up", last=share.worker)
            self.ledger[gpu_id].open(life, share.worker)
        self._tenancies[life] = _Tenancy(shares=shares, waiting=activation)
        self._divide(shares, now, f"{life[0]} comes up")

    def _short(self, gpu_id: int, share: _Share) -> int:
        """Pages that are missing for one more replica, if everyone else comes down to the least."""
        least = [claim.least for claim in self._claims(gpu_id).values()]
        return share.weight_pages + share.claim.least + sum(least) - self._elastic_pages(gpu_id)

    def take_over(self, activation: Activate, held: PagesHeld, now: float) -> None:
        """A replica goes on that an earlier agent has started."""
        assert activation.epoch is not None and len(activation.leases) == 1, "no gang outlives its agent"
        gpu, ceiling = self.ledger[held.gpu_id].gpu, activation.leases[0].ceiling
        share = _Share(
            worker=held.worker,
            weight_pages=ceil_div(activation.model.weight_bytes, gpu.page_bytes),
            claim=Claim(level=held.level, least=_least(gpu, ceiling), ceiling=ceiling),
            most=ceiling,
        )
        self._tenancies[activation.seat.replica, activation.epoch] = _Tenancy(shares={held.gpu_id: share}, waiting=None)
        self.hear(held, now)

    def resize(self, life: Life, kv_limit_bytes: int | None, now: float, reason: str) -> None:
        """Another upper bound for a replica, up to what it has addresses for."""
        tenancy = self._tenancies.get(life)
        if tenancy is None:
            return
        for gpu_id, share in tenancy.shares.items():
            gpu = self.ledger[gpu_id].gpu
            limit = share.most if kv_limit_bytes is None else max(1, kv_limit_bytes // gpu.page_bytes)
            ceiling = min(limit, share.most)
            share.claim = msgspec.structs.replace(share.claim, ceiling=ceiling, least=min(share.claim.least, ceiling))
        self._divide(tenancy.shares, now, reason)

    def waits(self, life: Life) -> bool:
        """Whether the replica has not been told to come up yet."""
        tenancy = self._tenancies.get(life)
        return tenancy is not None and tenancy.waiting is not None

    def hear(self, event: Event, now: float) -> None:
        """Anything that may matter to memory: pages wanted and returned, replicas and workers that end, the time."""
        match event:
            case ActivationFailed(replica=replica, epoch=epoch, reason=reason):
                event = ReplicaStopped(replica=replica, epoch=epoch, reason=reason)
            case PagesWanted(replica=replica, epoch=epoch, gpu_id=gpu_id, level=level):
                tenancy = self._tenancies.get((replica, epoch))
                if tenancy is not None:
                    share = tenancy.shares[gpu_id]
                    share.claim = msgspec.structs.replace(share.claim, wanted=level)
            case _:
                pass
        kept = self._told_to_keep(event)
        touched = self._forget(event)
        self._pass_on(self.ledger.on(event, now), now)
        for (worker, gpu_id), pages in kept.items():
            self._asked.pop((worker, gpu_id), None)
            charged = self.ledger[gpu_id].kept().get(worker, 0)
            if pages > charged:
                self._ask(worker, gpu_id, charged, "there is no room for more")
        self._start_who_can(now)
        if isinstance(event, PagesWanted | PagesReturned | PagesKept | GpuSampled):
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
        # Whoever serves goes before whoever has left.
        needed = sum(claim.need for claim in self._claims(gpu_id).values())
        self._make_room(gpu_id, needed - self._elastic_pages(gpu_id), "a replica has less than its requests need")
        together = self._together([gpu_id])
        if not is_unfair(self._capacities(together), {gpu_id: self._claims(gpu_id) for gpu_id in together}):
            self._put_off.pop(gpu_id, None)
            return
        due_s = self._divided_s.get(gpu_id, 0.0) + _DIVIDE_EVERY_S
        if now < due_s:
            self._put_off[gpu_id] = due_s
            return
        self._divide(together, now, "a replica has less than its requests need")

    def _divide(self, gpu_ids: Iterable[int], now: float, reason: str) -> None:
        together = self._together(gpu_ids)
        for gpu_id in together:
            self._divided_s[gpu_id] = now
            self._put_off.pop(gpu_id, None)
        divided = divide_all(self._capacities(together), {gpu_id: self._claims(gpu_id) for gpu_id in together})
        for gpu_id, levels in divided.items():
            self._allot(gpu_id, levels, now, reason)
        self._start_who_can(now)

    def _allot(self, gpu_id: int, levels: Mapping[Life, int], now: float, reason: str) -> None:
        # Those that give come first: what is free when the others are granted is then known.
        shares = {life: self._tenancies[life].shares[gpu_id] for life in levels}
        for life, level in sorted(levels.items(), key=lambda item: item[1] - shares[item[0]].claim.level):
            claim = shares[life].claim
            if level == claim.level:
                continue
            log.info("allot replica=%s gpu=%d pages=%d before=%d reason=%r", life[0], gpu_id, level, claim.level, reason)
            shares[life].claim = msgspec.structs.replace(claim, level=level)
            orders = self.ledger[gpu_id].allot(life, level, now=now, deadline_s=now + RECALL_WITHIN_S, reason=reason)
            self._pass_on(orders, now)

    def _together(self, gpu_ids: Iterable[int]) -> list[int]:
        """These GPUs, and those that must be divided with them because some replica is on both."""
        found = list(gpu_ids)
        for gpu_id in found:
            for tenancy in self._tenancies.values():
                if gpu_id in tenancy.shares:
                    found += [other for other in tenancy.shares if other not in found]
        return found

    def _claims(self, gpu_id: int) -> dict[Life, Claim]:
        return {life: t.shares[gpu_id].claim for life, t in self._tenancies.items() if gpu_id in t.shares}

    def _capacities(self, gpu_ids: Iterable[int]) -> dict[int, int]:
        return {gpu_id: self._elastic_pages(gpu_id) for gpu_id in gpu_ids}

    def _elastic_pages(self, gpu_id: int) -> int:
        """What is left for KV memory beside weights, those of replicas still waiting for room included."""
        view = self.ledger[gpu_id].view(0.0)
        fixed = sum(pages for kind, pages in view.by_class().items() if kind is not LeaseClass.KV)
        waiting = (t for t in self._tenancies.values() if t.waiting is not None and gpu_id in t.shares)
        coming = sum(tenancy.shares[gpu_id].weight_pages for tenancy in waiting)
        return max(0, view.gpu.pages - fixed - coming)

    # What workers keep of models that have left.

    def _told_to_keep(self, event: Event) -> dict[tuple[str, int], int]:
        """The pages that a worker says it keeps on a GPU."""
        match event:
            case PagesKept(worker=worker, gpu_id=gpu_id, kept=kept):
                return {(worker, gpu_id): kept.pages}
            case ReplicaStopped(replica=replica, epoch=epoch, kept=Kept(pages=pages)):
                tenancy = self._tenancies.get((replica, epoch))
                return {} if tenancy is None else {(share.worker, gpu_id): pages for gpu_id, share in tenancy.shares.items()}
            case WorkerLost(worker=worker):
                self._asked = {key: pages for key, pages in self._asked.items() if key[0] != worker}
        return {}

    def _make_room(self, gpu_id: int, pages: int, reason: str, last: str = "") -> None:
        """Have workers let go of so many pages that were not asked for yet: who keeps the most first, and `last` at last."""
        kept = self.ledger[gpu_id].kept()
        levels = {worker: self._asked.get((worker, gpu_id), level) for worker, level in kept.items()}
        pages -= sum(kept.values()) - sum(levels.values())
        for worker, level in sorted(levels.items(), key=lambda item: (item[0] == last, -item[1])):
            if pages > 0 and level > 0:
                self._ask(worker, gpu_id, max(0, level - pages), reason)
                pages -= level

    def _ask(self, worker: str, gpu_id: int, pages: int, reason: str) -> None:
        self._asked[worker, gpu_id] = pages
        log.info("let go worker=%s gpu=%d pages=%d reason=%r", worker, gpu_id, pages, reason)
        page_bytes = self.ledger[gpu_id].gpu.page_bytes
        self._let_go(worker, LetGo(gpu_id=gpu_id, pages=pages, page_bytes=page_bytes, reason=reason))

    # Coming and going.

    def _start_who_can(self, now: float) -> None:
        """Of the replicas that wait for memory, those for whose weights and first pages there is room now, on all GPUs."""
        for life, tenancy in self._tenancies.items():
            if tenancy.waiting is None:
                continue
            leases = {gpu_id: self._lease(gpu_id, life, now) for gpu_id in tenancy.shares}
            if not all(self._has_room(gpu_id, leases[gpu_id], share) for gpu_id, share in tenancy.shares.items()):
                continue
            for gpu_id, share in tenancy.shares.items():
                reserved = self.ledger[gpu_id].reserve(share.worker, LeaseClass.WEIGHTS, share.weight_pages, life=life)
                assert reserved, "there was room just now, and nobody was asked in between"
            activation, tenancy.waiting = tenancy.waiting, None
            first = tuple(
                FirstLease(
                    page_bytes=self.ledger[gpu_id].gpu.page_bytes,
                    revision=lease.revision,
                    level=lease.level,
                    ceiling=tenancy.shares[gpu_id].most,
                )
                for gpu_id, lease in leases.items()
            )
            self._start(msgspec.structs.replace(activation, leases=first))

    def _lease(self, gpu_id: int, life: Life, now: float) -> Lease:
        entries = self.ledger[gpu_id].view(now).entries
        leases = (entry.lease for entry in entries if (entry.lease.holder, entry.epoch) == (str(life[0]), life[1]))
        return next(lease for lease in leases if lease.lease_class is LeaseClass.KV)

    def _has_room(self, gpu_id: int, lease: Lease, share: _Share) -> bool:
        return lease.level >= share.claim.least and self.ledger[gpu_id].free >= share.weight_pages

    def _forget(self, event: Event) -> set[int]:
        """Whoever the event ends; the GPUs they were on."""
        match event:
            case ReplicaStopped(replica=replica, epoch=epoch):
                gone = [(replica, epoch)]
            case WorkerLost(worker=worker):
                gone = [life for life, t in self._tenancies.items() if any(s.worker == worker for s in t.shares.values())]
            case _:
                return set()
        return {gpu_id for life in gone if life in self._tenancies for gpu_id in self._tenancies.pop(life).shares}

    def _pass_on(self, orders: Iterable[Order], now: float) -> None:
        on_their_way = deque(orders)
        while on_their_way:
            order = on_their_way.popleft()
            tenancy = self._tenancies.get((order.replica, order.epoch))
            if tenancy is None:
                continue
            if tenancy.waiting is None:
                self._send(order)
                continue
            # It has nothing yet, so nobody need come down; the level that it begins with goes with its activation.
            answer = PagesReturned(
                replica=order.replica, epoch=order.epoch, gpu_id=order.gpu_id, revision=order.revision, level=order.level
            )
            on_their_way += self.ledger.on(answer, now)


def _least(gpu: Gpu, ceiling: int) -> int:
    """Pages without which no replica is brought up."""
    return min(ceiling, max(1, min(_LEAST_BYTES, gpu.capacity_bytes // 16) // gpu.page_bytes))
