"""Traces that are CSV: our own columns, Azure's public files, BurstGPT's. Knows columns and cells, no file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from chimera.errors import ConfigError
from chimera.trace.trace import Row

COLUMNS = ("timestamp", "model", "prompt_tokens", "output_tokens")
LONGEST_TOKENS = 10_000_000
"""No model reads more; a larger figure is a mistake in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One kind of file, by the names of its columns."""

    at: str
    model: str | None
    """`None`: the whole file is one model, named as the file is."""
    prompt: str
    output: str
    from_zero: bool = False
    """Whether times are told from the first row on."""
    failures_are_empty: bool = False
    """Whether a request that failed stands in the file with no answer; such rows are passed over."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in (self.at, self.model, self.prompt, self.output) if name is not None)

    def rows(self, source: str, first: str, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
        header = _header(first)
        at, prompt, output = (header.index(name) for name in (self.at, self.prompt, self.output))
        model = None if self.model is None else header.index(self.model)
        stem = Path(source).name.partition(".")[0]
        names: dict[str, str] = {}  # every name once, however many rows have it
        zero_s: float | None = None
        reader = csv.reader(lines)
        for cells in reader:
            if not cells:
                continue
            where = f"line {reader.line_num + 1}"
            if len(cells) != len(header):
                raise ConfigError.single(source, f"has {len(cells)} cells, and the header {len(header)}", where=where)
            if self.failures_are_empty and cells[output].strip() == "0":
                continue
            at_s = _moment_s(source, where, cells[at])
            if self.from_zero:
                zero_s = at_s if zero_s is None else zero_s
                at_s -= zero_s
            name = stem if model is None else cells[model].strip()
            if not name:
                raise ConfigError.single(source, "names no model", where=where)
            row = Row(
                at_s,
                names.setdefault(name, name),
                tokens(source, where, header[prompt], cells[prompt]),
                tokens(source, where, header[output], cells[output]),
            )
            yield where, row


OURS = Table(at=COLUMNS[0], model=COLUMNS[1], prompt=COLUMNS[2], output=COLUMNS[3])
AZURE = Table(at="TIMESTAMP", model=None, prompt="ContextTokens", output="GeneratedTokens", from_zero=True)
BURST_GPT = Table(at="Timestamp", model="Model", prompt="Request tokens", output="Response tokens", failures_are_empty=True)


def table_of(source: str, first: str) -> Table:
    header = set(_header(first))
    for table in (OURS, AZURE, BURST_GPT):
        if set(table.columns) <= header:
            return table
    told = f"has columns {', '.join(_header(first)) or 'none'}; needed are {', '.join(COLUMNS)}"
    raise ConfigError.single(source, told, where="line 1")


def tokens(source: str, where: str, column: str, cell: object) -> int:
    try:
        count = int(str(cell))
    except ValueError:
        raise ConfigError.single(source, f"{column} is {cell!r}, which is no number of tokens", where=where) from None
    if not 1 <= count <= LONGEST_TOKENS:
        raise ConfigError.single(source, f"{column} is {count}; 1 to {LONGEST_TOKENS} are possible", where=where)
    return count


def _header(first: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([first]), [])]


def _moment_s(source: str, where: str, cell: str) -> float:
    try:
        at_s = float(cell)
    except ValueError:
        try:
            at_s = datetime.fromisoformat(cell.strip()[:26]).replace(tzinfo=UTC).timestamp()
        except ValueError:
            raise ConfigError.single(source, f"{cell!r} is no moment: seconds are wanted", where=where) from None
    if not math.isfinite(at_s) or at_s < 0:
        raise ConfigError.single(source, f"{cell} is no moment of a trace", where=where)
    return at_s
