"""What the verbs share that replay a trace: whose name stands for whose; and on paper, a bar while they reckon, and a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from chimera.errors import ConfigError

_BAR = 30


def mapping(words: Sequence[str]) -> dict[str, str]:
    """Which of our models stands for one of the trace."""
    found = {}
    for word in words:
        theirs, equals, ours = word.partition("=")
        if not equals:
            raise ConfigError.single("--map", f"{word!r} is not TRACE=MODEL")
        found[theirs] = ours
    return found


def require_folder(flag: str, file: Path | None) -> None:
    """What is reckoned takes minutes: what cannot be written is said before."""
    if file is not None and not file.parent.is_dir():
        raise ConfigError.single(flag, f"there is no folder {file.parent}")


def require_png(flag: str, file: Path | None) -> None:
    if file is not None and file.suffix != ".png":
        raise ConfigError.single(flag, f"{file} does not end in .png")


def progress(title: str) -> Callable[[float], None] | None:
    """A bar, where somebody looks."""
    if not sys.stderr.isatty():
        return None

    def show(share: float) -> None:
        done = round(_BAR * share)
        print(f"\r{title:32} [{'#' * done}{'.' * (_BAR - done)}] {share:4.0%}", end="", file=sys.stderr, flush=True)

    return show


def clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r" + " " * 80 + "\r", end="", file=sys.stderr, flush=True)


def print_table(rows: Sequence[Sequence[str]], *, left: int) -> None:
    """So many columns begin on the left, the others end on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
