"""What control is put in charge of: the models, and where they are wanted, as whoever started the system has read them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.sched.cost import CostTable
from chimera.sched.policies.policy import WarmRules


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[ModelSpec, ...]
    wanted: Placement
    policy: str = "static"
    local: str | None = None
    """In which order requests go; `None`: ours, where there is a cost table."""
    costs: CostTable | None = None
    """What work costs on these machines; every policy but `static` needs it."""
    warm: WarmRules = WarmRules()

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self))
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> Charge:
        return msgspec.json.decode(path.read_bytes(), type=cls)
