"""What a policy is given and what it answers. Decides nothing."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from chimera.core.placement import Placement
from chimera.core.record import Alternative
from chimera.core.replica import ReplicaId
from chimera.core.snapshot import Snapshot
from chimera.sched.cost import CostTable

TICK_S = 0.25
"""The longest that a policy looks away while requests are under way."""
CALM_S = 2.0
"""The longest that it looks away at all."""


class WarmRules(msgspec.Struct, frozen=True, kw_only=True):
    """How models that nobody asks for are kept; the same for every policy."""

    order: Literal["lru", "lfu"] = "lru"
    """Who leaves first: whoever was idle longest, or whoever was asked least of late."""
    most_models: int | None = None
    """How many models may be warm at once."""
    most_bytes: int | None = None
    """How much all warm models may hold on all GPUs, weights and engines."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """All that a policy goes by."""

    snapshot: Snapshot
    filed: Placement
    """What the operator wrote."""
    wanted: Placement
    """What the last decision was."""
    costs: CostTable
    warm: WarmRules = WarmRules()


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    placement: Placement
    reasons: dict[ReplicaId, str] = {}
    """Why a replica starts or leaves, in words for people."""
    alternatives: dict[ReplicaId, tuple[Alternative, ...]] = {}
    """What else was weighed for it, what was chosen among them."""
    again_s: float = CALM_S
    """When to ask again, whatever happens; a request for a model without a replica asks at once."""


class Policy(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def on_demand(self) -> bool:
        """Whether a model without a replica may get one when it is asked for; if not, its requests are refused."""

    def decide(self, question: Question) -> Decision: ...
