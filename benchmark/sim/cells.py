"""Finds the loads of cells.json: for each trace and cluster the rate scales at which `static` attains 95, 80 and 50 %.

Run once, before a policy is tuned; what it writes is kept, so that later figures speak of the same loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from benchmark.sim.bench import HERE, TRACES, Cell, costs, prepared, replay

WINDOWS = (
    ("arena_prism18", 0.0, 120.0),
    ("azure2023_conv_first30min", 0.0, 120.0),
    ("azure2023_code_first30min", 0.0, 120.0),
    ("mooncake_conv_first30min", 0.0, 120.0),
    ("servegen_18tenants_day", 50400.0, 50520.0),
    ("servegen_18tenants_day", 14400.0, 14520.0),
)
CLUSTERS = (("8", 2), ("18", 4), ("18", 6), ("18", 8))
LEVELS = (95, 80, 50)
LOWEST, HIGHEST, CLOSE = 1 / 16, 64.0, 1.06
SEED = 1


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--traces", type=Path, default=TRACES)
    options.add_argument("--out", type=Path, default=HERE / "cells.json")
    arguments = options.parse_args()
    found = []
    for trace, from_s, to_s in WINDOWS:
        for models, gpus in CLUSTERS:
            known: dict[float, float] = {}
            for level in LEVELS:
                rate = _rate_at(
                    Cell(trace=trace, from_s=from_s, to_s=to_s, models=models, gpus=gpus, level="", rate=1.0),
                    level,
                    known,
                    arguments.traces,
                )
                found.append(
                    Cell(trace=trace, from_s=from_s, to_s=to_s, models=models, gpus=gpus, level=f"{level}%", rate=rate)
                )
                print(found[-1].name, rate, flush=True)
    arguments.out.write_text(json.dumps([dataclasses.asdict(cell) for cell in found], indent=1) + "\n")
    return 0


def _rate_at(cell: Cell, level: int, known: dict[float, float], traces: Path) -> float:
    """The highest rate, to 6 %, at which `static` still attains the level; the lowest tried if there is none."""
    table = costs()
    ready = prepared(cell, traces, table)

    def attained(rate: float) -> float:
        if rate not in known:
            outcome = replay(dataclasses.replace(cell, rate=rate), ready, table, "static", None, SEED)
            known[rate] = outcome.metrics.joint_attainment
        return known[rate]

    low, high = LOWEST, LOWEST * 2
    while high < HIGHEST and attained(high) >= level / 100:
        low, high = high, high * 2
    while high / low > CLOSE:
        middle = float(f"{math.sqrt(low * high):.3g}")
        if attained(middle) >= level / 100:
            low = middle
        else:
            high = middle
    return low


if __name__ == "__main__":
    raise SystemExit(main())
