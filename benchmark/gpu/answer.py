"""What one question has found out so far, kept line by line so that a question that dies or is cut leaves what it knew."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.report import percentile


class Answer:
    """Written by the process that answers a question."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def figure(self, name: str, value: float, unit: str, spread: tuple[float, float] | None = None) -> None:
        self._write({"name": name, "value": float(value), "unit": unit, "spread": spread})

    def samples(self, name: str, values: Sequence[float], unit: str) -> None:
        """The median, with the tenth and the ninetieth percentile."""
        self.figure(name, statistics.median(values), unit, (percentile(values, 10), percentile(values, 90)))

    def fact(self, name: str, told: object) -> None:
        """What is no number: whether something works, and with which words it does not."""
        self._write({"name": name, "told": str(told)})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as lines:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures and the facts of an answer; its last line may be cut short."""
    figures: list[dict[str, Any]] = []
    facts: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "told" in entry:
            facts[entry["name"]] = entry["told"]
        else:
            figures.append(entry)
    return figures, facts
