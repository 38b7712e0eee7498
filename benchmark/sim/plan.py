"""Whether `chimera plan` is right: its answers replayed on ten other days, and with one GPU fewer.

    python -m benchmark.sim.plan [--only arena] [--json FILE]

A plan tries days 1 to 10; here are days 11 to 20 of the same load. Each case is planned as the command does, with all its
policies. Takes about ten minutes of one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

from chimera.config.paper_models import paper_splits, read_paper_models
from chimera.sched.cost import CostTable
from chimera.sizing.answer import SOFT, Answer, answer
from chimera.sizing.layout import chosen
from chimera.sizing.load import Load
from chimera.sizing.search import Search
from chimera.trace.reader import read_trace
from chimera.trace.trace import names_for

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from benchmark import report
from benchmark.sim.bench import HERE, TRACES, Cell, costs

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
    options.add_argument("--only", default="", help="cases whose name contains this")
    options.add_argument("--traces", type=Path, default=TRACES)
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    table = costs()
    facts = {"costs": table.machine, "target": f"{TARGET:.0%}", "days": f"1 to {DAYS} planned, {OTHER_DAYS} replayed"}
    figures = report.Figures("Plans, replayed", seed=arguments.seed, facts=facts)
    right, tight, soft, planned = 0, 0, 0, 0
    for cell in CASES:
        name = f"{cell.trace.split('_first')[0]}@{cell.from_s:g} {cell.models} models {cell.level}"
        if arguments.only not in name:
            continue
        search = Search(_load(cell, arguments.traces, table), table, TARGET, MOST)
        found = answer(name, search, POLICIES, None)
        planned += 1
        soft += found.soft
        kept, missed = _replayed(search, found)
        right += found.enough and kept >= AT_LEAST
        tight += missed is None or missed >= AT_LEAST
        figures.add(f"{name}: GPUs, {found.policy}", found.gpus, "GPUs, and the boundary is soft" if found.soft else "GPUs")
        figures.add(f"{name}: worst planned day", 100 * found.worst, "%")
        figures.add(f"{name}: other days that keep the target", kept, f"of {DAYS}", f"≥ {AT_LEAST}", at_least=AT_LEAST)
        if missed is not None:
            words = f"≥ {AT_LEAST}" + (", and the plan says that it is soft" if found.soft else "")
            told = f"{name}: other days that miss it with one GPU fewer"
            figures.add(told, missed, f"of {DAYS}", words, at_least=AT_LEAST)
    figures.add("answers that keep their target on nine of ten other days", right, f"of {planned}", at_least=planned)
    figures.add("answers of which one GPU fewer misses nine of ten", tight, f"of {planned}", at_least=planned)
    figures.add(
        f"answers that are called soft: one fewer missed less than {SOFT:.0%} of the planned days", soft, f"of {planned}"
    )
    return figures.finish(arguments.json)


def _load(cell: Cell, traces: Path, table: CostTable) -> Load:
    splits = [paper_splits(model, (1, 2, 4, 8)) for model in read_paper_models(HERE / "models" / f"{cell.models}.json")]
    trace = read_trace(traces / f"{cell.trace}.csv.gz", cell.from_s, cell.to_s)
    trace = trace.renamed(names_for(trace, [found[0].name for found in splits]))
    return Load(chosen(splits, trace, table, 1.0), trace, cell.rate, DAYS)


def _replayed(search: Search, found: Answer) -> tuple[int, int | None]:
    """On how many of the other days the answer keeps the target, and on how many one GPU fewer misses it."""

    def misses(gpus: int) -> int:
        outcomes = (search.outcome(gpus, found.policy, day, decide=True) for day in OTHER_DAYS)
        return sum(outcome.metrics.joint_attainment < TARGET for outcome in outcomes)

    kept = DAYS - misses(found.gpus)
    return kept, misses(found.gpus - 1) if search.possible(found.gpus - 1) else None


if __name__ == "__main__":
    raise SystemExit(main())
