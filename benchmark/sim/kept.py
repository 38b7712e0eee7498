"""Runs that were made before: a line of JSON each, so that a set which takes an hour can be made in parts, and goes on.

The file is good for one state of the code; what has changed is taken out of it, and made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, float]


class Kept:
    def __init__(self, file: Path | None) -> None:
        """`None` keeps runs for as long as this process lives."""
        self._file = file
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self._known: dict[tuple[Any, ...], Figures] = {tuple(key): figures for key, figures in map(json.loads, lines)}

    def figures(self, key: tuple[Any, ...], run: Callable[[], Figures]) -> Figures:
        if key not in self._known:
            self._known[key] = run()
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        return self._known[key]
