"""`chimera simulate`: a trace replayed on paper, by the schedulers of the live server, under one policy or several.

Prints a table; writes figures, stories and traces where asked. Which model of the trace stands for which of ours is said.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from chimera.bench.canvas import Png
from chimera.cli import played
from chimera.cli.costs import table_named
from chimera.cli.on_paper import mapping, print_table, progress, require_folder, require_png
from chimera.cli.played import Played
from chimera.config.cost_tables import shipped_tables
from chimera.config.deployment import load_placement
from chimera.config.paper_models import is_on_paper, read_paper_models
from chimera.config.virtual_gpus import parse_virtual_gpus
from chimera.core.gpu import Gpu
from chimera.core.metrics import Story
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable
from chimera.sched.policies import POLICIES, policy_named
from chimera.sched.policies.policy import WarmRules
from chimera.sched.queues import LOCAL_POLICIES
from chimera.sim.chronicle import Chronicle
from chimera.sim.placing import gpus_of, promises
from chimera.sim.run import Outcome, Scenario
from chimera.sim.run import simulate as simulated
from chimera.trace.reader import read_trace
from chimera.trace.trace import Trace, names_for

MOST_GPUS = 10_000
_COLUMNS = (
    "policy",
    "local",
    "joint %",
    "TTFT %",
    "TPOT %",
    "goodput/s",
    "TTFT p50",
    "TTFT p99",
    "TPOT p50",
    "busy %",
    "switches",
)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", type=Path, required=True, metavar="FILE", help="a placement file, or models on paper (with weight_bytes)")
    add("--gpus", required=True, metavar="8xH100", help="how many of which; or 8x2GiB with --costs")
    add("--trace", type=Path, required=True, metavar="FILE", help="timestamp,model,prompt_tokens,output_tokens; gzipped or not")
    add("--policy", default="flexible", metavar="A,B", help=f"of {', '.join(POLICIES)}; all for each")
    add("--local", choices=LOCAL_POLICIES, help="the order of each queue (default: the one that each policy is known with)")
    add("--costs", metavar="TABLE", help=f"{', '.join(shipped_tables())}, or a .json file (default: by the GPUs' name)")
    add("--slo-scale", type=float, default=1.0, metavar="X", help="multiplies every SLO (default: 1)")
    add("--rate-scale", type=float, default=1.0, metavar="X", help="so often is each request sent, on average (default: 1)")
    add("--time-scale", type=float, default=1.0, metavar="X", help="multiplies every moment of the trace (default: 1)")
    add("--from", dest="from_s", type=float, default=0.0, metavar="S", help="begin here in the trace")
    add("--to", dest="to_s", type=float, default=float("inf"), metavar="S", help="end here")
    add("--seeds", type=int, default=1, metavar="N", help="so many runs; they differ in what --rate-scale draws")
    add("--map", action="append", default=[], metavar="TRACE=MODEL", help="which of our models stands for one of the trace")
    add("--max-warm", type=int, metavar="N", help="how many models may be warm at once")
    add("--warm-order", choices=("lru", "lfu"), default="lru", help="who leaves first")
    add("--json", type=Path, metavar="FILE", help="every figure, by policy and seed")
    add("--csv", type=Path, metavar="FILE", help="every request's story, of the first seed")
    add("--log", type=Path, metavar="FILE", help="what happened, line by line, of the first seed and the last policy")
    add("--chrome-trace", type=Path, metavar="FILE", help="the same for chrome://tracing")
    add("--plots", type=Path, metavar="FILE.png", help="one page of plots")
    add("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    policies = list(POLICIES) if arguments.policy == "all" else arguments.policy.split(",")
    for policy in policies:
        policy_named(policy)
    if arguments.seeds < 1:
        raise ConfigError.single("--seeds", f"{arguments.seeds} runs are none")
    require_png("--plots", arguments.plots)
    for flag in ("json", "csv", "log", "chrome_trace", "plots"):
        require_folder(f"--{flag.replace('_', '-')}", getattr(arguments, flag))
    count, kind = _gpu_words(arguments.gpus)
    costs = _costs(arguments.costs or kind)
    gpus = _gpus(arguments.gpus, count, kind, costs)
    models, filed = _models(arguments.models, gpus)
    whole = read_trace(arguments.trace)
    trace = whole.cut(arguments.from_s, arguments.to_s)
    if not trace.rows:
        raise ConfigError.single(str(arguments.trace), "has no request between --from and --to")
    names = names_for(whole, [model.name for model in models], mapping(arguments.map))
    for theirs, ours in names.items():
        if theirs != ours:
            print(f"{theirs} of the trace is replayed on {ours}")
    trace = trace.renamed(names).time_scaled(arguments.time_scale)
    models = promises(models, trace, costs, arguments.slo_scale)
    print(f"{len(trace.rows)} requests over {trace.span_s:.0f} s, {len(models)} models, {len(gpus)} GPUs ({costs.machine})")
    runs: list[Played] = []
    for policy in policies:
        scenario = Scenario(
            models=models,
            gpus=gpus,
            costs=costs,
            policy=policy,
            local=arguments.local,
            filed=filed,
            warm=WarmRules(order=arguments.warm_order, most_models=arguments.max_warm),
        )
        runs.append(_played(scenario, trace, arguments))
        _write(arguments, runs[-1])
    _print_table(runs)
    if arguments.json is not None:
        told = {run.policy: msgspec.to_builtins(run.outcomes) for run in runs}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")
    if arguments.plots is not None:
        canvas = Png(played.WIDTH, played.HEIGHT)
        title = f"{len(trace.rows)} requests over {trace.span_s:.0f} s, {len(models)} models, {len(gpus)} GPUs"
        played.draw(canvas, title, [model.name for model in models], trace.span_s, runs)
        canvas.save(arguments.plots)
    return 0


def _played(scenario: Scenario, trace: Trace, arguments: argparse.Namespace) -> Played:
    first = Chronicle()
    stories: list[Story] = []

    def run(seed: int) -> Outcome:
        return simulated(
            scenario,
            trace.rate_scaled(arguments.rate_scale, seed),
            chronicle=first if seed == 1 else None,
            progress=None if arguments.quiet else progress(f"{scenario.policy} {seed}/{arguments.seeds}"),
            keep=stories.extend if seed == 1 else None,
        )

    outcomes = tuple(run(seed) for seed in range(1, arguments.seeds + 1))
    return Played(outcomes=outcomes, stories=tuple(stories), chronicle=first)


def _write(arguments: argparse.Namespace, run: Played) -> None:
    if arguments.csv is not None:
        new = not getattr(arguments, "csv_begun", False)
        with arguments.csv.open("w" if new else "a", newline="") as file:
            _write_stories(csv.writer(file).writerow, run.policy, run.stories, header=new)
        arguments.csv_begun = True
    if arguments.log is not None:
        arguments.log.write_bytes(run.chronicle.lines())
    if arguments.chrome_trace is not None:
        arguments.chrome_trace.write_bytes(run.chronicle.chrome_trace(list(run.stories)))


def _write_stories(write: Callable[[Sequence[object]], object], policy: str, stories: Sequence[Story], *, header: bool) -> None:
    if header:
        write(("policy", "request", "model", "sent_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "kept", "refusal"))
    for s in stories:
        kept = int(s.keeps_both)
        write((policy, s.request_id, s.model, s.sent_s, s.prompt_tokens, s.output_tokens, s.ttft_s, s.tpot_s, kept, s.refusal))


def _print_table(runs: Sequence[Played]) -> None:
    print_table([_COLUMNS, *map(_row, runs)], left=2)


def _row(run: Played) -> tuple[str, ...]:
    outcomes = run.outcomes

    def mean(value: Callable[[Outcome], float]) -> float:
        return statistics.fmean(value(outcome) for outcome in outcomes)

    joint = [100 * outcome.metrics.joint_attainment for outcome in outcomes]
    spread = f" ±{statistics.stdev(joint):.1f}" if len(joint) > 1 else ""
    return (
        run.policy,
        outcomes[0].local,
        f"{statistics.fmean(joint):.1f}{spread}",
        f"{100 * mean(lambda o: o.metrics.ttft_attainment):.1f}",
        f"{100 * mean(lambda o: o.metrics.tpot_attainment):.1f}",
        f"{mean(lambda o: o.metrics.goodput_per_s):.2f}",
        f"{mean(lambda o: o.metrics.ttft.p50_s or 0):.3f} s",
        f"{mean(lambda o: o.metrics.ttft.p99_s or 0):.3f} s",
        f"{1000 * mean(lambda o: o.metrics.tpot.p50_s or 0):.1f} ms",
        f"{100 * mean(lambda o: o.busy_gpu_s / o.gpu_s):.0f}",
        f"{mean(lambda o: o.switches):.0f}",
    )


# What the words of the command line stand for.


def _gpu_words(text: str) -> tuple[int, str | None]:
    match = re.fullmatch(r"(\d{1,6})\s*[xX×]\s*([A-Za-z][\w.-]*)", text.strip())
    if match is None:
        return 0, None
    count = int(match[1])
    if not 1 <= count <= MOST_GPUS:
        raise ConfigError.single("--gpus", f"{count} GPUs: 1 to {MOST_GPUS} are possible")
    return count, match[2].lower()


def _costs(name: str | None) -> CostTable:
    if name is None:
        raise ConfigError.single("--costs", f"is needed when --gpus names no kind; there are {', '.join(shipped_tables())}")
    return table_named(name)


def _gpus(text: str, count: int, kind: str | None, costs: CostTable) -> tuple[Gpu, ...]:
    if kind is not None:
        return gpus_of(count, costs.gpu_bytes)
    return parse_virtual_gpus(text)


def _models(path: Path, gpus: Sequence[Gpu]) -> tuple[tuple[ModelSpec, ...], Placement | None]:
    """The models, and where the file wants them, if it says so."""
    if is_on_paper(path):
        return read_paper_models(path), None
    deployment = load_placement(path, gpus, weights=False)
    return deployment.models, deployment.placement if deployment.placement.seats else None
