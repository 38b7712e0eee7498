"""What the ranks of a gang have to agree on before they are one engine: each says a word, and hears everybody's."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import torch.distributed

from chimera.msg.actions import Place

_AS_LONG_AS_IT_TAKES = timedelta(days=1)
"""Another gang may be building what this one waits for. Who waits for a lost rank is ended by the agent."""


class Council:
    def __init__(self, place: Place, size: int) -> None:
        self.place = place
        self._rank, self._size = place.rank, size
        self._store = torch.distributed.FileStore(place_of(place, "council").meeting, size)
        self._store.set_timeout(_AS_LONG_AS_IT_TAKES)
        self._round = 0

    def hear_all(self, word: str) -> list[str]:
        """By rank, when the last has spoken."""
        self._round += 1
        self._store.set(f"{self._round}/{self._rank}", word)
        return [self._store.get(f"{self._round}/{rank}").decode() for rank in range(self._size)]

    def place_for(self, purpose: str) -> Place:
        return place_of(self.place, purpose)


def place_of(place: Place, purpose: str) -> Place:
    """The same rank, where the ranks meet for something else: no two groups can meet in one file."""
    return msgspec.structs.replace(place, meeting=f"{place.meeting}.{purpose}")
