"""A holder as its ledger knows it: orders in, answers out, and pages that are only a number.

The whole of the holder's contract, without memory behind it: the simulated worker, the benchmark and the tests hold their
pages this way, and an elastic pool keeps to the same words. Knows no socket and no clock.
"""

from __future__ import annotations

from chimera.core.lease import LeaseClass, Terms
from chimera.core.replica import Epoch, ReplicaId
from chimera.ledger.book import Order
from chimera.msg.events import PagesHeld, PagesReturned, PagesWanted


class Holder:
    """One replica's lease on one GPU, from inside the worker that lives it."""

    def __init__(self, replica: ReplicaId, epoch: Epoch, *, worker: str, gpu_id: int) -> None:
        self.replica = replica
        self.epoch = epoch
        self.worker = worker
        self.gpu_id = gpu_id
        self.terms = Terms()
        self.held = 0
        self.busy = 0
        """Pages that cannot leave now, because work in flight is on them."""

    def obey(self, order: Order) -> PagesReturned:
        """Every order is answered, a stale or repeated one with what holds now."""
        self.terms = self.terms.told(order.revision, order.level)
        return self.settle()

    def settle(self) -> PagesReturned:
        """Give back what is above the level and not busy, and say what is left."""
        self.held = min(self.held, max(self.terms.level, self.busy))
        return PagesReturned(
            replica=self.replica,
            epoch=self.epoch,
            gpu_id=self.gpu_id,
            revision=self.terms.revision,
            level=self.terms.answer(self.held),
        )

    def take(self, pages: int) -> int:
        """Take up to `pages` more, as far as the terms allow; asks nobody. Returns how many it got."""
        taken = max(0, min(pages, self.terms.level - self.held))
        self.held += taken
        return taken

    def want(self, level: int) -> PagesWanted:
        return PagesWanted(
            replica=self.replica, epoch=self.epoch, gpu_id=self.gpu_id, revision=self.terms.revision, level=level
        )

    def announce(
        self, *, reserved: dict[LeaseClass, int] | None = None, kept: dict[LeaseClass, int] | None = None
    ) -> PagesHeld:
        """The first words on a new connection."""
        return PagesHeld(
            worker=self.worker,
            gpu_id=self.gpu_id,
            kept=kept or {},
            replica=self.replica,
            epoch=self.epoch,
            reserved=reserved or {},
            revision=self.terms.revision,
            level=self.terms.level,
            held=self.held,
        )
