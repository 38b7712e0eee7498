"""Prism's experiments as far as public facts carry, on paper: its systems and ours, and why figures differ.

    python -m benchmark.sim.paper [--only rates,counts] [--kept FILE] [--json FILE] [--table FILE]

    rates    8 models on 2 GPUs: the highest rate at which 99 % of first tokens are in time
    counts   18 models: the fewest GPUs for 99 %, at a load that Prism holds on 4 or 5, and one that no baseline holds on 8
    mix      58 models: the fewest GPUs for 99 %, at the load for which MuxServe++-like needs 32
    slos     8 models on 2 GPUs: attainment by how tight the promises are
    knobs    18 models on 2 GPUs: kvpr's idle threshold and window

The paper's rates are not public, so loads are defined by what a baseline of its own attains; ratios and counts are compared,
never seconds. Arena is the trace that Prism's benchmark ships; its Hyperbolic trace is not public, and ten minutes of ServeGen
with as many active models stand for it. What stands for which system is said in `rivals.py`.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
from chimera.core.model import ModelSpec
from chimera.sched import demand
from chimera.sched.cost import CostTable
from chimera.sched.policies import POLICIES
from chimera.sched.policies.kvpr import Kvpr
from chimera.sim.run import simulate
from chimera.trace.trace import Trace

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from benchmark import report
from benchmark.sim.bench import SLO_SCALE, TRACES, Cell, costs, prepared
from benchmark.sim.kept import Figures, Kept
from benchmark.sim.rivals import BASELINES, RIVALS, TUNED, Rival, known, scenario
from benchmark.sim.tenants import tenants
from benchmark.sim.why import WHY

PRISM, OURS = "kvpr", "flexible"
LOADS = {"Arena": ("arena_prism18", 0.0, 300.0), "Hyperbolic-like": ("servegen_18tenants_day", 39_600.0, 39_900.0)}
GOAL = 0.99
SEEDS = (1, 2, 3)
MOST_SEEN = 8
"""With 18 models the paper goes up to so many GPUs."""
MOST_GPUS = 16
MIX = "58 tenants"
MIX_GPUS = 32
MIX_RATE = 128.0
"""Requests a second that the 58 are drawn with; less is thinned by chance."""
SLO_SCALES = (1.5, 2.0, 3.0, 5.0, 8.0, 12.0)
SLO_RATE = 2.0
LEAST_SHARE = 0.001
"""What attained less counts as so much, or a ratio to it would say nothing."""
THEIRS_OVER = {"ttft": 3.3, "tpot": 2.0}
KNOB_RATE = 1.0
CHOSEN = """What was chosen, since the paper does not say it, and partly after first results were seen:

- `kvpr` is tuned: of four thresholds in both readings of its argmin, the one that kept the most first tokens in time on six
  loads of these same traces. `flexible` has no such choice. The window's rows use a threshold of 0.1.
- ServerlessLLM-like and QLM-like start empty: with everything resident they would be `static`. MuxServe++-like has quotas, not
  one memory for all, and knows the rates beforehand.
- The mix of 58 is the draw with the widest spread. In an earlier one, memory shared, MuxServe++-like needed 20 GPUs, `flexible`
  31, and `kvpr` more than 32.
- Load A is what `kvpr` holds on the paper's count of GPUs, so that count is not a finding. Load B is what no baseline of the
  paper's holds on eight.
