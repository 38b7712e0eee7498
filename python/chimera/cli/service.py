"""What is to be served, and how: all that the supervisor is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from chimera.cli.filing import Filing
from chimera.cli.images import Images
from chimera.cli.keeping import Keeping
from chimera.core.access import Access
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.sched.cost import CostTable
from chimera.sched.policies.policy import WarmRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is to be served, and how."""

    models: tuple[ModelSpec, ...]
    wanted: Placement
    gpus: tuple[Gpu, ...]
    policy: str = "static"
    local: str | None = None
    warm: WarmRules = field(default_factory=WarmRules)
    costs: CostTable | None = None
    engine: str = "sglang"
    elastic: bool = True
    """KV pools share what is free beside the weights; else each has its own, reserved."""
    host: str = "127.0.0.1"
    port: int = 8000
    fronts: int = 1
    drain_s: float = 30.0
    silent_s: float = 300.0
    log_level: str = "warning"
    log_dir: Path | None = None
    """Where logs and decisions are kept; else logs go to standard error and decisions go with the run directory."""
    run_dir: Path | None = None
    keeping: Keeping = field(default_factory=Keeping)
    """Metrics and records."""
    access: Access = field(default_factory=Access)
    images: Images | None = None
    """Where workers share weights; else each reads its model's files."""
    parked_models: int = 0
    """How many that have left a worker stay in it, to be there at once when they return."""
    parked_bytes: int | None = None
    host_kv_bytes: int = 0
    """What each worker may keep of their caches in host memory."""
    spare_workers: int = 0
    prepare: tuple[ModelSpec, ...] = ()
    """Models to have an image of, before anybody asks for them."""
    prepare_at_once: int = 1
    async_loading: bool = False
    """Where it listens is said before the models are there."""
    filing: Filing | None = None
    """Where the operator's wishes are read again while it runs."""
