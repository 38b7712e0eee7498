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
        ties.keep_as(self._told_anew)

    def on(self, gpu_id: int, page_bytes: int) -> Kept:
        self._page_bytes[gpu_id] = page_bytes
        remains = self._engine.remains(gpu_id)
        return Kept(models=remains.models, pages=ceil_div(remains.nbytes, page_bytes))

    def tell(self, gpu_id: int, page_bytes: int) -> None:
        self._ties.tell_agent(PagesKept(worker=self._ties.worker, gpu_id=gpu_id, kept=self.on(gpu_id, page_bytes)))

    def obey(self, order: LetGo) -> None:
        self._engine.let_go(order.gpu_id, order.pages * order.page_bytes, order.reason)
        self.tell(order.gpu_id, order.page_bytes)

    def _told_anew(self) -> list[Message]:
        kept = {gpu_id: self.on(gpu_id, page_bytes) for gpu_id, page_bytes in self._page_bytes.items()}
        return [PagesKept(worker=self._ties.worker, gpu_id=gpu_id, kept=what) for gpu_id, what in kept.items() if what.models]
