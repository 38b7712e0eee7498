"""Anthropic's words for a chat: `/v1/messages` and its `count_tokens`. Knows no socket.

Content is a list of blocks; ours is one block of text. A stream is a sequence of named events around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.errors import anthropic_error_body
from chimera.server.intake import Nucleus, OurWords, Positive, TopK
from chimera.server.readers import Dialect

_json = msgspec.json.Encoder().encode

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "output_format": (),
}
"""Known and not served, with the values that ask for nothing."""


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of content."""

    type: str
    text: str | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CountRequest(OurWords, frozen=True, kw_only=True):
    """What a prompt is made of; all that `count_tokens` takes."""

    model: str
    messages: list[Turn]
    system: str | list[Block] | None = None
    # Known, and not served yet.
    tools: Any = None
    tool_choice: Any = None
    thinking: Any = None
    mcp_servers: Any = None

    def check(self) -> None:
        intake.refuse_unsupported(self, {name: _UNSUPPORTED[name] for name in self.__struct_fields__ if name in _UNSUPPORTED})

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        if not self.messages:
            raise RequestError("bad_request", "messages: there is none", param="messages")
        chat = [
            {"role": turn.role, "content": _plain(turn.content, f"messages[{i}].content")}
            for i, turn in enumerate(self.messages)
        ]
        if self.system:
            chat.insert(0, {"role": "system", "content": _plain(self.system, "system")})
        return [tokenizer.encode_chat(chat)]


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    max_tokens: Positive
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_p: Nucleus | None = None
    top_k: TopK | None = None
    # Known, and not served yet.
    container: Any = None
    output_format: Any = None

    @property
    def stop(self) -> list[str] | None:
        return self.stop_sequences

    @property
    def answer_tokens(self) -> int:
        return self.max_tokens

    @property
    def prompt_field(self) -> str:
        return "messages"

    def sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or -1,
        )

    def dialect(self, request_id: str, tokenizer: ModelTokenizer) -> Dialect:
        return MessagesDialect(self.model, f"msg_{request_id}")


class MessagesDialect:
    """How `/v1/messages` answers."""

    def __init__(self, model: str, name: str) -> None:
        self._model = model
        self._name = name
        self._begun = False

    def piece(self, text: str, answer: Answer) -> bytes:
        delta = _event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})
        return delta if self._begun else self._opening(answer) + delta

    def close(self, text: str, answer: Answer) -> bytes:
        last = self.piece(text, answer) if text else b"" if self._begun else self._opening(answer)
        ending = _event("message_delta", {"delta": _ending(answer), "usage": _usage(answer)})
        return last + _event("content_block_stop", {"index": 0}) + ending

    def done(self, answers: Sequence[Answer]) -> bytes:
        return _event("message_stop", {})

    def failure(self, error: RequestError) -> bytes:
        return b"event: error\ndata: %b\n\n" % anthropic_error_body(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        [text], [answer] = texts, answers
        return _json(self._message([{"type": "text", "text": text}], answer))

    def _opening(self, answer: Answer) -> bytes:
        self._begun = True
        start = _event("message_start", {"message": self._message([], answer)})
        return start + _event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})

    def _message(self, content: list[dict[str, Any]], answer: Answer) -> dict[str, Any]:
        return {
            "id": self._name,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **_ending(answer),
            "usage": _usage(answer),
        }


def _event(name: str, body: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _json({"type": name, **body}))


def _ending(answer: Answer) -> dict[str, Any]:
    match answer.finish:
        case None:
            return {"stop_reason": None, "stop_sequence": None}
        case finish if finish.reason is Outcome.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        case finish if isinstance(finish.matched, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": finish.matched}
        case _:
            return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(answer: Answer) -> dict[str, int]:
    """Here what came from the cache is counted apart from the input."""
    return {
        "input_tokens": len(answer.prompt_ids) - answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": len(answer.emitted),
    }


def _plain(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            told = f"{where}: a block of type {block.type!r} is not supported by this server"
            raise RequestError("unsupported_parameter", told, param=where)
    return "".join(block.text or "" for block in content)
