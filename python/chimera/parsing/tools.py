"""The tools that a model may call in its answer, and what an answer turns out to be made of. Knows no spelling of calls."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function of the client's, as the model is told of it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool = False
    """Whether arguments are held to the schema while they are written."""

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: value for key, value in told.items() if value is not None}}


class Toolbox(msgspec.Struct, frozen=True, kw_only=True):
    """What one request offers."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required", "named"] = "auto"
    """`named`: the only tool there is must be called."""
    parallel: bool = True
    """Whether there may be several calls in one answer."""


class CallPiece(msgspec.Struct, frozen=True):
    """A piece of one call: the first has its name, the others more of its arguments."""

    index: int
    name: str | None
    arguments: str


class Heard(msgspec.Struct, frozen=True):
    """What a piece of an answer's text was."""

    said: str = ""
    thought: str = ""
    calls: tuple[CallPiece, ...] = ()


class Ear(Protocol):
    """Listens to one answer."""

    def feed(self, text: str) -> Heard: ...

    def finish(self) -> Heard:
        """What was held back when no more text comes."""

    def whole(self, text: str) -> Heard:
        """All of an answer at once, by a fresh ear."""


class Hearing(Protocol):
    """How the answers of one request are listened to."""

    def ear(self) -> Ear: ...
