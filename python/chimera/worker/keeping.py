"""What a worker keeps of models that have left, in the pages in which its agent counts, and how it lets go of them.

Knows the engine that keeps them and the connection to the agent; which go is the engine's to say.
"""

from __future__ import annotations

from chimera.engine.api import Engine
from chimera.msg.events import Kept, PagesKept
from chimera.msg.stream import LetGo
from chimera.units import ceil_div
from chimera.wire.codec import Message
from chimera.worker.ties import Ties


class Keeping:
    def __init__(self, engine: Engine, ties: Ties) -> None:
        self._engine = engine
        self._ties = ties
        self._page_bytes: dict[int, int] = {}
        """By GPU, as a lease or an order there had it."""
        self._told: dict[int, Kept] = {}
        ties.keep_as(self._told_anew)

    def told(self, gpu_id: int, page_bytes: int) -> Kept:
        """What there is on a GPU, for whoever tells it the agent at once."""
        self._page_bytes[gpu_id] = page_bytes
        self._told[gpu_id] = kept = self._now(gpu_id)
        return kept

    def tell_changes(self) -> None:
        """Whatever the agent has not heard yet."""
        for gpu_id, told in list(self._told.items()):
            if self._now(gpu_id) != told:
                self._ties.tell_agent(self._news(gpu_id))

    def obey(self, order: LetGo) -> None:
        self._page_bytes[order.gpu_id] = order.page_bytes
        self._engine.let_go(order.gpu_id, order.pages * order.page_bytes, order.reason)
        self._ties.tell_agent(self._news(order.gpu_id))

    def _news(self, gpu_id: int) -> PagesKept:
        return PagesKept(worker=self._ties.worker, gpu_id=gpu_id, kept=self.told(gpu_id, self._page_bytes[gpu_id]))

    def _now(self, gpu_id: int) -> Kept:
        remains = self._engine.remains(gpu_id)
        return Kept(models=remains.models, pages=ceil_div(remains.nbytes, self._page_bytes[gpu_id]))

    def _told_anew(self) -> list[Message]:
        return [self._news(gpu_id) for gpu_id in self._told]
