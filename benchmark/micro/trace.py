"""Reads a trace of ten million rows, and says how long that takes and how much memory: a file may be longer than memory.

python benchmark/micro/trace.py [--rows 10000000]
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera.trace.reader import read_trace, rows_of
from chimera.units import KIB, MIB

from benchmark.report import Figures, parser


def write(path: Path, rows: int, dice: random.Random) -> None:
    with path.open("w") as file:
        file.write("timestamp,model,prompt_tokens,output_tokens\n")
        for number in range(rows):
            lengths = f"{dice.randrange(1, 9000)},{dice.randrange(1, 900)}"
            file.write(f"{number / 1000:.3f},model_{dice.randrange(18):02},{lengths}\n")


def forget_peak() -> None:
    """What was the most so far is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * KIB / MIB


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=10_000_000)
    arguments = options.parse_args()
    figures = Figures("reading a long trace", seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        path = Path(folder) / "long.csv"
        write(path, arguments.rows, random.Random(arguments.seed))
        forget_peak()
        before = peak_mib()
        began = time.perf_counter()
        count = sum(1 for _ in rows_of(path))
        figures.add("rows read", count, "", at_least=arguments.rows)
        figures.add("reading", (time.perf_counter() - began) / count * 1e6, "µs per row")
        figures.add("memory more than before", peak_mib() - before, "MiB", at_most=16)
        kept = len(read_trace(path, 60, 120).rows)
        figures.add("rows of one minute", kept, "", at_least=60_000, at_most=60_000)
        figures.add("memory more than before, that minute kept", peak_mib() - before, "MiB", at_most=64)
    return figures.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
