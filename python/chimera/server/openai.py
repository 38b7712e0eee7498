"""What OpenAI's two kinds of completion share: the words of a request, and what every answer repeats. Knows no socket.

An event of a stream is a head and a tail that are the same for the whole stream, and the text as JSON between them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from chimera.errors import RequestError
from chimera.msg.stream import Grammar
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.words import Choices, Count, OurWords, Positive, Seed

json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
MARK = "\N{SYMBOL FOR UNIT SEPARATOR}"
"""Stands for the text while an event's head and tail are made; never sent."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
}
"""Known and not served, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    form: dict[str, Any] | bool | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What form an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                return Grammar("json_schema", '{"type": "object"}')
            case _ if self.json_schema is None or self.json_schema.form is None:
                told = "response_format: json_schema.schema is missing"
                raise RequestError("bad_request", told, param="response_format.json_schema.schema")
            case _:
                return Grammar("json_schema", json(self.json_schema.form).decode())


class OpenAiRequest(OurWords, frozen=True, kw_only=True):
    """What both kinds of completion have."""

    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    seed: Seed | None = None
    min_tokens: Count | None = None
    n: Choices | None = None
    response_format: ResponseFormat | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream and self.stream_options is not None and self.stream_options.include_usage)

    @property
    def first_seed(self) -> int | None:
        return self.seed

    @property
    def fewest_tokens(self) -> int:
        return self.min_tokens or 0

    @property
    def form(self) -> tuple[str, Grammar] | None:
        grammar = None if self.response_format is None else self.response_format.grammar()
        return super().form if grammar is None else ("response_format", grammar)

    def check(self) -> None:
        intake.refuse_unsupported(self, {name: _UNSUPPORTED[name] for name in self.__struct_fields__ if name in _UNSUPPORTED})


class PromptDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class Card:
    """What every event and body of one request repeats."""

    def __init__(self, request: OpenAiRequest, name: str, kind: str) -> None:
        self._name = name
        self._kind = kind
        self._model = request.model
        self._created = int(time.time())
        self._choices = request.choices
        self._include_usage = request.include_usage

    def event_frame(self, index: int, choice: dict[str, Any]) -> tuple[bytes, bytes]:
        """The bytes before and after the text of an event."""
        head, _, tail = self.event(index, choice).rpartition(json(MARK))
        return head, tail

    def event(self, index: int, choice: dict[str, Any], finish_reason: str | None = None) -> bytes:
        chunk = self._object(self._kind, [{"index": index, **choice, "finish_reason": finish_reason}])
        if self._include_usage:
            chunk["usage"] = None
        return b"data: %b\n\n" % json(chunk)

    def closing(self, answers: Sequence[Answer]) -> bytes:
        """The event with the usage if it was asked for, and the mark of the end."""
        if not self._include_usage:
            return _DONE
        return b"data: %b\n\n%b" % (json({**self._object(self._kind, []), "usage": self._usage(answers)}), _DONE)

    def body(self, kind: str, choices: Sequence[object], answers: Sequence[Answer]) -> bytes:
        return json({**self._object(kind, choices), "usage": self._usage(answers)})

    def _object(self, kind: str, choices: Sequence[object]) -> dict[str, Any]:
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _usage(self, answers: Sequence[Answer]) -> Usage:
        """Of all answers; a prompt with several answers counts once."""
        prompt = sum(len(answer.prompt_ids) for answer in answers if answer.index % self._choices == 0)
        completion = sum(len(answer.emitted) for answer in answers)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(answer.cached_tokens for answer in answers)),
        )


def reason(answer: Answer) -> str | None:
    return None if answer.finish is None else answer.finish.reason.value
