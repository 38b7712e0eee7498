"""`/v1/messages`: what a client is told. Content is a list of blocks; a stream is a sequence of named events around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.parsing.tools import Heard, Hearing
from chimera.server.answer import Answer
from chimera.server.errors import anthropic_error_body
from chimera.server.passages import Passage, Passages, Step

_json = msgspec.json.Encoder().encode


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use"):
    id: str
    name: str
    input: Any


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Here what came from the cache is counted apart from the input."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; the rest of it is the type's."""

    type: str


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int


class MessagesDialect:
    """How `/v1/messages` answers."""

    def __init__(self, model: str, name: str, hearing: Hearing | None, *, tells_thoughts: bool) -> None:
        self._model = model
        self._name = name
        self._ear = None if hearing is None else hearing.ear()
        self._passages = Passages(tells_thoughts=tells_thoughts)
        self._begun = False

    def piece(self, text: str, answer: Answer) -> bytes:
        return self._opening(answer) + self._tell(Heard(text) if self._ear is None else self._ear.feed(text))

    def close(self, text: str, answer: Answer) -> bytes:
        last = self.piece(text, answer) if text else self._opening(answer)
        if self._ear is not None:
            last += self._tell(self._ear.finish())
        last += self._steps(self._passages.end())
        return last + _event("message_delta", {"delta": self._ending(answer), "usage": _usage(answer)})

    def done(self, answers: Sequence[Answer]) -> bytes:
        return _event("message_stop", {})

    def failure(self, error: RequestError) -> bytes:
        return b"event: error\ndata: %b\n\n" % anthropic_error_body(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        [text], [answer] = texts, answers
        for _ in self._passages.add(Heard(text) if self._ear is None else self._ear.whole(text)):
            pass
        for _ in self._passages.end():
            pass
        return _json(self._message(answer))

    def _opening(self, answer: Answer) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return _event("message_start", {"message": self._message(answer)})

    def _tell(self, heard: Heard) -> bytes:
        return self._steps(self._passages.add(heard))

    def _steps(self, steps: Iterable[Step]) -> bytes:
        return b"".join(_step(what, passage, text) for what, passage, text in steps)

    def _message(self, answer: Answer) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._name,
            model=self._model,
            content=[_block(passage) for passage in self._passages.all],
            usage=_usage(answer),
            **self._ending(answer),
        )

    def _ending(self, answer: Answer) -> dict[str, Any]:
        reason, sequence = None, None
        match answer.finish:
            case None:
                pass
            case finish if finish.reason is Outcome.LENGTH:
                reason = "max_tokens"
            case finish if isinstance(finish.matched, str):
                reason, sequence = "stop_sequence", finish.matched
            case _:
                reason = "tool_use" if self._passages.has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}


def _step(what: str, passage: Passage, text: str) -> bytes:
    match what:
        case "open":
            return _event("content_block_start", {"index": passage.number, "content_block": _block(passage)})
        case "more":
            return _event("content_block_delta", {"index": passage.number, "delta": _delta(passage, text)})
        case _:
            return _event("content_block_stop", {"index": passage.number})


def _delta(passage: Passage, text: str) -> dict[str, str]:
    match passage.kind:
        case "thought":
            return {"type": "thinking_delta", "thinking": text}
        case "said":
            return {"type": "text_delta", "text": text}
        case _:
            return {"type": "input_json_delta", "partial_json": text}


def _block(passage: Passage) -> TextBlock | ThinkingBlock | ToolUseBlock:
    match passage.kind:
        case "thought":
            return ThinkingBlock(thinking=passage.text)
        case "said":
            return TextBlock(text=passage.text)
        case _:
            return ToolUseBlock(id=f"toolu_{passage.key}", name=passage.name, input=_arguments(passage.text))


def _arguments(text: str) -> Any:
    """As far as they are JSON: an answer that its length has cut off has none."""
    try:
        return msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {}


def _event(name: str, body: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _json({"type": name, **body}))


def _usage(answer: Answer) -> MessageUsage:
    return MessageUsage(
        input_tokens=len(answer.prompt_ids) - answer.cached_tokens,
        cache_read_input_tokens=answer.cached_tokens,
        output_tokens=len(answer.emitted),
    )
