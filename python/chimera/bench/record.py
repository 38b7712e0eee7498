"""One request of a run, as its client saw it: a line of JSON. Times are seconds since the run began, by a monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from chimera.core.metrics import Story
from chimera.core.model import Slo
from chimera.errors import ConfigError


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Filled in as the answer comes."""

    request_id: str
    model: str
    planned_s: float
    """When it was to be sent."""
    prompt_tokens: int
    """As planned, or as the server counted them."""
    wanted_tokens: int
    slo: Slo = Slo()
    sent_s: float | None = None
    """When its bytes were given to the kernel, or a connection was asked for. A request that was not sent has none."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    output_tokens: int = 0
    """Those that came, as the server counted them; else the pieces of text."""
    pieces_s: list[float] = []
    """How long after the one before each piece of text came, beginning with the second."""
    cached_tokens: int = 0
    status: int = 0
    refusal: str = ""
    """Why it was not answered, in one word."""
    error: str = ""
    """The same in the server's words."""
    server_ttft_s: float | None = None
    """What the server itself says, where its API does."""

    @property
    def answered(self) -> bool:
        return self.sent_s is not None and self.last_token_s is not None and not self.refusal

    @property
    def lag_s(self) -> float:
        return 0.0 if self.sent_s is None else self.sent_s - self.planned_s

    @property
    def story(self) -> Story | None:
        """For `chimera.core.metrics`; only what was sent is one."""
        if self.sent_s is None:
            return None
        return Story(
            request_id=self.request_id,
            model=self.model,
            sent_s=self.sent_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            slo=self.slo,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s if self.answered else None,
            refusal=self.refusal,
        )


def stories(records: Iterable[Record]) -> list[Story]:
    return [story for record in records if (story := record.story) is not None]


class Journal:
    """Records as they end, in a file: what is known is kept, whatever becomes of the client."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._encode = msgspec.json.Encoder().encode

    def note(self, record: Record) -> None:
        self._file.write(self._encode(record) + b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *fault: object) -> None:
        self._file.close()


def write_records(path: Path, records: Iterable[Record]) -> None:
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for record in records:
            file.write(encoder.encode(record) + b"\n")


def read_records(path: Path) -> list[Record]:
    return list(_read(path))


def _read(path: Path) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(Record)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield decoder.decode(line)
                except msgspec.DecodeError as fault:
                    raise ConfigError.single(str(path), f"is no record of a request: {fault}", where=f"line {number}") from None
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault.strerror or fault}") from None
