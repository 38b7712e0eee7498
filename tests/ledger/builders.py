"""Builders: a GPU of a few pages, lives with short names, and holders that answer at once when asked to."""

from collections.abc import Iterable

from chimera.core.gpu import Gpu
from chimera.core.lease import LeaseClass
from chimera.core.ledger_view import Entry
from chimera.core.replica import Epoch, ReplicaId
from chimera.ledger.book import GpuLedger, Life, Order, Survivors
from chimera.ledger.holder import Holder
from chimera.units import MIB

NOW = 100.0
AGENT_START = 7


def gpu(pages: int, gpu_id: int = 0) -> Gpu:
    return Gpu(gpu_id=gpu_id, capacity_bytes=pages * 2 * MIB)


def ledger_of(pages: int, *, margin: int = 0, survivors: Survivors | None = None) -> GpuLedger:
    return GpuLedger(gpu(pages), margin_pages=margin, agent_start=AGENT_START, survivors=survivors)


def life(name: str, counter: int = 1, agent_start: int = AGENT_START) -> Life:
    return ReplicaId(name), Epoch(agent_start, counter)


def holder_of(of: Life, *, worker: str = "", gpu_id: int = 0) -> Holder:
    return Holder(*of, worker=worker or f"w-{of[0].model}", gpu_id=gpu_id)


def opened(ledger: GpuLedger, name: str, *, level: int = 0) -> Holder:
    """A holder whose lease is settled at `level`, all of it in use."""
    holder = holder_of(life(name))
    ledger.open((holder.replica, holder.epoch), holder.worker)
    if level:
        obeyed(ledger, [holder], allot(ledger, holder, level))
        assert holder.take(level) == level, "the builder needs free pages"
    return holder


def allot(ledger: GpuLedger, holder: Holder, level: int, *, now: float = NOW, deadline_s: float = NOW + 1) -> list[Order]:
    return ledger.allot((holder.replica, holder.epoch), level, now=now, deadline_s=deadline_s, reason="test")


def obeyed(ledger: GpuLedger, holders: Iterable[Holder], orders: list[Order], *, now: float = NOW) -> None:
    """Deliver every order and every answer, at once and in order, until nothing is said any more."""
    of_life = {(holder.replica, holder.epoch): holder for holder in holders}
    while orders:
        order = orders.pop(0)
        answer = of_life[order.replica, order.epoch].obey(order)
        orders += ledger.on(answer, now)
        ledger.check()


def levels(orders: list[Order]) -> list[tuple[str, str, int]]:
    return [(type(order).__name__, order.replica.model, order.level) for order in orders]


def entry(ledger: GpuLedger, holder: Holder, *, now: float = NOW) -> Entry:
    """The holder's elastic lease."""
    leases = [e for e in ledger.view(now).entries if e.lease.lease_class is LeaseClass.KV]
    return next(e for e in leases if (e.lease.holder, e.epoch) == (str(holder.replica), holder.epoch))
