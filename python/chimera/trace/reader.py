"""Reads trace files of every kind, told apart by what is in them; gzipped or not; row by row, so that a file may be longer
than memory.

Every fault names the file and the line. A trace that is out of order is refused: sorting it would hide that the file is
not what its reader thinks.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chimera.errors import ConfigError
from chimera.trace import mooncake, prism, tables
from chimera.trace.trace import Row, Trace

_GZIP = b"\x1f\x8b"
_PICKLE = b"\x80"


def read_trace(path: str | Path, from_s: float = 0.0, to_s: float = math.inf) -> Trace:
    """The rows of `from_s` ≤ time < `to_s`, told from zero. Only they are kept in memory, and nothing after them is read."""
    kept = []
    for row in rows_of(path):
        if row.at_s >= to_s:
            break
        if row.at_s >= from_s:
            kept.append(row)
    trace = Trace(str(path), tuple(kept))
    return trace.cut(from_s, to_s) if from_s else trace


def rows_of(path: str | Path) -> Iterator[Row]:
    """One row after the other, in order of time."""
    path = Path(path)
    source = str(path)
    try:
        with _opened(path) as raw:
            if raw.peek(1)[:1] == _PICKLE:
                yield from prism.rows(source, raw)
                return
            text = io.TextIOWrapper(raw, newline="")
            first = text.readline()
            yield from _in_order(source, _kind(source, first).rows(source, first, text))
    except OSError as fault:
        raise ConfigError.single(source, f"cannot be read: {fault.strerror or fault}") from None
    except (EOFError, zlib.error, UnicodeDecodeError) as fault:
        raise ConfigError.single(source, f"is neither text nor gzipped text: {fault}") from None


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    with path.open("rb") as file:
        if file.peek(2)[:2] != _GZIP:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked, io.BufferedReader(unpacked) as readable:
            yield readable


def _kind(source: str, first: str) -> tables.Table | mooncake.Lines:
    if first.lstrip().startswith("{"):
        return mooncake.Lines()
    if first.lstrip().startswith("["):
        raise ConfigError.single(source, "is a list of conversations, which have no times: it is a --dataset, not a trace")
    return tables.table_of(source, first)


def _in_order(source: str, rows: Iterator[tuple[str, Row]]) -> Iterator[Row]:
    before_s = -math.inf
    for where, row in rows:
        if row.at_s < before_s:
            told = f"{row.at_s:g} s comes after {before_s:g} s; a trace is in order of time"
            raise ConfigError.single(source, told, where=where)
        before_s = row.at_s
        yield row
