"""Models that have left and are kept whole: which ones, for how long, and who goes when the shelf is full.

Knows what each costs to keep and to build again; not what it consists of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from chimera.core.model import ModelSpec
from chimera.units import MIB

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Berth:
    """What a kept model fits: who is to come back must ask for just this."""

    model: ModelSpec
    image: str
    """Of which files, loaded how."""
    gpu_ids: tuple[int, ...]
    ceiling_bytes: int | None


@dataclass(slots=True, kw_only=True)
class Parked(Generic[T]):
    berth: Berth
    what: T
    nbytes: int
    """What it keeps of the memory that it ran in."""
    build_s: float
    """What it took to bring it up when it was not kept."""
    since_s: float = field(default_factory=time.monotonic)


class Shelf(Generic[T]):
    """At most `most` models, and `most_bytes` on each GPU; `discard` ends what must go."""

    def __init__(self, most: int, most_bytes: int | None, discard: Callable[[T], None]) -> None:
        self.most = most
        self.most_bytes = most_bytes
        self._discard = discard
        self._parked: list[Parked[T]] = []

    @property
    def all(self) -> tuple[Parked[T], ...]:
        """Who came last comes last."""
        return tuple(self._parked)

    def on(self, gpu_id: int) -> list[Parked[T]]:
        return [parked for parked in self._parked if parked.berth.gpu_ids[0] == gpu_id]

    def put(self, parked: Parked[T]) -> None:
        """Keep it, unless it is what is worth least where not all can stay."""
        for known in [known for known in self._parked if known.berth == parked.berth]:
            self._drop(known, "it was built anew")
        self._parked.append(parked)
        while len(self._parked) > self.most:
            self._drop(self._least(self._parked), f"{self.most} models are kept")
        if self.most_bytes is not None:
            self.trim(self.most_bytes, "what is kept has a budget", parked.berth.gpu_ids[0])

    def take(self, berth: Berth) -> Parked[T] | None:
        for parked in self._parked:
            if parked.berth == berth:
                self._parked.remove(parked)
                return parked
        return None

    def trim(self, most_bytes: int, reason: str, gpu_id: int) -> None:
        """On one GPU, the least loss goes first, until no more than this is kept there."""
        while (here := self.on(gpu_id)) and sum(parked.nbytes for parked in here) > most_bytes:
            self._drop(self._least(here), reason)

    def clear(self, reason: str) -> None:
        while self._parked:
            self._drop(self._parked[0], reason)

    def _least(self, among: list[Parked[T]]) -> Parked[T]:
        """Seconds to build again, per byte, the less the longer nobody has asked for it: as images are valued."""
        now_s = time.monotonic()

        def worth(parked: Parked[T]) -> float:
            return parked.build_s / max(MIB, parked.nbytes) / max(0.001, now_s - parked.since_s)

        return min(among, key=worth)

    def _drop(self, parked: Parked[T], reason: str) -> None:
        self._parked.remove(parked)
        log.info("let go of parked model=%s bytes=%d reason=%s", parked.berth.model.name, parked.nbytes, reason)
        self._discard(parked.what)