- The mix of 58, the SLO sweep and the knobs are one draw each; rates and counts of 18 models are three.
- *Why* is reasoning, except for load B's busiest model and the 1B of the mix, which runs have shown."""
IDLE_S = (5.0, 15.0, 30.0, 45.0, 60.0, 80.0, 120.0)
WINDOWS_S = (15.0, 30.0, 60.0, 120.0, 240.0)
ORDER = (
    (PRISM, "muxserve-like"),
    ("muxserve-like", "s-partition"),
    ("s-partition", "serverless-like"),
    ("s-partition", "qlm-like"),
)
"""Of each pair the first attains more in the paper."""
PARTS = ("rates", "counts", "mix", "slos", "knobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    experiment: str
    theirs: float
    """Where they say "more than" or "up to", the number behind it."""
    said: str
    ours: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def main() -> int:
    options = report.parser(__doc__, seed=1)
    options.add_argument("--only", default=",".join(PARTS), help="which experiments")
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--kept", type=Path, help="runs that were made before; new ones are added")
    options.add_argument("--table", type=Path, help="write the table there, in Markdown")
    arguments = options.parse_args()
    if not arguments.traces.is_dir():
        print(f"no traces at {arguments.traces}; give --traces", file=sys.stderr)
        return 1
    table = costs()
    figures = report.Figures("Prism's experiments on paper", seed=arguments.seed, facts={"costs": table.machine})
    stage = Stage(table, arguments.traces, Kept(arguments.kept))
    rows: list[Row] = []
    with known():
        for part in arguments.only.split(","):
            rows += _EXPERIMENTS[part](stage, figures)
    for row in rows:
        figures.add(row.experiment, row.ours, row.unit, f"theirs {row.said}")
    _verdict(figures, rows)
    if arguments.table is not None:
        arguments.table.write_text(_markdown(rows))
    return figures.finish(arguments.json)


class Stage:
    """Replays one system on one load, and keeps what came of it."""

    def __init__(self, table: CostTable, traces: Path, kept: Kept) -> None:
        self.costs = table
        self._traces = traces
        self._kept = kept

    @cache  # noqa: B019 - one stage a process
    def load(self, name: str, models: str) -> tuple[tuple[ModelSpec, ...], Trace]:
        """The models with their promises, and the trace at its own rate."""
        trace, from_s, to_s = LOADS[name]
        cell = Cell(trace=trace, from_s=from_s, to_s=to_s, models=models, gpus=0, level="", rate=1.0)
        return prepared(cell, self._traces, self.costs)

    @cache  # noqa: B019
    def mix(self) -> tuple[tuple[ModelSpec, ...], Trace]:
        """58 tenants at `MIX_RATE`."""
        whole = tenants(self._traces, models=58, rate=MIX_RATE, seconds=300, costs=self.costs, slo_scale=SLO_SCALE, seed=1)
        return whole.models, Trace("58 tenants", tuple(whole.rows()))

    def models(self, load: str, models: str) -> tuple[ModelSpec, ...]:
        return (self.mix() if load == MIX else self.load(load, models))[0]

    def run(
        self, rival: Rival, load: str, models: str, gpus: int, rate: float, *, slo_scale: float = SLO_SCALE, seed: int = 1
    ) -> Figures:
        def made() -> Figures:
            specs, trace = self.mix() if load == MIX else self.load(load, models)
            rows = trace.rate_scaled(rate, seed)
            specs = tuple(_promising(model, slo_scale / SLO_SCALE) for model in specs)
            metrics = simulate(scenario(rival, specs, rows, gpus, self.costs), rows).metrics
            return {"ttft": metrics.ttft_attainment, "tpot": metrics.tpot_attainment, "joint": metrics.joint_attainment}

        return self._kept.figures((rival.name, load, models, gpus, round(rate, 6), slo_scale, seed), made)

    def mean(self, what: str, rival: Rival, load: str, models: str, gpus: int, rate: float, seeds: Sequence[int]) -> float:
        """Over the seeds; a first run that is far below the goal is not repeated."""
        first = self.run(rival, load, models, gpus, rate, seed=seeds[0])[what]
        if first < GOAL - 0.03:
            return first
        return statistics.fmean(self.run(rival, load, models, gpus, rate, seed=seed)[what] for seed in seeds)

    def highest_rate(
        self,
        rival: Rival,
        load: str,
        models: str,
        gpus: int,
        *,
        start: float,
        close: float = 1.05,
        seeds: Sequence[int] = SEEDS,
    ) -> float:
        """The largest rate at which the goal is held, to so many per cent; `start` is tried first."""

        def keeps(rate: float) -> bool:
            return self.mean("ttft", rival, load, models, gpus, rate, seeds) >= GOAL

        low = start
        while low > start / 64 and not keeps(low):
            low /= 2
        high = low * 2
        while high <= start * 64 and keeps(high):
            low, high = high, high * 2
        while high / low > close:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def fewest(self, what: str, rival: Rival, load: str, models: str, rate: float, most: int, seeds: Sequence[int]) -> int:
        """The fewest GPUs that hold the goal; one more than `most` stands for more than that."""

        def keeps(gpus: int) -> bool:
            return self.mean(what, rival, load, models, gpus, rate, seeds) >= GOAL

        if not keeps(most):
            return most + 1
        low, high = max(model.tp_size for model in self.models(load, models)) - 1, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high


def _promising(model: ModelSpec, times: float) -> ModelSpec:
    assert model.slo.ttft_s is not None and model.slo.tpot_s is not None
    slo = msgspec.structs.replace(model.slo, ttft_s=model.slo.ttft_s * times, tpot_s=model.slo.tpot_s * times)
    return msgspec.structs.replace(model, slo=slo)


# The experiments.


def _rates(stage: Stage, figures: report.Figures) -> list[Row]:
    rows = []
    for load in LOADS:
        name = f"8 models on 2 GPUs, {load}"
        found: dict[str, float] = {}
        for rival in RIVALS.values():
            found[rival.name] = stage.highest_rate(rival, load, "8", 2, start=1.0)
            figures.add(f"{name}: rate at 99 % TTFT, {rival.name}", found[rival.name], "× the trace")
        kept = sum(found[better] >= found[worse] for better, worse in ORDER)
        figures.add(f"{name}: pairs of systems in the paper's order", kept, f"of {len(ORDER)}", at_least=len(ORDER))
        compared = {"muxserve-like": 2.3, "s-partition": 3.5} if load != "Arena" else dict.fromkeys(BASELINES, 3.0)
        for who in (PRISM, OURS):
            for other, theirs in compared.items():
                said = f"> {theirs:g} ×" if load == "Arena" else f"{theirs:g} ×"
                rows.append(_row(f"{name}: rate of {who} over {other}'s", theirs, said, found[who] / found[other], "×"))
    return rows


def _counts(stage: Stage, figures: report.Figures) -> list[Row]:
    """Two loads: the one that Prism holds on the paper's count, and the one at which no baseline holds on 8."""
    rows = []
    for load, theirs in {"Hyperbolic-like": 4, "Arena": 5}.items():
        name = f"18 models, {load}"
        rate = stage.highest_rate(RIVALS[PRISM], load, "18", theirs, start=2.0)
        figures.add(f"{name}: load A, which kvpr holds on {theirs} GPUs", rate, "× the trace")
        for rival in RIVALS.values():
            count = stage.fewest("ttft", rival, load, "18", rate, MOST_GPUS, SEEDS)
            baseline = rival.name in BASELINES
            said, told = (f"> {MOST_SEEN}", MOST_SEEN + 1) if baseline else (str(theirs), theirs)
            if rival.name != PRISM and rival.name != "simple-global":
                rows.append(_row(f"{name}, load A: GPUs of {rival.name}", told, said, count, _of(count, MOST_GPUS)))
            else:
                figures.add(f"{name}, load A: GPUs of {rival.name}", count, _of(count, MOST_GPUS))
        rates = {who: stage.highest_rate(RIVALS[who], load, "18", MOST_SEEN, start=4.0, close=1.1) for who in BASELINES}
        for who, value in rates.items():
            figures.add(f"{name}: rate on {MOST_SEEN} GPUs, {who}", value, "× the trace")
        rate = round(1.1 * max(rates.values()), 3)
        figures.add(f"{name}: load B, which no baseline holds on {MOST_SEEN} GPUs", rate, "× the trace")
        for who in (PRISM, OURS):
            count = stage.fewest("ttft", RIVALS[who], load, "18", rate, MOST_GPUS, SEEDS)
            rows.append(_row(f"{name}, load B: GPUs of {who}", theirs, str(theirs), count, _of(count, MOST_GPUS)))
    return rows


def _mix(stage: Stage, figures: report.Figures) -> list[Row]:
    rate = stage.highest_rate(RIVALS["muxserve-like"], MIX, "58", MIX_GPUS, start=0.25, close=1.1, seeds=SEEDS[:1])
    figures.add("58 models: the load that muxserve-like holds on 32 GPUs", MIX_RATE * rate, "requests/s")
    rows = []
    for rival in RIVALS.values():
        count = stage.fewest("ttft", rival, MIX, "58", rate, MIX_GPUS, SEEDS[:1])
        name = f"58 models: GPUs of {rival.name}"
        if rival.name in (PRISM, OURS):
            rows.append(_row(name, 16, "16", count, _of(count, MIX_GPUS)))
        elif rival.name == "muxserve-like":
            rows.append(_row(name, 32, "32", count, _of(count, MIX_GPUS)))
        else:
            figures.add(name, count, _of(count, MIX_GPUS))
    return rows


def _slos(stage: Stage, figures: report.Figures) -> list[Row]:
    over: dict[tuple[str, str, str], float] = {}
    for load in LOADS:
        for scale in SLO_SCALES:
            runs = {who: stage.run(rival, load, "8", 2, SLO_RATE, slo_scale=scale) for who, rival in RIVALS.items()}
            for who, run in runs.items():
                for what in ("ttft", "tpot"):
                    name = f"8 models on 2 GPUs, {load} × {SLO_RATE:g}, SLO × {scale:g}: {what.upper()}, {who}"
                    figures.add(name, 100 * run[what], "%")
            for who in (PRISM, OURS):
                for what in ("ttft", "tpot"):
                    others = [max(LEAST_SHARE, runs[name][what]) for name in BASELINES]
                    for which, share in (("the worst", min(others)), ("the best", max(others))):
                        key = (who, what, which)
                        over[key] = max(over.get(key, 0.0), runs[who][what] / share)
    rows = []
    for (who, what, which), ratio in over.items():
        theirs = THEIRS_OVER[what]
        name = f"SLO sweep: {what.upper()} attainment of {who} over {which} baseline's, at most"
        rows.append(_row(name, theirs, f"up to {theirs:g} ×", ratio, "×"))
    return rows


def _knobs(stage: Stage, figures: report.Figures) -> list[Row]:
    """18 models on 2 GPUs, which cannot hold them all: somebody has to leave for whoever comes. The window is tried with the
    smaller τ, since with the larger nothing moves by it."""
    rows = []
    for load in LOADS:
        name = f"18 models on 2 GPUs, {load}"
        idle = {s: _with_knob(stage, load, f"idle-{s:g}", msgspec.structs.replace(TUNED, idle_s=s)) for s in IDLE_S}
        windows = {}
        for seconds in WINDOWS_S:
            before, demand.LONG_S = demand.LONG_S, seconds
            try:
                windows[seconds] = _with_knob(stage, load, f"window-{seconds:g}", Kvpr(after=True))
            finally:
                demand.LONG_S = before
        for what, theirs, found in (("idle threshold", 45.0, idle), ("window", 60.0, windows)):
            for seconds, value in found.items():
                figures.add(f"{name}: TTFT of kvpr with a {what} of {seconds:g} s", 100 * value, "%")
            best = max(found, key=lambda s: found[s])
            told = f"{name}: TTFT of kvpr with their {what} of {theirs:g} s, over the best one's ({best:g} s)"
            rows.append(_row(told, 1.0, "1", found[theirs] / found[best], "×"))
    return rows


def _with_knob(stage: Stage, load: str, name: str, policy: Kvpr) -> float:
    called = f"kvpr {name}"
    POLICIES[called] = policy
    try:
        rival = Rival(name=called, theirs="", policy=called, local=RIVALS[PRISM].local)
        return stage.run(rival, load, "18", 2, KNOB_RATE)["ttft"]
    finally:
        del POLICIES[called]


_EXPERIMENTS: dict[str, Callable[[Stage, report.Figures], list[Row]]] = {
    "rates": _rates,
    "counts": _counts,
    "mix": _mix,
    "slos": _slos,
    "knobs": _knobs,
}


def _row(experiment: str, theirs: float, said: str, ours: float, unit: str) -> Row:
    return Row(experiment=experiment, theirs=theirs, said=said, ours=ours, unit=unit)


def _of(count: int, most: int) -> str:
    return "GPUs" if count <= most else f"GPUs: more than {most}"


def _verdict(figures: report.Figures, rows: Sequence[Row]) -> None:
    """`flexible` against `kvpr`, wherever GPUs were counted; what load A says of kvpr is the paper's own count."""
    counted = {row.experiment: row.ours for row in rows if "GPUs of" in row.experiment}
    pairs = []
    for name, ours in counted.items():
        if name.endswith(OURS):
            prism = name.removesuffix(OURS) + PRISM
            pairs.append((ours, counted.get(prism, next(row.theirs for row in rows if row.experiment == name))))
    if pairs:
        no_more = sum(ours <= prism for ours, prism in pairs)
        figures.add("counts in which flexible needs no more GPUs than kvpr", no_more, f"of {len(pairs)}", at_least=len(pairs))
        figures.add("counts in which flexible needs fewer", sum(ours < prism for ours, prism in pairs), "", at_least=2)


def _markdown(rows: Sequence[Row]) -> str:
    lines = ["| experiment | theirs | ours | ratio | why |", "|---|---:|---:|---:|---|"]
    for row in rows:
        why = next((told for part, told in WHY.items() if part in row.experiment), "")
        lines.append(f"| {row.experiment} | {row.said} | {report.number(row.ours)} {row.unit} | {row.ratio:.2f} | {why} |")
    head = ("# Prism's experiments, theirs and ours", "", "Made by `benchmark/sim/paper.py`.", "", CHOSEN, "")
    return "\n".join((*head, *lines, ""))


if __name__ == "__main__":
    raise SystemExit(main())
