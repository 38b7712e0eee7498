"""`chimera plan`: how few GPUs are enough for a trace and its promises, under which policy, and what they cost.

The question is put to the simulator (`sizing/`); here it is read, and the answers are printed and written.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from chimera.bench.canvas import Png
from chimera.cli.costs import table_named
from chimera.cli.on_paper import clear_progress, mapping, print_table, progress, require_folder, require_png
from chimera.config.cost_tables import shipped_tables
from chimera.config.deployment import load_splits
from chimera.config.paper_models import is_on_paper, paper_splits, read_paper_models
from chimera.config.placed import SERVED_POLICIES, write_placed
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable
from chimera.sim.placing import gpus_of
from chimera.sizing import page
from chimera.sizing.answer import Answer, answer
from chimera.sizing.layout import Splits, chosen
from chimera.sizing.load import Load, one_more
from chimera.sizing.search import LOCAL, Search
from chimera.trace.reader import read_trace
from chimera.trace.trace import Trace, names_for

SIZES = (1, 2, 4, 8)
"""Over so many GPUs a model may be split."""
MOST_GPUS = 1024
MOST_DAYS = 1000
COPY = "{}-more"
"""What the one more model is called."""
_COLUMNS = ("load", "GPUs", "policy", "worst day", "mean", "one GPU fewer", "carries", "breaks first", "GPU-s/1,000")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", type=Path, required=True, metavar="FILE", help="a placement file, or models on paper (with weight_bytes)")
    add("--trace", type=Path, required=True, metavar="FILE", help="timestamp,model,prompt_tokens,output_tokens; gzipped or not")
    kinds = f"{', '.join(shipped_tables())}, by the beginning of their names, or a .json file"
    add("--gpu", default="H100", metavar="KIND", help=f"cost tables there are: {kinds}; several with commas (default: H100)")
    add("--target", default="99%", metavar="PERCENT", help="so many requests shall keep both promises (default: 99%%)")
    add(
        "--policy",
        default="flexible,space-sharing,time-sharing,static",
        metavar="A,B",
        help="these are tried (default: %(default)s)",
    )
    add(
        "--slo-scale",
        type=float,
        default=1.0,
        help="multiplies every SLO; a model without one promises five times what it takes alone",
    )
    add(
        "--rate-scale",
        default="1",
        metavar="A,B",
        help="a plan for each: so often is each request sent, on average (default: 1)",
    )
    add("--add", action="append", default=[], metavar="MODEL", help="one more plan, with one more model that is like this one")
    add(
        "--days",
        type=int,
        default=10,
        metavar="N",
        help="days like the trace, each as long as it takes to tell; enough is what keeps the target on each (default: 10)",
    )
    add("--most", type=int, default=64, metavar="N", help="no more GPUs than this are tried (default: 64)")
    add("--gpu-hour-price", type=float, metavar="PRICE", help="what an hour of one GPU costs, for the cost of 1,000 requests")
    add("--from", dest="from_s", type=float, default=0.0, metavar="S", help="begin here in the trace")
    add("--to", dest="to_s", type=float, default=float("inf"), metavar="S", help="end here")
    add("--map", action="append", default=[], metavar="TRACE=MODEL", help="which of our models stands for one of the trace")
    add(
        "--placement", type=Path, metavar="FILE", help="write a placement file for `chimera serve`: the first line of the table"
    )
    add("--plots", type=Path, metavar="FILE.png", help="one page of plots of the first line")
    add("--json", type=Path, metavar="FILE", help="every answer, with all that the table leaves out")
    add("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    target = _target(arguments.target)
    policies = _policies(arguments.policy)
    slo_scale = _positive("--slo-scale", arguments.slo_scale)
    rates = [_positive("--rate-scale", word) for word in arguments.rate_scale.split(",")]
    tables = [table_named(kind if kind.endswith(".json") else kind.lower()) for kind in arguments.gpu.split(",")]
    require_png("--plots", arguments.plots)
    for flag, file in (("--json", arguments.json), ("--plots", arguments.plots), ("--placement", arguments.placement)):
        require_folder(flag, file)
    _require_between("--days", arguments.days, 1, MOST_DAYS)
    _require_between("--most", arguments.most, 1, MOST_GPUS)
    price = None if arguments.gpu_hour_price is None else _positive("--gpu-hour-price", arguments.gpu_hour_price)
    splits = _splits(arguments.models)
    trace = _trace(arguments, [found[0].name for found in splits])
    print(f"{len(trace.rows)} requests over {trace.span_s:.0f} s, {len(splits)} models")
    print(f"enough is what keeps {100 * target:.6g} % on each of {arguments.days} days like the trace")
    answers = []
    for question in _questions(arguments, splits, trace, tables, rates):
        models = chosen(question.splits, question.trace, question.costs, slo_scale)
        load = Load(models, question.trace, question.rate, arguments.days)
        search = Search(load, question.costs, target, arguments.most, None if arguments.quiet else progress)
        answers.append(answer(question.what, search, policies, price))
        if len(answers) == 1:
            _write_first(arguments, search, answers[0])
    clear_progress()
    _print(answers)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([msgspec.to_builtins(found) for found in answers], indent=2) + "\n")
    return 0 if all(found.enough for found in answers) else 1


class _Question(NamedTuple):
    what: str
    costs: CostTable
    rate: float
    splits: Sequence[Splits]
    trace: Trace


def _questions(
    arguments: argparse.Namespace,
    splits: Sequence[Splits],
    trace: Trace,
    tables: Sequence[CostTable],
    rates: Sequence[float],
) -> Iterator[_Question]:
    """The plain one first, then what if: each kind of GPU at each rate, and one more model on the first of both."""
    for kind, costs in zip(arguments.gpu.split(","), tables, strict=True):
        for rate in rates:
            yield _Question(f"×{rate:g} on {kind}", costs, rate, splits, trace)
    for name in arguments.add:
        like = next((found for found in splits if found[0].name == name), None)
        if like is None:
            raise ConfigError.single("--add", f"there is no model {name!r} for one more to be like")
        another = tuple(msgspec.structs.replace(model, name=COPY.format(name)) for model in like)
        more = one_more(trace, name, COPY.format(name))
        yield _Question(f"×{rates[0]:g}, one more {name}", tables[0], rates[0], [*splits, another], more)


# What is written.


def _write_first(arguments: argparse.Namespace, search: Search, found: Answer) -> None:
    if arguments.placement is not None and found.enough:
        write_placed(
            arguments.placement,
            source=arguments.models,
            models=search.load.models,
            placement=found.placement,
            gpus=gpus_of(found.gpus, search.costs.gpu_bytes),
            policy=found.policy,
            local=LOCAL,
        )
    if arguments.plots is not None:
        canvas = Png(page.WIDTH, page.HEIGHT)
        page.draw(canvas, search, found)
        canvas.save(arguments.plots)


def _print(answers: Sequence[Answer]) -> None:
    columns = _COLUMNS if answers[0].cost_per_1000 is None else (*_COLUMNS, "cost/1,000")
    print_table([columns, *(_row(found) for found in answers)], left=1)
    for found in answers:
        print(f"{found.what}: a day is {_day(found)}")
        if not found.enough:
            print(f"{found.what}: not even {found.gpus} GPUs keep {100 * found.target:.6g} %")
        if found.soft and found.fewer is not None:
            print(
                f"{found.what}: the boundary is soft: {found.fewer.gpus} GPUs miss the target on "
                f"{found.fewer.missed_days} of {found.days} days"
            )
    if answers[0].enough:
        print(f"\nwhere models stand at first ({answers[0].what})")
        for line in _places(answers[0]):
            print(line)


def _row(found: Answer) -> tuple[str, ...]:
    fewer = found.fewer
    breaks = found.breaks
    cells = (
        found.what,
        str(found.gpus) if found.enough else f"> {found.gpus}",
        found.policy,
        f"{100 * found.worst:.2f} %",
        f"{100 * found.mean:.2f} %",
        "" if fewer is None else f"misses {fewer.missed_days} of {found.days}",
        f"×{found.carries:.2f}" if found.enough else "",
        "" if breaks is None else f"{breaks.model}: {breaks.promise}, {breaks.short_of}",
        f"{found.gpu_s_per_1000:.0f}",
    )
    return cells if found.cost_per_1000 is None else (*cells, f"{found.cost_per_1000:.3f}")


def _day(found: Answer) -> str:
    once = "the trace, drawn anew" if found.draws == 1 else f"the trace {found.draws} times in succession, each time drawn anew"
    return f"{once}: {found.requests:,.0f} requests"


def _places(found: Answer) -> Iterator[str]:
    for gpu_id in range(found.gpus):
        seats = found.placement.on_gpu(gpu_id)
        names = [
            f"{seat.replica.model} (rank {seat.gpu_ids.index(gpu_id)} of {len(seat.gpu_ids)})"
            if len(seat.gpu_ids) > 1
            else seat.replica.model
            for seat in seats
        ]
        yield f"  GPU {gpu_id}: {', '.join(names) or 'nobody yet'}"
    seated = {seat.replica.model for seat in found.placement.seats}
    absent = [name for name in found.tp_sizes if name not in seated]
    if absent:
        yield f"  when they are asked for: {', '.join(absent)}"


# What the words of the command line stand for.


def _target(text: str) -> float:
    """99%, 99 or 0.99."""
    word = text.strip()
    try:
        value = float(word.removesuffix("%"))
    except ValueError:
        raise ConfigError.single("--target", f"{text!r} is no percentage") from None
    share = value / 100 if word.endswith("%") or value > 1 else value
    if not 0 < share <= 1:
        raise ConfigError.single("--target", f"{text} of the requests: above 0 % and up to 100 % are possible")
    return share


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SERVED_POLICIES:
            raise ConfigError.single("--policy", f"there is no policy {name!r}; there are {', '.join(SERVED_POLICIES)}")
    return names


def _positive(flag: str, word: str | float) -> float:
    try:
        value = float(word)
    except ValueError:
        raise ConfigError.single(flag, f"{word!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise ConfigError.single(flag, f"it is {value:g}; it has to be above zero")
    return value


def _require_between(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError.single(flag, f"it is {value}; {low} to {high} are possible")


def _splits(path: Path) -> tuple[Splits, ...]:
    if is_on_paper(path):
        return tuple(paper_splits(model, SIZES) for model in read_paper_models(path))
    return load_splits(path, SIZES)


def _trace(arguments: argparse.Namespace, models: Sequence[str]) -> Trace:
    whole = read_trace(arguments.trace)
    trace = whole.cut(arguments.from_s, arguments.to_s)
    if not trace.rows:
        raise ConfigError.single(str(arguments.trace), "has no request between --from and --to")
    names = names_for(whole, models, mapping(arguments.map))
    for theirs, ours in names.items():
        if theirs != ours:
            print(f"{theirs} of the trace is replayed on {ours}")
    return trace.renamed(names)
