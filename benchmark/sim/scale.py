"""How far the simulator and the global decisions go: up to 1,000 GPUs and 2,000 models, a thousand requests a second.

python benchmark/sim/scale.py [--json FILE] [--plot FILE] [--sizes 16,64] [--whole-s 0]

The GPUs are H100s on paper, eight to a node, with two models and one request a second for each; the tenants are ServeGen's
(`tenants.py`). The largest size goes first, and is played for a whole hour. Each run is a process of its own, so that its
memory is its own, and its seconds are those that the process spent on its core: what else runs on the machine slows them, but
is not counted. A decision is all that control does when a policy is asked: the snapshot, the policy, and what comes of its
answer. The same is measured with everything in one cell, to show what cells are for.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import process_time

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.bench.canvas import Svg
from chimera.core.snapshot import Snapshot
from chimera.msg.actions import Action
from chimera.sched import cells
from chimera.sched.cells import Cell
from chimera.sched.plan import Plan
from chimera.sim.placing import gpus_of
from chimera.sim.run import Outcome, Scenario, play
from chimera.trace.trace import Row

from benchmark import report
from benchmark.sim.bench import SLO_SCALE, TRACES, costs
from benchmark.sim.tenants import tenants

SIZES = "16,64,250,1000"
SHORT_S = 120.0
UNDIVIDED = 250
"""The most GPUs that are also tried as one cell, and for how long."""
UNDIVIDED_S = 30.0
MOST_S = 15 * 60.0
MOST_MIB = 8 * 1024.0
MOST_MS = 10.0
TOLD_EVERY_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    traces: Path
    gpus: int
    seconds: float
    seed: int
    policy: str
    divided: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    requests: int
    spent_s: float
    """From the first GPU to the last figure; the trace was there."""
    peak_mib: float
    decisions_ms: tuple[float, ...]
    outcome: Outcome


def main() -> int:
    options = report.parser(__doc__)
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--sizes", default=SIZES, help=f"GPUs; the most are played for --whole-s (default {SIZES})")
    options.add_argument("--whole-s", type=float, default=3600.0, help="0: as short as the others")
    options.add_argument("--policy", default="flexible")
    options.add_argument("--plot", type=Path, metavar="FILE", help="the cost of a decision against size, as SVG")
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    figures = report.Figures("scale: a thousand GPUs, two thousand models", seed=arguments.seed)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    lines: dict[str, list[tuple[int, Played]]] = {"in cells": [], "as one": []}
    for task in _tasks(arguments, sizes):
        way = "in cells" if task.divided else "as one"
        played = _alone(task)
        lines[way].append((task.gpus, played))
        _tell(figures, task, way, played)
    if arguments.plot is not None:
        curves = {way: [(gpus, _mean(played.decisions_ms)) for gpus, played in reversed(runs)] for way, runs in lines.items()}
        arguments.plot.write_text(_drawn(curves) + "\n")
    return figures.finish(arguments.json)


def _tasks(arguments: argparse.Namespace, sizes: list[int]) -> Iterator[Task]:
    common = {"traces": arguments.traces, "seed": arguments.seed, "policy": arguments.policy}
    for size in sorted(sizes, reverse=True):
        whole = arguments.whole_s if size == max(sizes) and arguments.whole_s else SHORT_S
        yield Task(gpus=size, seconds=whole, **common)
        if cells.TOGETHER < size <= UNDIVIDED:
            yield Task(gpus=size, seconds=UNDIVIDED_S, divided=False, **common)


def _tell(figures: report.Figures, task: Task, way: str, played: Played) -> None:
    name = f"{task.gpus:,} GPUs {way}"
    what = f"{played.requests:,} requests in {task.seconds:g} s of paper"
    judged = task.gpus >= 1000 and task.divided
    hour = judged and task.seconds >= 3600
    figures.add(f"{name}: {what}, process time", played.spent_s, "s", at_most=MOST_S if hour else None)
    figures.add(f"{name}: peak memory", played.peak_mib, "MiB", at_most=MOST_MIB if hour else None)
    figures.add(f"{name}: requests played", played.requests / played.spent_s, "1/s of a core")
    mean, decisions = _mean(played.decisions_ms), sorted(played.decisions_ms)
    figures.add(f"{name}: a placement decision, mean of {len(decisions):,}", mean, "ms", at_most=MOST_MS if judged else None)
    figures.add(f"{name}: a placement decision, p99", report.percentile(decisions, 99), "ms")
    figures.add(f"{name}: joint attainment", 100 * played.outcome.metrics.joint_attainment, "%")
    figures.add(f"{name}: activations", played.outcome.switches, "")
    figures.add(f"{name}: moves among them", played.outcome.moves, "")


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _alone(task: Task) -> Played:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_play, task).result()


def _play(task: Task) -> Played:
    if not task.divided:
        cells.TOGETHER = task.gpus
    spent_ms: list[float] = []
    Plan.review = _timed(Plan.review, spent_ms)  # type: ignore[method-assign]
    table = costs()
    load = tenants(
        task.traces,
        models=2 * task.gpus,
        rate=task.gpus,
        seconds=task.seconds,
        costs=table,
        slo_scale=SLO_SCALE,
        seed=task.seed,
    )
    scenario = Scenario(models=load.models, gpus=gpus_of(task.gpus, table.gpu_bytes), costs=table, policy=task.policy)
    began = process_time()
    outcome = play(scenario, _told(load.rows(), began))
    spent_s = process_time() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Played(requests=len(load), spent_s=spent_s, peak_mib=peak_mib, decisions_ms=tuple(spent_ms), outcome=outcome)


Review = Callable[[Plan, Callable[[float, Cell | None], Snapshot], float], Iterator[Action]]


def _timed(review: Review, spent_ms: list[float]) -> Review:
    """The plan's review with a stop-watch."""

    def timed(plan: Plan, snapshot: Callable[[float, Cell | None], Snapshot], now: float) -> Iterator[Action]:
        began = process_time()
        actions = list(review(plan, snapshot, now))
        spent_ms.append(1e3 * (process_time() - began))
        return iter(actions)

    return timed


