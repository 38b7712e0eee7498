"""The ledgers of all GPUs of one node behind one door. Routes; decides and sums nothing across GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chimera.core.ledger_view import LedgerView
from chimera.errors import ProtocolError
from chimera.ledger.book import GpuLedger, Order
from chimera.msg.events import Event, GpuSampled, PagesHeld, PagesKept, PagesReturned, PagesWanted


class NodeLedger:
    def __init__(self, ledgers: Iterable[GpuLedger]) -> None:
        self._of_gpu = {ledger.gpu.gpu_id: ledger for ledger in ledgers}

    def __getitem__(self, gpu_id: int) -> GpuLedger:
        return self._of_gpu[gpu_id]

    def __iter__(self) -> Iterator[GpuLedger]:
        return iter(self._of_gpu.values())

    @property
    def next_wake_s(self) -> float | None:
        return min((at_s for ledger in self if (at_s := ledger.next_wake_s) is not None), default=None)

    def on(self, event: Event, now: float) -> list[Order]:
        """To the GPU it speaks of; what speaks of none (a stopped replica, a lost worker, the time) goes to all."""
        match event:
            case PagesReturned() | PagesWanted() | PagesHeld() | PagesKept() | GpuSampled():
                ledger = self._of_gpu.get(event.gpu_id)
                if ledger is None:
                    raise ProtocolError(f"{type(event).__name__} speaks of GPU {event.gpu_id}, which is not on this node")
                return ledger.on(event, now)
            case _:
                return [order for ledger in self for order in ledger.on(event, now)]

    def view(self, now: float) -> LedgerView:
        return LedgerView(now_s=now, gpus=tuple(ledger.view(now) for ledger in self))
