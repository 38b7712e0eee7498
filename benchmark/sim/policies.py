"""Policies compared on the loads of cells.json: joint goodput of each, in every cell, by the mean of the seeds.

    python -m benchmark.sim.policies [--seeds 5] [--only arena] [--policies a,b] [--no-rates] [--kept FILE] [--json FILE]

Each global policy runs with the queue order it is known with; `static+goodput` and `space-sharing+goodput` have our order, so
that what ours gains by order and what it gains by placement can be told apart. Every line is printed, losses included. All of
it takes an hour or two: with `--kept` each run is a line of a file and is not made again, so the set can be made in parts, by
several processes; the file is good for one state of the code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

from chimera.sched.cost import CostTable

from benchmark import report
from benchmark.sim.bench import HERE, TRACES, Cell, Prepared, costs, prepared, replay

OURS = "flexible"
POLICIES = (
    "static",
    "time-sharing",
    "space-sharing",
    "simple-global",
    "kvpr",
    "kvpr-after",
    "static+goodput",
    "space-sharing+goodput",
    OURS,
)
WITHIN = 0.01
RATE_CLUSTERS = (("8", 2), ("18", 8))
HETEROGENEOUS = Cell(
    trace="arena_prism18", from_s=0, to_s=300, models="hetero12", gpus=2, level="two large, ten small", rate=3.0
)


def main() -> int:
    options = report.parser(__doc__, seed=1)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--only", default="", help="cells whose name contains this")
    options.add_argument("--policies", default=",".join(POLICIES))
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--kept", type=Path, help="runs that were made before; new ones are added")
    options.add_argument("--no-rates", action="store_true", help="leave out the search for the rates at 99 %% TTFT")
    options.add_argument("--rates-only", action="store_true", help="nothing but that search")
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    policies = arguments.policies.split(",")
    cells = [Cell(**cell) for cell in json.loads((HERE / "cells.json").read_text())]
    cells = [cell for cell in [*cells, HETEROGENEOUS] if arguments.only in cell.name]
    figures = report.Figures(
        "policies on paper", seed=arguments.seed, facts={"costs": costs().machine, "seeds": str(arguments.seeds)}
    )
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    means = {}
    if not arguments.rates_only:
        means = _table(figures, cells, policies, seeds, arguments.traces, _Kept(arguments.kept))
    if means and OURS in policies and len(policies) > 1:
        _verdict(figures, means, policies)
    if not arguments.no_rates:
        windows = {(cell.trace, cell.from_s, cell.to_s) for cell in cells if cell is not HETEROGENEOUS}
        _rates(figures, sorted(windows), arguments.seed, arguments.traces)
    return figures.finish(arguments.json)


class _Kept:
    """Joint attainment by cell, policy and seed."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self._known: dict[tuple[str, str, int], float] = {(r[0], r[1], r[2]): r[3] for r in map(json.loads, lines)}

    def joint(self, cell: Cell, ready: Prepared, table: CostTable, policy: str, seed: int) -> float:
        key = (cell.name, policy, seed)
        if key not in self._known:
            name, _, local = policy.partition("+")
            self._known[key] = replay(cell, ready, table, name, local or None, seed).metrics.joint_attainment
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps([*key, self._known[key]]) + "\n")
        return self._known[key]


def _table(
    figures: report.Figures, cells: list[Cell], policies: list[str], seeds: range, traces: Path, kept: _Kept
) -> dict[str, dict[str, float]]:
    table = costs()
    means: dict[str, dict[str, float]] = {}
    for cell in cells:
        ready = prepared(cell, traces, table)
        means[cell.name] = {}
        for policy in policies:
            values = [kept.joint(cell, ready, table, policy, seed) for seed in seeds]
            means[cell.name][policy] = statistics.fmean(values)
            figures.add(
                f"{cell.name} {policy}",
                100 * means[cell.name][policy],
                "% joint",
                spread=(100 * min(values), 100 * max(values)),
            )
    return means


def _verdict(figures: report.Figures, means: dict[str, dict[str, float]], policies: list[str]) -> None:
    others = [policy for policy in policies if policy != OURS]
    best = {cell: max(values[policy] for policy in others) for cell, values in means.items()}
    kept = [cell for cell, values in means.items() if values[OURS] >= best[cell] - WITHIN]
    for cell in means:
        if cell not in kept:
            print(f"# lost: {cell}: ours {means[cell][OURS]:.3f}, best of the others {best[cell]:.3f}")
    figures.add("cells where ours is within 1 % of the best of the others", len(kept), f"of {len(means)}", at_least=len(means))
    over_all = {policy: statistics.fmean(values[policy] for values in means.values()) for policy in policies}
    for policy, value in over_all.items():
        figures.add(f"mean over all cells {policy}", 100 * value, "% joint")
    margin = over_all[OURS] - max(over_all[policy] for policy in others)
    figures.add("ours over the best of the others, over all cells", 100 * margin, "points", "> 0", at_least=1e-9)


def _rates(figures: report.Figures, windows: list[tuple[str, float, float]], seed: int, traces: Path) -> None:
    """The largest rate scale at which 99 % of first tokens are in time, ours against static."""
    table = costs()
    for models, gpus in RATE_CLUSTERS:
        doubled = 0
        for trace, from_s, to_s in windows:
            cell = Cell(trace=trace, from_s=from_s, to_s=to_s, models=models, gpus=gpus, level="99% TTFT", rate=1.0)
            ready = prepared(cell, traces, table)
            found = {policy: _rate_at_99(cell, ready, table, policy, seed) for policy in ("static", OURS)}
            ratio = found[OURS] / found["static"]
            doubled += ratio >= 2
            figures.add(f"{cell.name}: rate of ours over static's", ratio, "×")
        name = f"traces on which ours serves twice static's rate, {models}/{gpus}"
        figures.add(name, doubled, f"of {len(windows)}", at_least=len(windows) / 2)


def _rate_at_99(cell: Cell, ready: Prepared, table: CostTable, policy: str, seed: int) -> float:
    def keeps(rate: float) -> bool:
        outcome = replay(dataclasses.replace(cell, rate=rate), ready, table, policy, None, seed)
        return outcome.metrics.ttft_attainment >= 0.99

    low, high = 1 / 64, 1 / 32
    while high <= 64 and keeps(high):
        low, high = high, high * 2
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


if __name__ == "__main__":
    raise SystemExit(main())
