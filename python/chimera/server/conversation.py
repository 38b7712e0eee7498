"""What every API's chats are brought to: one text to a message, calls with their arguments as objects. Knows no dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from chimera.errors import RequestError

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class TextPart(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def text(self) -> str | None: ...


def plain_text(content: str | Sequence[TextPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in _TEXT_PARTS:
            told = f"{where}: content of type {part.type!r} is not supported by this server"
            raise RequestError("unsupported_parameter", told, param=where)
    return "".join(part.text or "" for part in content)


def call_arguments(arguments: str, where: str) -> dict[str, Any]:
    """Chat templates write them as JSON of their own."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        raise RequestError("bad_request", f"{where}: is no JSON object", param=where) from None
