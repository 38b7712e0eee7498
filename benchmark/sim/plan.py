"""Whether `chimera plan` is right: its answers replayed on ten other days, and with one GPU fewer.

    python -m benchmark.sim.plan [--only arena,azure] [--kept FILE] [--json FILE]

A plan tries days 1 to 10; here are days 11 to 20 of the same load, as long as the plan found that days have to be. Each case is
planned as the command does, with all its policies. Takes half an hour of one core; with `--kept` each plan and each replayed
day is a line of a file, and is not made again. The file is good for one state of the code.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from chimera.config.paper_models import paper_splits, read_paper_models
from chimera.sched.cost import CostTable
from chimera.sizing.layout import chosen
from chimera.sizing.load import Load
from chimera.sizing.search import SHARP, Search
from chimera.trace.reader import read_trace
from chimera.trace.trace import names_for

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from benchmark import report
from benchmark.sim.bench import HERE, TRACES, Cell, costs
from benchmark.sim.kept import Figures, Kept

TARGET = 0.99
DAYS = 10
MOST = 32
OTHER_DAYS = range(DAYS + 1, 2 * DAYS + 1)
AT_LEAST = 9
POLICIES = ("flexible", "space-sharing", "time-sharing", "static")


def case(trace: str, from_s: float, to_s: float, models: str, rate: float) -> Cell:
    return Cell(trace=trace, from_s=from_s, to_s=to_s, models=models, gpus=0, level=f"×{rate:g}", rate=rate)


CASES = (
    case("arena_prism18", 0.0, 300.0, "8", 2.0),
    case("servegen_18tenants_day", 39_600.0, 39_900.0, "18", 2.0),
    case("azure2023_conv_first30min", 0.0, 300.0, "8", 1.0),
    case("arena_prism18", 0.0, 300.0, "hetero12", 2.0),
    case("arena_prism18", 0.0, 300.0, "18", 1.0),
    case("arena_prism18", 0.0, 300.0, "18", 4.0),
    case("servegen_18tenants_day", 50_400.0, 50_700.0, "18", 1.0),
)


def main() -> int:
    options = report.parser(__doc__, seed=1)
    options.add_argument("--only", default="", help="cases whose name contains one of these words")
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--kept", type=Path, help="cases that were made before; new ones are added")
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    table = costs()
    days = f"1 to {DAYS} planned, {OTHER_DAYS[0]} to {OTHER_DAYS[-1]} replayed"
    facts = {"costs": table.machine, "target": f"{TARGET:.0%}", "days": days}
    figures = report.Figures("Plans, replayed", seed=arguments.seed, facts=facts)
    made = Kept(arguments.kept)
    right, tight, soft, planned = 0, 0, 0, 0
    for cell in CASES:
        name = f"{cell.trace.split('_first')[0]}@{cell.from_s:g} {cell.models} models {cell.level}"
        if not any(word in name for word in arguments.only.split(",")):
            continue
        load = _load(cell, arguments.traces, table)
        plan = made.figures((name,), partial(_planned, load, table))
        gpus, policy, draws = int(plan["gpus"]), POLICIES[int(plan["policy"])], int(plan["draws"])
        search = Search(Load(load.models, load.trace, load.rate, DAYS, draws), table, TARGET, MOST)

        def misses(gpus: int, name: str = name, policy: str = policy, search: Search = search) -> int:
            days = (made.figures((name, gpus, day), partial(_replayed, search, gpus, policy, day)) for day in OTHER_DAYS)
            return int(sum(day["missed"] for day in days))

        kept = DAYS - misses(gpus)
        planned += 1
        right += kept >= AT_LEAST
        figures.add(f"{name}: GPUs, {policy}", gpus, "GPUs")
        figures.add(f"{name}: requests of a day", search.load.requests, f"in {draws} draws of the trace")
        figures.add(f"{name}: planned days, the worst", 100 * plan["worst"], "%")
        figures.add(f"{name}: other days that keep the target", kept, f"of {DAYS}", at_least=AT_LEAST)
        if not search.possible(gpus - 1):
            tight += 1
            continue
        missed = misses(gpus - 1)
        tight += missed >= AT_LEAST
        soft += plan["missed"] < SHARP * DAYS
        figures.add(f"{name}: other days that miss it with one GPU fewer", missed, f"of {DAYS}", at_least=AT_LEAST)
    figures.add("answers that keep their target on nine of ten other days", right, f"of {planned}", at_least=planned)
    figures.add("answers of which one GPU fewer misses nine of ten", tight, f"of {planned}", at_least=planned)
    figures.add(
        f"answers that are called soft: one fewer missed less than {SHARP:.0%} of the planned days", soft, f"of {planned}"
    )
    return figures.finish(arguments.json)


def _planned(load: Load, table: CostTable) -> Figures:
    """What the plan says; `missed` are planned days on which one GPU fewer is not enough."""
    search = Search(load, table, TARGET, MOST)
    found = search.settle(POLICIES)
    if found is None:
        raise SystemExit(f"not even {MOST} GPUs are enough")
    fewer = found.gpus - 1
    return {
        "gpus": found.gpus,
        "policy": POLICIES.index(found.policy),
        "draws": search.load.draws,
        "worst": found.worst,
        "missed": search.missed(fewer, found.policy, range(1, DAYS + 1)) if search.possible(fewer) else DAYS,
    }


def _replayed(search: Search, gpus: int, policy: str, day: int) -> Figures:
    return {"missed": search.missed(gpus, policy, [day])}


def _load(cell: Cell, traces: Path, table: CostTable) -> Load:
    splits = [paper_splits(model, (1, 2, 4, 8)) for model in read_paper_models(HERE / "models" / f"{cell.models}.json")]
    trace = read_trace(traces / f"{cell.trace}.csv.gz", cell.from_s, cell.to_s)
    trace = trace.renamed(names_for(trace, [found[0].name for found in splits]))
    return Load(chosen(splits, trace, table, 1.0), trace, cell.rate, DAYS)


if __name__ == "__main__":
    raise SystemExit(main())
