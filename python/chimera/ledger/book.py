"""The account book of one GPU: which holder may have how many pages, of which class, and what is still to come back.

Two kinds of lines. A *reservation* (weights, graphs, workspace, contexts) is fixed, and answered yes or no at once. A
*lease* is elastic: the caller allots it a level, and the book finds the safe way there. A level that falls is recalled
at once; one that rises waits, in the order of its allotment, until what was recalled elsewhere is back.

Knows counts, not addresses; is told the time, never asks; decides nothing about who deserves memory. Messages to and from
a holder may be lost, late, repeated or reordered. Invariant: all that is charged, a lease by the most its holder may
have, is within the capacity. Two things can break it from outside, and both are shown as `short` instead of hidden:
strangers on the device, and a holder that speaks up after a restarted book has stopped waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.lease import Lease, LeaseClass
from chimera.core.ledger_view import Entry, GpuLedgerView
from chimera.core.replica import Epoch, ReplicaId
from chimera.errors import ProtocolError
from chimera.msg.actions import Grant, Recall
from chimera.msg.events import Event, GpuSampled, PagesHeld, PagesKept, PagesReturned, PagesWanted, ReplicaStopped, WorkerLost
from chimera.units import ceil_div

Life = tuple[ReplicaId, Epoch]
"""One replica in one life. On one GPU it is lived by one worker."""
Order = Grant | Recall

PATIENCE_S = 1.0
"""How long an order may go unanswered before it is repeated; a recall, not before its deadline."""
_NOT_FOR_HOLDERS = {LeaseClass.MARGIN, LeaseClass.STRANGERS}


class Survivors(msgspec.Struct, frozen=True, kw_only=True):
    """Who must speak before a restarted book gives anything new."""

    until_s: float
    """After this the book waits no longer."""
    workers: frozenset[str] = frozenset()
    """Whom to wait for; when all have spoken the wait is over. Empty: whoever comes, for the whole of the wait."""


@dataclass(slots=True, kw_only=True)
class _Account:
    """One elastic lease, and where its caller wants it."""

    lease: Lease
    worker: str
    allotted: int
    ceiling: int
    """The most the holder may have had when the newest order was sent: no honest answer to it says more."""
    wanted: int = 0
    want_revision: int = 0
    deadline_s: float = math.inf
    repeat_s: float = math.inf
    reason: str = ""

    @property
    def recalled(self) -> bool:
        return self.lease.level < self.lease.held


class GpuLedger:
    """All the memory of one GPU. Every door but `open` and `reserve` answers with the orders to send."""

    def __init__(self, gpu: Gpu, *, margin_pages: int = 0, agent_start: int = 0, survivors: Survivors | None = None) -> None:
        """`agent_start` is that of the epochs its agent mints; any other epoch is from before a restart."""
        self.gpu = gpu
        self._margin = margin_pages
        self._strangers = 0
        self._agent_start = agent_start
        self._awaited = set(survivors.workers) if survivors else set()
        self._learn_until_s = survivors.until_s if survivors else -math.inf
        self._accounts: dict[Life, _Account] = {}
        self._reserved: dict[tuple[str, Life | None, LeaseClass], int] = {}
        self._waiting: dict[Life, None] = {}
        """Leases below their allotment, in the order in which they came to be."""
        self._ended: set[Life] = set()
        """Lives from before the restart that have ended here; for our own, not being open says the same."""
        self._spoken: set[str] = set()
        """Living workers that have announced themselves: what they announce again is older than what the book knows."""
        self._lost: set[str] = set()
        """Exited workers. A name is never used twice."""

    @property
    def learning(self) -> bool:
        return self._learn_until_s > -math.inf

    @property
    def free(self) -> int:
        """Pages that may be given now: none while the book is still learning who holds what."""
        return 0 if self.learning else max(0, self.gpu.pages - self._charged())

    @property
    def next_wake_s(self) -> float | None:
        """When to send `Woke`: an order to repeat, or the end of a wait. `None` while nothing is under way."""
        due_s = [account.repeat_s for account in self._accounts.values() if not account.lease.settled]
        if self.learning:
            due_s.append(self._learn_until_s)
        return min(due_s, default=None)

    # What the caller wants.

    def open(self, life: Life, worker: str) -> None:
        """The replica begins a life in `worker`, with a lease of nothing."""
        if life in self._accounts:
            raise ValueError(f"{life[0]} (epoch {life[1]}) already has a lease on GPU {self.gpu.gpu_id}")
        if worker in self._lost:
            raise ValueError(f"worker {worker} has exited: it cannot hold memory of GPU {self.gpu.gpu_id}")
        self._accounts[life] = _Account(lease=self._lease(str(life[0]), LeaseClass.KV), worker=worker, allotted=0, ceiling=0)

    def allot(self, life: Life, level: int, *, now: float, deadline_s: float, reason: str) -> list[Order]:
        """The lease shall come to `level`; if that is downward, by `deadline_s`. For a life that is over, nothing happens."""
        if level < 0:
            raise ValueError(f"a lease cannot be allotted {level} pages")
        orders = self._wake_up(now)
        account = self._accounts.get(life)
        if account is None:
            return orders
        sooner = account.recalled and deadline_s < account.deadline_s
        account.allotted, account.deadline_s, account.reason = level, deadline_s, reason
        if level > account.lease.level:
            self._waiting.setdefault(life)
        else:
            self._waiting.pop(life, None)
            if level < account.lease.level or sooner:
                orders.append(self._order(life, account, level, now))
        return orders + self._give(now)

    def reserve(self, worker: str, lease_class: LeaseClass, pages: int, *, life: Life | None = None) -> bool:
        """Raise a reservation to `pages` now, whole, or change nothing and say no. Without a life it stays with the worker."""
        self._refuse_unreservable(lease_class, pages)
        if worker in self._lost or (life is not None and life not in self._accounts):
            return False
        key = (worker, life, lease_class)
        more = pages - self._reserved.get(key, 0)
        if more > self.free:
            return False
        if more > 0:
            self._reserved[key] = pages
        return True

    def release(
        self, worker: str, lease_class: LeaseClass, pages: int = 0, *, life: Life | None = None, now: float
    ) -> list[Order]:
        """Lower a reservation to `pages`. Only for pages that the holder has confirmed it no longer has."""
        self._refuse_unreservable(lease_class, pages)
        key = (worker, life, lease_class)
        if pages < self._reserved.get(key, 0):
            self._reserved[key] = pages
            if not pages:
                del self._reserved[key]
        return self._wake_up(now) + self._give(now)

    # What happened.

    def on(self, event: Event, now: float) -> list[Order]:
        """Events that are not about memory change nothing."""
        orders = self._wake_up(now)
        match event:
            case PagesReturned():
                self._returned(event)
            case PagesWanted():
                self._wanted(event)
            case PagesHeld():
                orders += self._announced(event, now)
            case PagesKept():
                self._keep(event.worker, event.kept.pages)
            case ReplicaStopped():
                self._stopped(event)
            case WorkerLost():
                self._worker_lost(event.worker)
            case GpuSampled():
                self._strangers = ceil_div(event.strangers_bytes, self.gpu.page_bytes)
            case _:
                pass
        return orders + self._give(now)

    def kept(self) -> dict[str, int]:
        """Pages by worker that stay with it whichever replica it is, and that it gives back when asked."""
        return {key[0]: pages for key, pages in self._reserved.items() if key[1:] == (None, LeaseClass.GRAPH)}

    def view(self, now: float) -> GpuLedgerView:
        return GpuLedgerView(gpu=self.gpu, entries=tuple(self._entries(now)), learning=self.learning)

    def overdue(self, now: float) -> tuple[Entry, ...]:
        """Recalls whose deadline has passed: what to do about their holders is the caller's decision."""
        return tuple(entry for entry in self._entries(now) if entry.overdue_s > 0)

    def check(self) -> None:
        """Assert what is true at every instant, unless a survivor spoke up late."""
        ours = self._charged() - self._strangers
        assert ours <= self.gpu.pages, f"{ours} pages charged of {self.gpu.pages}"
        for life, account in self._accounts.items():
            lease = account.lease
            assert lease.level >= 0 and 0 <= lease.held <= lease.charged <= account.ceiling, f"{life}: {account}"
            assert (life in self._waiting) == (lease.level < account.allotted), f"{life} waits wrongly: {account}"
            assert account.worker not in self._lost, f"{life} lives on in a worker that has exited"
        assert self._waiting.keys() <= self._accounts.keys()
        for (worker, user, lease_class), pages in self._reserved.items():
            assert pages > 0 and worker not in self._lost, f"{worker} keeps {pages} pages of {lease_class}"
            assert user is None or user in self._accounts, f"{user} is over and keeps {pages} pages of {lease_class}"

    # How a level changes.

    def _order(self, life: Life, account: _Account, level: int, now: float) -> Order:
        account.lease = account.lease.at(level)
        account.ceiling = account.lease.charged
        return self._message(life, account, now)

    def _message(self, life: Life, account: _Account, now: float) -> Order:
        """The newest order, to be sent for the first time or again."""
        account.repeat_s = now + PATIENCE_S
        (replica, epoch), lease = life, account.lease
        if not account.recalled:
            return Grant(
                replica=replica,
                epoch=epoch,
                gpu_id=self.gpu.gpu_id,
                revision=lease.revision,
                level=lease.level,
                reason=account.reason,
            )
        account.repeat_s = max(account.repeat_s, account.deadline_s)
        return Recall(
            replica=replica,
            epoch=epoch,
            gpu_id=self.gpu.gpu_id,
            revision=lease.revision,
            level=lease.level,
            deadline_s=account.deadline_s,
            reason=account.reason,
        )

    def _give(self, now: float) -> list[Order]:
        """Raise the leases that wait as far as what is free allows, first come first served."""
        orders: list[Order] = []
        if self.learning:
            return orders
        for life in list(self._waiting):
            account = self._accounts[life]
            # Up to what is charged anyway costs nothing: a recall that is taken back needs no free page.
            level = min(account.allotted, account.lease.charged + self.free)
            if level > account.lease.level:
                orders.append(self._order(life, account, level, now))
            if level == account.allotted:
                del self._waiting[life]
        return orders

    def _wake_up(self, now: float) -> list[Order]:
        """What is due at `now`: the end of the wait for survivors, and orders that went unanswered."""
        if self.learning and now >= self._learn_until_s:
            self._learn_until_s = -math.inf
        return [
            self._message(life, account, now)
            for life, account in self._accounts.items()
            if account.repeat_s <= now and not account.lease.settled
        ]

    # What a holder says.

    def _returned(self, event: PagesReturned) -> None:
        account = self._accounts.get((event.replica, event.epoch))
        if account is not None:
            self._answered(account, event.revision, event.level)

    def _answered(self, account: _Account, revision: int, level: int) -> None:
        lease = account.lease
        if level < 0 or revision > lease.revision:
            raise ProtocolError(f"{lease.holder} answers order {revision} with {level} pages; the newest is {lease.revision}")
        if revision == lease.revision and level > account.ceiling:
            given = f"it was never given more than {account.ceiling}"
            raise ProtocolError(f"{lease.holder} says it holds {level} pages of GPU {lease.gpu_id}; {given}")
        account.lease = lease.answered(revision, level)

    def _wanted(self, event: PagesWanted) -> None:
        account = self._accounts.get((event.replica, event.epoch))
        if account is not None and event.revision >= account.want_revision:
            account.wanted, account.want_revision = max(0, event.level), event.revision

    def _announced(self, event: PagesHeld, now: float) -> list[Order]:
        """A worker connects and tells what it has. What the book already knows of it, the book knows better."""
        if event.worker in self._lost:
            return []
        if event.worker not in self._spoken:
            self._spoken.add(event.worker)
            self._learn(event.worker, None, event.kept)
        orders: list[Order] = []
        if event.replica is not None and event.epoch is not None:
            life = (event.replica, event.epoch)
            account = self._accounts.get(life)
            if account is not None:
                self._answered(account, event.revision, max(event.level, event.held))
                if not account.lease.settled:  # the order may have been lost with the old connection
                    orders.append(self._message(life, account, now))
            elif not self._is_over(life):
                self._adopt(life, event, now)
        self._heard(event.worker)
        return orders

    def _adopt(self, life: Life, event: PagesHeld, now: float) -> None:
        """Go on from where it is, which may be half-way through a recall of the book before this one."""
        lease = msgspec.structs.replace(
            self._lease(str(life[0]), LeaseClass.KV),
            revision=event.revision,
            level=event.level,
            held=max(event.level, event.held),
            confirmed=event.revision,
        )
        self._accounts[life] = _Account(
            lease=lease,
            worker=event.worker,
            allotted=event.level,
            ceiling=lease.charged,
            deadline_s=now + PATIENCE_S,
            repeat_s=now + PATIENCE_S,
            reason="recalled before the ledger restarted",
        )
        self._learn(event.worker, life, event.reserved)

    def _learn(self, worker: str, life: Life | None, pages_by_class: dict[LeaseClass, int]) -> None:
        for lease_class, pages in pages_by_class.items():
            if pages > 0 and lease_class not in _NOT_FOR_HOLDERS:
                self._reserved.setdefault((worker, life, lease_class), pages)

    def _keep(self, worker: str, pages: int) -> None:
        """What a worker has beside any life. It is there; but of what nobody has room for, only what fits is charged.

        The caller sees the difference, and has it given back.
        """
        key = (worker, None, LeaseClass.GRAPH)
        self._reserved.pop(key, None)
        pages = pages if self.learning else min(pages, self.free)
        if pages > 0 and worker not in self._lost:
            self._reserved[key] = pages

    def _heard(self, worker: str) -> None:
        if worker in self._awaited:
            self._awaited.discard(worker)
            if not self._awaited:
                self._learn_until_s = -math.inf

    # How a holder ends.

    def _worker_lost(self, worker: str) -> None:
        self._lost.add(worker)
        self._spoken.discard(worker)
        for life in [life for life, account in self._accounts.items() if account.worker == worker]:
            self._end(life)
        for key in [key for key in self._reserved if key[0] == worker]:
            del self._reserved[key]
        self._heard(worker)

    def _stopped(self, event: ReplicaStopped) -> None:
        """What its worker keeps is part of what comes back: at no moment is it free."""
        account = self._accounts.get((event.replica, event.epoch))
        self._end((event.replica, event.epoch))
        if account is not None and event.kept is not None:
            self._keep(account.worker, event.kept.pages)

    def _end(self, life: Life) -> None:
        if life[1].agent_start != self._agent_start:
            self._ended.add(life)  # known or not: its announcement may come after its end
        if self._accounts.pop(life, None) is not None:
            self._waiting.pop(life, None)
            for key in [key for key in self._reserved if key[1] == life]:
                del self._reserved[key]

    def _is_over(self, life: Life) -> bool:
        """Of a life that has no account: whether it had one before."""
        return life[1].agent_start == self._agent_start or life in self._ended

    # Sums and views.

    def _charged(self) -> int:
        leased = sum(account.lease.charged for account in self._accounts.values())
        return self._margin + self._strangers + sum(self._reserved.values()) + leased

    def _lease(self, holder: str, lease_class: LeaseClass, pages: int = 0) -> Lease:
        return Lease(holder=holder, gpu_id=self.gpu.gpu_id, lease_class=lease_class, revision=0, level=pages, held=pages)

    def _entries(self, now: float) -> Iterator[Entry]:
        for lease_class, pages in ((LeaseClass.MARGIN, self._margin), (LeaseClass.STRANGERS, self._strangers)):
            if pages:
                yield Entry(lease=self._lease("", lease_class, pages), allotted=pages)
        for (worker, life, lease_class), pages in self._reserved.items():
            yield Entry(
                lease=self._lease(str(life[0]) if life else worker, lease_class, pages),
                worker=worker,
                epoch=life[1] if life else None,
                allotted=pages,
                wanted=pages,
            )
        for (_, epoch), account in self._accounts.items():
            yield Entry(
                lease=account.lease,
                worker=account.worker,
                epoch=epoch,
                allotted=account.allotted,
                wanted=account.wanted,
                overdue_s=max(0.0, now - account.deadline_s) if account.recalled else 0.0,
            )

    def _refuse_unreservable(self, lease_class: LeaseClass, pages: int) -> None:
        if lease_class in _NOT_FOR_HOLDERS or pages < 0:
            raise ValueError(f"a holder cannot reserve {pages} pages of {lease_class}")
