"""The right of one holder to a number of pages on one GPU, as its ledger and as the holder see it.

Lease messages carry levels, never differences: a repeated or late message can be recognised by its revision and
costs nothing. What is charged is the larger of the level last sent and the level last held. The holder's side is
`Terms`: it answers every order, upward or downward, once it keeps to it.
"""

from __future__ import annotations

import enum

import msgspec


class LeaseClass(enum.StrEnum):
    """What the pages of a GPU are used for; the ledger adds them up by class."""

    WEIGHTS = "weights"
    KV = "kv"
    ADAPTER = "adapter"
    GRAPH = "graph"
    WORKSPACE = "workspace"
    CONTEXT = "context"
    MARGIN = "margin"
    STRANGERS = "strangers"


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    holder: str
    """The replica or the worker that may use the pages."""
    gpu_id: int
    lease_class: LeaseClass
    revision: int
    level: int
    """Pages granted by the newest revision."""
    held: int
    """Pages the holder last said it has, or may have taken under an earlier revision that it has not answered."""
    confirmed: int = 0
    """The newest revision that the holder has answered."""

    @property
    def charged(self) -> int:
        return max(self.level, self.held)

    @property
    def settled(self) -> bool:
        return self.confirmed == self.revision and self.level == self.held

    def at(self, level: int) -> Lease:
        """The next revision. Until the holder answers it, it may have taken all that the last one allowed."""
        return msgspec.structs.replace(self, revision=self.revision + 1, level=level, held=self.charged)

    def answered(self, revision: int, held: int) -> Lease:
        """The holder has read `revision` and has at most `held` pages. Only the newest revision's answers count.

        Under one revision what is held only falls, so answers may overtake each other; and it counts as no less than the
        level, all of which the holder may use whenever it likes.
        """
        if revision != self.revision:
            return self
        return msgspec.structs.replace(self, confirmed=revision, held=max(self.level, min(self.held, held)))


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a holder was last told: it may grow to `level` and no further."""

    revision: int = 0
    level: int = 0

    def told(self, revision: int, level: int) -> Terms:
        """The terms after an order. The newest revision wins, however late or often it comes."""
        return Terms(revision=revision, level=level) if revision > self.revision else self

    def answer(self, held: int) -> int:
        """What to say to the ledger: the most the holder has or may still take."""
        return max(self.level, held)
