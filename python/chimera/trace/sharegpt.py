"""ShareGPT's conversations: a JSON list of turns. They have texts and no times; an arrival process brings those.

Of each conversation the first question and its answer are taken, as the peers' benchmarks do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from chimera.errors import ConfigError

_ASKING = {"human", "user"}
_ANSWERING = {"gpt", "chatgpt", "bing", "bard", "assistant"}


class _Turn(msgspec.Struct, frozen=True):
    value: str
    speaker: str = msgspec.field(name="from")


class _Conversation(msgspec.Struct, frozen=True):
    conversations: tuple[_Turn, ...] = ()


class Exchange(msgspec.Struct, frozen=True):
    """A question, and how long its answer was."""

    prompt: str
    prompt_tokens: int
    output_tokens: int


def read_exchanges(path: str | Path, count: Callable[[str], int]) -> list[Exchange]:
    """`count` says how many tokens a text has. ConfigError when no conversation has a question and an answer."""
    try:
        document = msgspec.json.decode(Path(path).read_bytes(), type=list[_Conversation])
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault.strerror or fault}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise ConfigError.single(str(path), f"is no list of conversations: {fault}") from None
    found: list[Exchange] = []
    for conversation in document:
        match conversation.conversations:
            case (asked, told, *_) if asked.speaker in _ASKING and told.speaker in _ANSWERING:
                if asked.value.strip() and told.value.strip():
                    found.append(Exchange(asked.value, count(asked.value), max(1, count(told.value))))
    if not found:
        raise ConfigError.single(str(path), "has no conversation of a question and an answer")
    return found
