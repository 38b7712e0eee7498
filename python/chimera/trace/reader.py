"""Reads traces: `timestamp,model,prompt_tokens,output_tokens`, or the columns of Azure's public files; gzipped or not.

Every fault names the file and the line. A trace that is out of order is refused: sorting it would hide that the file is
not what its reader thinks.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from chimera.errors import ConfigError
from chimera.trace.trace import Row, Trace

COLUMNS = ("timestamp", "model", "prompt_tokens", "output_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LONGEST_TOKENS = 10_000_000
"""No model reads more; a larger figure is a mistake in the file."""


def read_trace(path: str | Path) -> Trace:
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault.strerror or fault}") from None
    except (EOFError, zlib.error, UnicodeDecodeError) as fault:
        raise ConfigError.single(str(path), f"is neither text nor gzipped text: {fault}") from None
    return Trace(str(path), tuple(_rows(str(path), text)))


def _rows(source: str, text: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text))
    header = tuple(name.strip() for name in next(lines, []))
    azure = header == AZURE_COLUMNS
    if not azure and not set(COLUMNS) <= set(header):
        raise ConfigError.single(
            source, f"has columns {', '.join(header) or 'none'}; needed are {', '.join(COLUMNS)}", where="line 1"
        )
    at, prompt, output = (header.index(name) for name in (AZURE_COLUMNS if azure else (COLUMNS[0], *COLUMNS[2:])))
    model = None if azure else header.index(COLUMNS[1])
    stem = Path(source).name.partition(".")[0]
    before_s, zero_s = -math.inf, None
    for cells in lines:
        where = f"line {lines.line_num}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise ConfigError.single(source, f"has {len(cells)} cells, and the header {len(header)}", where=where)
        at_s = _moment_s(source, where, cells[at])
        if azure:
            zero_s = at_s if zero_s is None else zero_s
            at_s -= zero_s
        if at_s < before_s:
            raise ConfigError.single(source, f"{at_s:g} s comes after {before_s:g} s; a trace is in order of time", where=where)
        before_s = at_s
        name = stem if model is None else cells[model].strip()
        if not name:
            raise ConfigError.single(source, "names no model", where=where)
        yield Row(
            at_s,
            name,
            _tokens(source, where, header[prompt], cells[prompt]),
            _tokens(source, where, header[output], cells[output]),
        )


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


def _tokens(source: str, where: str, column: str, cell: str) -> int:
    try:
        tokens = int(cell)
    except ValueError:
        raise ConfigError.single(source, f"{column} is {cell!r}, which is no number of tokens", where=where) from None
    if not 1 <= tokens <= LONGEST_TOKENS:
        raise ConfigError.single(source, f"{column} is {tokens}; 1 to {LONGEST_TOKENS} are possible", where=where)
    return tokens
