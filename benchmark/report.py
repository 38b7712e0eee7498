"""How every script here tells its figures: the machine first, then one line a figure, and JSON for whoever keeps them.

A figure with a goal is `ok` or `short`; one short figure makes the script exit 1. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

SEED = 42


def parser(description: str | None, *, seed: int = SEED) -> argparse.ArgumentParser:
    """The options that every script has; a script adds its own."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    options.add_argument("--seed", type=int, default=seed, help=f"for whatever is random (default: {seed})")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    value: float
    unit: str
    goal: str | None = None
    """In words, as it is printed."""
    ok: bool | None = None
    """`None` when nothing was promised."""
    spread: tuple[float, float] | None = None
    """Between which values most repetitions lie."""

    def __str__(self) -> str:
        line = f"{self.name}: {number(self.value)} {self.unit}".rstrip()
        if self.spread is not None:
            line += f" [{number(self.spread[0])}–{number(self.spread[1])}]"
        if self.goal is not None:
            line += f" (goal {self.goal})"
        return line if self.ok is None else f"{line} {'ok' if self.ok else 'short'}"


class Figures:
    """The figures of one run. Prints each as it comes, so a run that is stopped has told what it knew."""

    def __init__(self, title: str, *, seed: int | None = None, facts: Mapping[str, str] | None = None) -> None:
        """`facts` are what else a reader must know to repeat the run: a GPU, the version of an engine."""
        self.title = title
        self.circumstances = {**_circumstances(seed), **(facts or {})}
        self.figures: list[Figure] = []
        print(f"# {title}")
        for name, value in self.circumstances.items():
            print(f"# {name}: {value}")

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        goal: str | None = None,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        spread: tuple[float, float] | float | None = None,
    ) -> None:
        """One figure. `goal` puts into words what `at_most` and `at_least` judge; alone it is shown and judges nothing.

        A single number as `spread` is the distance to either side.
        """
        bounds: list[tuple[str, bool]] = []
        if at_most is not None:
            bounds.append((f"≤ {number(at_most)}", value <= at_most))
        if at_least is not None:
            bounds.append((f"≥ {number(at_least)}", value >= at_least))
        figure = Figure(
            name=name,
            value=value,
            unit=unit,
            goal=goal or " and ".join(words for words, _ in bounds) or None,
            ok=all(kept for _, kept in bounds) if bounds else None,
            spread=(value - spread, value + spread) if isinstance(spread, float | int) else spread,
        )
        self.figures.append(figure)
        print(figure, flush=True)

    def samples(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        goal: str | None = None,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """The median of repetitions, with the tenth and the ninetieth percentile as its spread."""
        spread = (percentile(values, 10), percentile(values, 90))
        self.add(name, statistics.median(values), unit, goal, at_most=at_most, at_least=at_least, spread=spread)

    def finish(self, json_path: str | Path | None = None) -> int:
        """Writes the figures to `json_path`, if any, and answers the exit status: 1 when a goal was missed."""
        if json_path is not None:
            told = {
                "title": self.title,
                "command": _command(),
                **self.circumstances,
                "figures": [dataclasses.asdict(f) for f in self.figures],
            }
            Path(json_path).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return int(any(figure.ok is False for figure in self.figures))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that at least `percent` of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def number(value: float) -> str:
    """Three digits, more only where they stand before the point."""
    if not math.isfinite(value) or value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _command() -> str:
    """What was run, as one would type it again at the top of the checkout; of paths elsewhere only their names."""
    module = sys.modules["__main__"].__spec__
    script = [os.path.relpath(sys.argv[0], Path(__file__).parents[1])] if module is None else ["-m", module.name]
    words = [word for at, word in enumerate(sys.argv) if at and word != "--json" and sys.argv[at - 1] != "--json"]
    return shlex.join(["python", *script, *(Path(word).name if word.startswith("/") else word for word in words)])


def _circumstances(seed: int | None) -> dict[str, str]:
    told = {
        "machine": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return told if seed is None else {**told, "seed": str(seed)}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive has no history
        return "unknown"
    return described.stdout.strip()
