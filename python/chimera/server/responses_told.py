"""`/v1/responses`: what a client is told. A response is a list of items; a stream a numbered sequence of named events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.parsing.tools import Heard, Hearing
from chimera.server.answer import Answer
from chimera.server.passages import Passage, Passages, Step

_json = msgspec.json.Encoder().encode


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    id: str
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    id: str
    status: str
    summary: list[Any] = []
    content: list[OutputText]


OutputItem = OutputMessage | FunctionCall | Reasoning


class CachedTokens(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Incomplete(msgspec.Struct, frozen=True, kw_only=True):
    reason: str


class Response(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: Any
    store: bool
    temperature: float
    text: Any
    tool_choice: Any
    tools: list[Any]
    top_p: float
    truncation: str
    usage: ResponseUsage | None


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; the rest of it is the type's."""

    type: str
    sequence_number: int


class ResponsesDialect:
    """How `/v1/responses` answers."""

    def __init__(self, echo: dict[str, Any], request_id: str, hearing: Hearing | None) -> None:
        self._echo = echo
        self._name = f"resp_{request_id}"
        self._created = int(time.time())
        self._ear = None if hearing is None else hearing.ear()
        self._passages = Passages()
        self._sent = 0

    def piece(self, text: str, answer: Answer) -> bytes:
        return self._opening(answer) + self._tell(Heard(text) if self._ear is None else self._ear.feed(text))

    def close(self, text: str, answer: Answer) -> bytes:
        last = self.piece(text, answer) if text else self._opening(answer)
        if self._ear is not None:
            last += self._tell(self._ear.finish())
        status = _status(answer)
        last += self._steps(self._passages.end(), status)
        return last + self._event(f"response.{status}", {"response": self._response(answer, status)})

    def done(self, answers: Sequence[Answer]) -> bytes:
        return b""

    def failure(self, error: RequestError) -> bytes:
        return self._event("error", {"code": error.code, "message": error.message, "param": error.param})

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        [text], [answer] = texts, answers
        heard = Heard(text) if self._ear is None else self._ear.whole(text)
        for _ in self._passages.add(heard):
            pass
        for _ in self._passages.end():
            pass
        return _json(self._response(answer, _status(answer)))

    def _opening(self, answer: Answer) -> bytes:
        if self._sent:
            return b""
        begun = {"response": self._response(answer, "in_progress")}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def _tell(self, heard: Heard) -> bytes:
        return self._steps(self._passages.add(heard), "completed")

    def _steps(self, steps: Iterable[Step], status: str) -> bytes:
        """A passage that is closed has this status."""
        return b"".join(self._step(what, passage, text, status) for what, passage, text in steps)

    def _step(self, what: str, passage: Passage, text: str, status: str) -> bytes:
        place = {"item_id": _id(passage), "output_index": passage.number}
        item = {"output_index": passage.number}
        event = self._event
        if passage.kind == "call":
            match what:
                case "open":
                    return event("response.output_item.added", {**item, "item": _item(passage, "in_progress")})
                case "more":
                    return event("response.function_call_arguments.delta", {**place, "delta": text})
                case _:
                    told = event("response.function_call_arguments.done", {**place, "arguments": passage.text or "{}"})
                    return told + event("response.output_item.done", {**item, "item": _item(passage, status)})
        place["content_index"] = 0
        said = passage.kind == "said"
        name = "response.output_text" if said else "response.reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if said else {}
        match what:
            case "open":
                begun = event("response.output_item.added", {**item, "item": _item(passage, "in_progress")})
                return begun + event("response.content_part.added", {**place, "part": _part(passage)})
            case "more":
                return event(f"{name}.delta", {**place, "delta": text, **more})
            case _:
                told = event(f"{name}.done", {**place, "text": passage.text, **more})
                told += event("response.content_part.done", {**place, "part": _part(passage)})
                return told + event("response.output_item.done", {**item, "item": _item(passage, status)})

    def _event(self, name: str, body: dict[str, Any]) -> bytes:
        told = _json({"type": name, "sequence_number": self._sent, **body})
        self._sent += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), told)

    def _response(self, answer: Answer, status: Literal["in_progress", "completed", "incomplete"]) -> Response:
        """Of no items while it is in progress."""
        going = status == "in_progress"
        return Response(
            id=self._name,
            created_at=self._created,
            status=status,
            incomplete_details=Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            output=[] if going else [_item(passage, status) for passage in self._passages.all],
            usage=None if going else _usage(answer),
            **self._echo,
        )


def _status(answer: Answer) -> Literal["completed", "incomplete"]:
    return "incomplete" if answer.finish is not None and answer.finish.reason is Outcome.LENGTH else "completed"


def _id(passage: Passage) -> str:
    return {"thought": "rs_", "said": "msg_", "call": "fc_"}[passage.kind] + passage.key


def _item(passage: Passage, status: str) -> OutputItem:
    begun = status == "in_progress"
    match passage.kind:
        case "thought":
            return Reasoning(id=_id(passage), status=status, content=[] if begun else [_part(passage)])
        case "said":
            return OutputMessage(id=_id(passage), status=status, content=[] if begun else [_part(passage)])
        case _:
            arguments = "" if begun else passage.text or "{}"
            call_id = f"call_{passage.key}"
            return FunctionCall(id=_id(passage), call_id=call_id, name=passage.name, arguments=arguments, status=status)


def _part(passage: Passage) -> OutputText:
    return OutputText(type="output_text" if passage.kind == "said" else "reasoning_text", text=passage.text)


def _usage(answer: Answer) -> ResponseUsage:
    prompt, made = len(answer.prompt_ids), len(answer.emitted)
    return ResponseUsage(
        input_tokens=prompt,
        input_tokens_details=CachedTokens(cached_tokens=answer.cached_tokens),
        output_tokens=made,
        output_tokens_details=ReasoningTokens(),
        total_tokens=prompt + made,
    )
