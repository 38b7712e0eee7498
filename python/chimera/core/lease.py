"""The right of one holder to a number of pages on one GPU.

Lease messages carry levels, never differences: a repeated or late message can be recognised by its revision and
costs nothing. What is charged is the larger of the level last sent and the level last confirmed as held.
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
    """Pages the holder last said it has."""

    @property
    def charged(self) -> int:
        return max(self.level, self.held)

    @property
    def settled(self) -> bool:
        return self.level == self.held