def _told(rows: Iterator[Row], began: float) -> Iterator[Row]:
    """Says how far it is, now and then: an hour of a thousand a second takes a while."""
    due_s = TOLD_EVERY_S
    for row in rows:
        if row.at_s >= due_s:
            print(f"# {due_s:.0f} s played in {process_time() - began:.0f}", file=sys.stderr, flush=True)
            due_s += TOLD_EVERY_S
        yield row


# The plot.

COLORS = {"in cells": "#2563eb", "as one": "#d97706"}


def _drawn(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Both axes are logarithmic: a decision that costs a GPU's worth more for each GPU goes up as steeply as it goes along."""
    canvas = Svg(640, 360)
    left, right, top, bottom = 70.0, 600.0, 40.0, 310.0
    points = [point for curve in curves.values() for point in curve]
    sizes = sorted({size for size, _ in points})
    low, high = (
        math.floor(math.log10(min(ms for _, ms in points))),
        math.ceil(math.log10(max(MOST_MS, *(m for _, m in points)))),
    )

    def at(size: float, ms: float) -> tuple[float, float]:
        along = math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else 0.5
        up = (math.log10(ms) - low) / (high - low)
        return left + along * (right - left), bottom - up * (bottom - top)

    canvas.text(left, 18, "A placement decision, mean, against the number of GPUs", size=14)
    for decade in range(low, high + 1):
        _, y = at(sizes[0], 10.0**decade)
        canvas.line([(left, y), (right, y)], "#e2e5ea")
        canvas.text(left - 8, y, f"{10.0**decade:g} ms", anchor="end")
    for size in sizes:
        x, _ = at(size, 10.0**low)
        canvas.text(x, bottom + 16, f"{size:,}", anchor="middle")
    canvas.text((left + right) / 2, bottom + 36, "GPUs, with two models and one request a second each", anchor="middle")
    canvas.line([at(sizes[0], MOST_MS), at(sizes[-1], MOST_MS)], "#6b7280", dashed=True)
    for way, curve in curves.items():
        placed = [at(size, ms) for size, ms in curve]
        if not placed:
            continue
        canvas.line(placed, COLORS[way], width=2.5)
        for (x, y), (_, ms) in zip(placed, curve, strict=True):
            canvas.rect(x - 3, y - 3, 6, 6, COLORS[way], tip=f"{ms:.2f} ms {way}")
        canvas.text(placed[-1][0], placed[-1][1] - 14, way, anchor="end", color=COLORS[way])
    return canvas.markup("The cost of a placement decision against the number of GPUs, in cells and as one")


if __name__ == "__main__":
    raise SystemExit(main())
