"""An answer as a sequence of passages: thoughts, what is said, calls. For the APIs that number them and open and close each.

Knows no API's words.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from chimera.parsing.tools import CallPiece, Heard

Kind = Literal["thought", "said", "call"]


@dataclass(slots=True)
class Passage:
    kind: Kind
    number: int
    name: str = ""
    """Of the tool that is called."""
    call: int = -1
    key: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    """To be named by."""
    text: str = ""
    """So far: of a call, its arguments as JSON."""


Step = tuple[Literal["open", "more", "close"], Passage, str]
"""What happens to a passage, and the text that came."""


class Passages:
    """One answer's. A step is to be told as it comes: passages go on growing."""

    def __init__(self, *, tells_thoughts: bool = True) -> None:
        self.all: list[Passage] = []
        self._open: Passage | None = None
        self._tells_thoughts = tells_thoughts

    @property
    def has_calls(self) -> bool:
        return any(passage.kind == "call" for passage in self.all)

    def add(self, heard: Heard) -> Iterator[Step]:
        if heard.thought and self._tells_thoughts:
            yield from self._grow("thought", heard.thought)
        if heard.said:
            yield from self._grow("said", heard.said)
        for piece in heard.calls:
            yield from self._call(piece)

    def end(self) -> Iterator[Step]:
        """An answer of nothing at all has said an empty text."""
        if not self.all:
            yield from self._begin(Passage("said", 0))
        yield from self._close()

    def _grow(self, kind: Kind, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Passage(kind, len(self.all)))
        yield from self._more(text)

    def _call(self, piece: CallPiece) -> Iterator[Step]:
        if self._open is None or self._open.call != piece.index:
            yield from self._begin(Passage("call", len(self.all), name=piece.name or "", call=piece.index))
        if piece.arguments:
            yield from self._more(piece.arguments)

    def _begin(self, passage: Passage) -> Iterator[Step]:
        yield from self._close()
        self.all.append(passage)
        self._open = passage
        yield "open", passage, ""

    def _more(self, text: str) -> Iterator[Step]:
        assert self._open is not None
        self._open.text += text
        yield "more", self._open, text

    def _close(self) -> Iterator[Step]:
        if self._open is not None:
            closed, self._open = self._open, None
            yield "close", closed, ""
