"""OpenAI's newer words for a chat: `/v1/responses`, without memory between requests. Knows no socket.

A response is a list of items; ours is one message with one part of text. A stream is a numbered sequence of named events.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.intake import Nucleus, OurWords, Positive, Temperature
from chimera.server.readers import Dialect

_json = msgspec.json.Encoder().encode

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "include": ([],),
    "prompt": (),
    "truncation": ("disabled",),
}
"""Known and not served, with the values that ask for nothing."""
_TEXT_PARTS = ("input_text", "output_text", "text")


class Part(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | None = None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was said before."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] = ""


class ResponsesRequest(OurWords, frozen=True, kw_only=True):
    model: str
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Nucleus | None = None
    stream: bool = False
    metadata: dict[str, str] | None = None
    text: dict[str, Any] | None = None
    # Known, and not served yet.
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    tools: Any = None
    tool_choice: Any = None
    top_logprobs: Any = None
    include: Any = None
    prompt: Any = None
    truncation: Any = None

    def check(self) -> None:
        intake.refuse_unsupported(self, _UNSUPPORTED)
        form = (self.text or {}).get("format")
        if form not in (None, {"type": "text"}):
            raise RequestError("unsupported_parameter", "text.format is not supported by this server", param="text.format")

    @property
    def stop(self) -> None:
        return None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def prompt_field(self) -> str:
        return "input"

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        said = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        if not said:
            raise RequestError("bad_request", "input: there is none", param="input")
        chat = [{"role": _role(item, i), "content": _plain(item.content, f"input[{i}].content")} for i, item in enumerate(said)]
        if self.instructions:
            chat.insert(0, {"role": "system", "content": self.instructions})
        return [tokenizer.encode_chat(chat)]

    def sampling(self, max_new_tokens: int) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=self.top_p or 1.0)

    def dialect(self, request_id: str, tokenizer: ModelTokenizer) -> Dialect:
        return ResponsesDialect(self, request_id)


class ResponsesDialect:
    """How `/v1/responses` answers."""

    def __init__(self, request: ResponsesRequest, request_id: str) -> None:
        self._request = request
        self._name = f"resp_{request_id}"
        self._item = f"msg_{request_id}"
        self._created = int(time.time())
        self._sent = 0
        self._pieces: list[str] = []

    def piece(self, text: str, answer: Answer) -> bytes:
        opening = b"" if self._sent else self._opening(answer)
        self._pieces.append(text)
        return opening + self._event("response.output_text.delta", {**self._place, "delta": text, "logprobs": []})

    def close(self, text: str, answer: Answer) -> bytes:
        last = self.piece(text, answer) if text else b"" if self._sent else self._opening(answer)
        whole = "".join(self._pieces)
        place = {"output_index": 0, "item": self._message(whole, _status(answer))}
        return b"".join(
            [
                last,
                self._event("response.output_text.done", {**self._place, "text": whole, "logprobs": []}),
                self._event("response.content_part.done", {**self._place, "part": _part(whole)}),
                self._event("response.output_item.done", place),
                self._event(f"response.{_status(answer)}", {"response": self._response(whole, answer)}),
            ]
        )

    def done(self, answers: Sequence[Answer]) -> bytes:
        return b""

    def failure(self, error: RequestError) -> bytes:
        return self._event("error", {"code": error.code, "message": error.message, "param": error.param})

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        [text], [answer] = texts, answers
        return _json(self._response(text, answer))

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _opening(self, answer: Answer) -> bytes:
        begun = {"response": self._response(None, answer)}
        item = {"output_index": 0, "item": {**self._message("", "in_progress"), "content": []}}
        return b"".join(
            [
                self._event("response.created", begun),
                self._event("response.in_progress", begun),
                self._event("response.output_item.added", item),
                self._event("response.content_part.added", {**self._place, "part": _part("")}),
            ]
        )

    def _event(self, name: str, body: dict[str, Any]) -> bytes:
        told = _json({"type": name, "sequence_number": self._sent, **body})
        self._sent += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), told)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": [_part(text)]}

    def _response(self, text: str | None, answer: Answer) -> dict[str, Any]:
        """Of no text while it is in progress."""
        request, status = self._request, "in_progress" if text is None else _status(answer)
        return {
            "id": self._name,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [] if text is None else [self._message(text, status)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if text is None else _usage(answer),
        }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish is not None and answer.finish.reason is Outcome.LENGTH else "completed"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, made = len(answer.prompt_ids), len(answer.emitted)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + made,
    }


def _role(item: Item, index: int) -> str:
    if item.type != "message":
        told = f"input[{index}]: an item of type {item.type!r} is not supported by this server"
        raise RequestError("unsupported_parameter", told, param=f"input[{index}]")
    if not item.role:
        raise RequestError("bad_request", f"input[{index}]: role is missing", param=f"input[{index}].role")
    return "system" if item.role == "developer" else item.role


def _plain(content: str | list[Part], where: str) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in _TEXT_PARTS:
            told = f"{where}: content of type {part.type!r} is not supported by this server"
            raise RequestError("unsupported_parameter", told, param=where)
    return "".join(part.text or "" for part in content)
