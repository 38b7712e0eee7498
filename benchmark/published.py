"""Writes `benchmark/README.md`: every figure that is published, with the command, machine, date and commit it came from.

The figures are read from `benchmark/results`; a script leaves them there when it is given `--json`. Whoever wants to publish a
figure runs its script and then this one, and nobody types a number.

    python benchmark/micro/wire.py --json benchmark/results/wire.json && python benchmark/published.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script: the repository is not a package

from benchmark.report import number

HERE = Path(__file__).parent
HEAD = """# What was measured

Made by `python benchmark/published.py` from [results](results); not written by hand. *Held* says whether a goal was met in
that very run. Ratios are taken within one run; absolute times on two shared cores say little beyond that machine. A figure
without a goal is left to its JSON, of which there is one for each heading.
"""


def page(results: Path = HERE / "results") -> str:
    told = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    return "\n".join([HEAD, *(section(path, result) for path, result in told if result.get("figures"))])


def section(path: Path, result: dict[str, Any]) -> str:
    lines = [f"## {result['title']}", "", _circumstances(path, result), ""]
    rows = list(_rows(result["figures"]))
    if rows:
        lines += ["| figure | value | spread | goal | held |", "|---|---:|---:|---:|---|", *rows, ""]
    return "\n".join(lines)


def _circumstances(path: Path, result: dict[str, Any]) -> str:
    command = f"`{result['command']}` · " if "command" in result else ""
    return (
        f"{command}[{path.name}](results/{path.name}) · {result['machine']} · {result['date'][:10]} · commit {result['commit']}"
    )


def _rows(figures: list[dict[str, Any]]) -> Iterator[str]:
    for figure in figures:
        if figure["goal"] is None:
            continue
        spread = "" if figure["spread"] is None else "–".join(number(value) for value in figure["spread"])
        held = {True: "yes", False: "**no**", None: ""}[figure["ok"]]
        name = figure["name"].strip().replace("|", "/")
        yield f"| {name} | {number(figure['value'])} {figure['unit']} | {spread} | {figure['goal']} | {held} |"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
