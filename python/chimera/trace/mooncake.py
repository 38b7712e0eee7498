"""Mooncake's traces: a JSON object a line, with milliseconds, lengths, and the ids of each prompt's blocks of 512 tokens.

Equal ids at the start of two prompts are an equal prefix; what else they say is not in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import msgspec

from chimera.errors import ConfigError
from chimera.trace.tables import tokens
from chimera.trace.trace import Row

BLOCK_TOKENS = 512


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    model: str | None = None


class Lines:
    """The one kind of file there is."""

    def rows(self, source: str, first: str, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
        decoder = msgspec.json.Decoder(_Line)
        stem = Path(source).name.partition(".")[0]
        for number, text in enumerate(chain([first], lines), start=1):
            if not text.strip():
                continue
            where = f"line {number}"
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as fault:
                raise ConfigError.single(source, str(fault), where=where) from None
            if line.timestamp < 0:
                raise ConfigError.single(source, f"{line.timestamp:g} is no moment of a trace", where=where)
            row = Row(
                line.timestamp / 1000,
                line.model or stem,
                tokens(source, where, "input_length", line.input_length),
                tokens(source, where, "output_length", line.output_length),
                line.hash_ids,
            )
            yield where, row
