"""What the scripts of this folder share: where traces and models are, and one replay of a cell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from chimera.config.cost_tables import read_cost_table
from chimera.config.paper_models import read_paper_models
from chimera.core.model import ModelSpec
from chimera.sched.cost import CostTable
from chimera.sim.placing import gpus_of, promises
from chimera.sim.run import Outcome, Scenario, simulate
from chimera.trace.reader import read_trace
from chimera.trace.trace import Trace, names_for

HERE = Path(__file__).parent
TRACES = HERE.parents[1] / "../shared/traces"
SLO_SCALE = 5.0


Prepared = tuple[tuple[ModelSpec, ...], Trace]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One load on one cluster."""

    trace: str
    from_s: float
    to_s: float
    models: str
    gpus: int
    level: str
    """How much of this load `static` attains, roughly."""
    rate: float

    @property
    def name(self) -> str:
        return f"{self.trace.split('_first')[0]}@{self.from_s:g} {self.models}/{self.gpus} {self.level}"


def costs() -> CostTable:
    return msgspec.json.decode(read_cost_table("h100-80g-like"), type=CostTable)


def prepared(cell: Cell, traces: Path, table: CostTable) -> Prepared:
    """The cell's models with their promises, and its trace before any scaling. Promises do not depend on rate or seed."""
    models = read_paper_models(HERE / "models" / f"{cell.models}.json")
    trace = read_trace(traces / f"{cell.trace}.csv.gz").cut(cell.from_s, cell.to_s)
    trace = trace.renamed(names_for(trace, [model.name for model in models]))
    return promises(models, trace, table, SLO_SCALE), trace


def replay(cell: Cell, ready: Prepared, table: CostTable, policy: str, local: str | None, seed: int) -> Outcome:
    models, trace = ready
    scenario = Scenario(models=models, gpus=gpus_of(cell.gpus, table.gpu_bytes), costs=table, policy=policy, local=local)
    return simulate(scenario, trace.rate_scaled(cell.rate, seed))
