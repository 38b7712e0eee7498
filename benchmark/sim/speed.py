"""How fast the decisions and the simulator are: a day of ServeGen on paper, and what one decision takes.

python -m benchmark.sim.speed [--json FILE]

Seconds are those of the process on its core, so that what else runs on the machine counts as little as it can.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import process_time

import msgspec
from chimera.config.paper_models import read_paper_models
from chimera.core.model import ModelSpec, Slo
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.msg.actions import Activate, Route
from chimera.msg.events import Outcome, ReplicaReady, RequestFinished
from chimera.sched.gpu import GpuScheduler, Mint
from chimera.sched.policies import POLICIES
from chimera.sched.policies.policy import Decision, Question
from chimera.sim.placing import gpus_of, promises
from chimera.sim.run import Scenario, simulate
from chimera.trace.reader import read_trace
from chimera.trace.trace import names_for

from benchmark import report
from benchmark.sim.bench import HERE, SLO_SCALE, TRACES, costs

QUEUED = 10_000
DECISIONS = 2_000


def main() -> int:
    options = report.parser(__doc__)
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--policies", default="static,flexible")
    arguments = options.parse_args()
    figures = report.Figures("decisions and simulator", seed=arguments.seed)
    for local in ("fcfs", "slack", "moore-hodgson", "goodput"):
        figures.samples(f"local decision, {QUEUED} queued, {local}", _local(local), "µs, median", at_most=200)
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    _day(figures, arguments.traces, arguments.policies.split(","))
    return figures.finish(arguments.json)


def _local(local: str) -> list[float]:
    """Each value is the mean of a hundred decisions: one request has ended, and who is next?"""
    table = msgspec.structs.replace(costs(), running=64)
    model = msgspec.structs.replace(read_paper_models(HERE / "models/18.json")[0], slo=Slo(ttft_s=600.0, tpot_s=1.0))
    gpu, epoch, replica = GpuScheduler(0, Mint(1), local, table), Epoch(1, 1), ReplicaId(model.name)
    gpu.on(Activate(model=model, seat=Seat(replica=replica, gpu_ids=(0,)), reason="wanted"), 0.0)
    ready = ReplicaReady(replica=replica, epoch=epoch, credits=64, kv_tokens=10**6, context_length=131072, load_s=0.1)
    gpu.on(ready, 0.0)
    running: list[str] = []
    for number in range(QUEUED + DECISIONS):
        request = _request(number, model)
        admitted = gpu.on(Route(request=request, replica=replica, agent="a", reason=""), 0.0)
        running += [action.request_id for action in admitted if hasattr(action, "request_id")]
    means = []
    now = 1.0
    for _ in range(DECISIONS // 100):
        began = process_time()
        for _ in range(100):
            now += 0.2
            if not running:
                break
            ended = RequestFinished(
                request_id=running.pop(0), replica=replica, epoch=epoch, outcome=Outcome.STOP, output_tokens=10
            )
            running += [action.request_id for action in gpu.on(ended, now) if hasattr(action, "request_id")]
        means.append((process_time() - began) / 100 * 1e6)
    return means


def _request(number: int, model: ModelSpec) -> Request:
    return Request(
        request_id=str(number),
        model=model.name,
        front="f",
        prompt_tokens=50 + number * 37 % 500,
        max_tokens=64,
        arrived_s=number * 1e-4,
        slo=model.slo,
    )


class _Timed(msgspec.Struct, frozen=True):
    """A policy with a stop-watch."""

    inner: object
    spent: list[float]

    @property
    def name(self) -> str:
        return self.inner.name  # type: ignore[attr-defined,no-any-return]

    @property
    def on_demand(self) -> bool:
        return self.inner.on_demand  # type: ignore[attr-defined,no-any-return]

    def decide(self, question: Question) -> Decision:
        began = process_time()
        decision = self.inner.decide(question)  # type: ignore[attr-defined]
        self.spent.append(process_time() - began)
        return decision  # type: ignore[no-any-return]


def _day(figures: report.Figures, traces: Path, policies: list[str]) -> None:
    table = costs()
    models = read_paper_models(HERE / "models/18.json")
    trace = read_trace(traces / "servegen_18tenants_day.csv.gz")
    trace = trace.renamed(names_for(trace, [model.name for model in models]))
    models = promises(models, trace, table, SLO_SCALE)
    for policy in policies:
        timed = _Timed(POLICIES[policy], [])
        POLICIES[policy] = timed
        scenario = Scenario(models=models, gpus=gpus_of(8, table.gpu_bytes), costs=table, policy=policy)
        began = process_time()
        outcome = simulate(scenario, trace)
        spent_s = process_time() - began
        POLICIES[policy] = timed.inner  # type: ignore[assignment]
        figures.add(f"a day of ServeGen, {len(trace.rows)} requests, 18/8, {policy}", spent_s, "s", at_most=60)
        figures.add(f"  joint attainment, {policy}", 100 * outcome.metrics.joint_attainment, "%")
        if len(timed.spent) > 100:
            figures.add(f"  placement decisions, {policy}", len(timed.spent), "")
            figures.add(f"  one of them, p50, {policy}", 1e3 * report.percentile(timed.spent, 50), "ms")
            figures.add(f"  one of them, p99, {policy}", 1e3 * report.percentile(timed.spent, 99), "ms", at_most=5)


if __name__ == "__main__":
    raise SystemExit(main())
