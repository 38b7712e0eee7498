"""The ledger at one moment, as its readers see it: who holds how many pages of each GPU, and what is on its way.

One type for every reader: `chimera memory`, the dashboard, metrics. `version` grows when a field changes its meaning;
new fields come with defaults, so an older reader still understands a newer ledger.
"""

from __future__ import annotations

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.lease import Lease, LeaseClass
from chimera.core.replica import Epoch

LEDGER_VIEW_VERSION = 1


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the ledger: pages of one class that one holder may have."""

    lease: Lease
    worker: str = ""
    """The process that has the pages; empty for the margin and for strangers."""
    epoch: Epoch | None = None
    """The replica's life; empty for what stays with the worker."""
    allotted: int = 0
    """The level its scheduler wants it at."""
    wanted: int = 0
    """The level its holder last asked for."""
    overdue_s: float = 0.0
    """How long past its deadline a recall is still unanswered."""


class GpuLedgerView(msgspec.Struct, frozen=True, kw_only=True):
    gpu: Gpu
    entries: tuple[Entry, ...] = ()
    learning: bool = False
    """The ledger has restarted and still waits for holders to speak; until then nothing new is given."""

    @property
    def charged(self) -> int:
        return sum(entry.lease.charged for entry in self.entries)

    @property
    def free(self) -> int:
        return max(0, self.gpu.pages - self.charged)

    @property
    def short(self) -> int:
        """Pages charged beyond the capacity: strangers came, or a holder spoke up after the ledger had stopped waiting."""
        return max(0, self.charged - self.gpu.pages)

    def by_class(self) -> dict[LeaseClass, int]:
        """Pages charged per class, in the classes' order; classes that hold nothing are left out."""
        sums = dict.fromkeys(LeaseClass, 0)
        for entry in self.entries:
            sums[entry.lease.lease_class] += entry.lease.charged
        return {lease_class: pages for lease_class, pages in sums.items() if pages}


class LedgerView(msgspec.Struct, frozen=True, kw_only=True):
    version: int = LEDGER_VIEW_VERSION
    now_s: float
    gpus: tuple[GpuLedgerView, ...] = ()
