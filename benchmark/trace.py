"""What is in a trace; and another trace made from it, or from nothing.

python benchmark/trace.py FILE [--from S] [--to S] [--time-scale X] [--rate-scale X] [--length-scale X] [--out FILE.csv]
python benchmark/trace.py --make 10 --seconds 60 --models 4 [--arrivals gamma --cv 3] [--shape power-law] --out FILE.csv
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

from chimera.cli.status import table
from chimera.core.metrics import percentile
from chimera.errors import ChimeraError
from chimera.trace.generator import ARRIVALS, SHAPES, Recipe, generate
from chimera.trace.reader import read_trace
from chimera.trace.tables import COLUMNS
from chimera.trace.trace import Trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="any trace that chimera reads")
    add("--make", type=float, metavar="RATE", help="instead of reading: so many requests per second")
    add("--seconds", type=float, default=60.0)
    add("--models", type=int, default=4, metavar="N")
    add("--arrivals", choices=ARRIVALS, default="poisson")
    add("--cv", type=float, default=1.0)
    add("--shape", choices=SHAPES, default="uniform")
    add("--alpha", type=float, default=1.0)
    add("--from", dest="from_s", type=float, default=0.0, metavar="S")
    add("--to", dest="to_s", type=float, default=math.inf, metavar="S")
    add("--time-scale", type=float, default=1.0)
    add("--rate-scale", type=float, default=1.0)
    add("--length-scale", type=float, default=1.0)
    add("--seed", type=int, default=42)
    add("--out", type=Path, metavar="FILE.csv", help="write it there")
    arguments = parser.parse_args()
    if (arguments.file is None) == (arguments.make is None):
        parser.error("either FILE or --make")
    try:
        trace = made(arguments) if arguments.file is None else read_trace(arguments.file, arguments.from_s, arguments.to_s)
        trace = trace.time_scaled(arguments.time_scale).rate_scaled(arguments.rate_scale, arguments.seed)
        trace = trace.length_scaled(arguments.length_scale)
    except ChimeraError as fault:
        print(fault, file=sys.stderr)
        return 1
    print(described(trace))
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((f"{r.at_s:.6f}", r.model, r.prompt_tokens, r.output_tokens) for r in trace.rows)
    return 0


def made(arguments: argparse.Namespace) -> Trace:
    names = tuple(f"model_{number}" for number in range(1, arguments.models + 1))
    recipe = Recipe(
        models=names,
        rate=arguments.make,
        seconds=arguments.seconds,
        arrivals=arguments.arrivals,
        cv=arguments.cv,
        shape=arguments.shape,
        alpha=arguments.alpha,
    )
    return generate(recipe, arguments.seed)


def described(trace: Trace) -> str:
    rows = trace.rows
    gaps = [later.at_s - row.at_s for row, later in itertools.pairwise(rows)]
    mean = statistics.fmean(gaps) if gaps else 0.0
    lines = [f"{len(rows)} requests over {trace.span_s:.1f} s, {len(trace.models)} models"]
    if mean:
        lines.append(f"{1 / mean:.2f} requests/s, coefficient of variation of the gaps {statistics.pstdev(gaps) / mean:.2f}")
    for name, values in (("prompt", [r.prompt_tokens for r in rows]), ("output", [r.output_tokens for r in rows])):
        if values:
            told = ", ".join(f"p{p} {percentile(sorted(values), p)}" for p in (50, 95, 99))
            lines.append(f"{name} tokens: mean {statistics.fmean(values):.0f}, {told}")
    asked = Counter(row.model for row in rows)
    cells = [(name, str(count), f"{100 * count / len(rows):.1f}") for name, count in asked.most_common()]
    return "\n".join([*lines, table(("MODEL", "REQUESTS", "%"), cells)])


if __name__ == "__main__":
    sys.exit(main())
