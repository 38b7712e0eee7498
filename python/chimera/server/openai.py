"""OpenAI's words for a completion: what a client may ask, and what it is told. Knows no socket.

An event of a stream is a head and a tail that are the same for the whole stream, and the text as JSON between them.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from chimera.errors import RequestError
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.intake import Count, Nucleus, Penalty, Positive, Repetition, Seed, Share, Temperature, TopK
from chimera.server.readers import Dialect

_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_MARK = "\N{SYMBOL FOR UNIT SEPARATOR}"
"""Stands for the text while an event's head and tail are made; never sent."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
}
"""Known and not served, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool = False


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion have. After OpenAI's own words come those of SGLang and vLLM."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Nucleus | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    # Known, and not served yet.
    n: Any = None
    logprobs: Any = None
    logit_bias: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        intake.refuse_unsupported(self, {name: _UNSUPPORTED[name] for name in self.__struct_fields__ if name in _UNSUPPORTED})

    def sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=-1 if self.top_k is None else self.top_k,
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            min_new_tokens=min(self.min_tokens or 0, max_new_tokens),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(_Request, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Positive | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, and not served yet.
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompt_field(self) -> str:
        return "messages"

    def prompt_ids(self, tokenizer: ModelTokenizer) -> list[int]:
        return tokenizer.encode_chat(self._plain_messages(), self.chat_template_kwargs)

    def dialect(self, request_id: str) -> Dialect:
        return ChatDialect(self, request_id)

    def _plain_messages(self) -> list[dict[str, Any]]:
        """As chat templates take them: fields that were given, and the content of each as one text."""
        if not self.messages:
            raise RequestError("bad_request", "messages: there is none", param="messages")
        return [{**msgspec.to_builtins(m), "content": _plain(m.content, f"messages[{i}]")} for i, m in enumerate(self.messages)]


class CompletionRequest(_Request, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    # Known, and not served yet.
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def answer_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's own default

    @property
    def prompt_field(self) -> str:
        return "prompt"

    def prompt_ids(self, tokenizer: ModelTokenizer) -> list[int]:
        return intake.prompt_ids(tokenizer, self._plain_prompt(), param="prompt")

    def dialect(self, request_id: str) -> Dialect:
        return CompletionDialect(self, request_id)

    def _plain_prompt(self) -> str | list[int]:
        """One text, or the tokens of one. A list of one prompt is that prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        tokens = [item for item in prompt if isinstance(item, int)]
        if prompt and len(tokens) == len(prompt):
            return tokens
        match prompt:
            case [str(only)] | [list(only)]:
                return only
            case []:
                raise RequestError("bad_request", "prompt: the prompt is empty", param="prompt")
            case _:
                raise RequestError("unsupported_parameter", "prompt: one prompt in a request, not several", param="prompt")


class ChatDialect:
    """How `/v1/chat/completions` answers."""

    def __init__(self, request: ChatRequest, request_id: str) -> None:
        self._card = _Card(request, f"chatcmpl-{request_id}")
        self._head, self._tail = self._card.event_frame(
            "chat.completion.chunk", {"delta": {"content": _MARK}, "logprobs": None}
        )
        self._first = True

    def piece(self, text: str, answer: Answer) -> bytes:
        event = b"%b%b%b" % (self._head, _json(text), self._tail)
        return self._opening() + event if self._first else event

    def close(self, text: str, answer: Answer) -> bytes:
        opening = self._opening() if self._first else b""
        last = b"%b%b%b" % (self._head, _json(text), self._tail) if text else b""
        return opening + last + self._card.closing("chat.completion.chunk", {"delta": {}, "logprobs": None}, answer)

    def whole(self, text: str, answer: Answer) -> bytes:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._card.body("chat.completion", {"message": message, "logprobs": None}, answer)

    def _opening(self) -> bytes:
        self._first = False
        choice = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._card.event("chat.completion.chunk", choice)


class CompletionDialect:
    """How `/v1/completions` answers."""

    def __init__(self, request: CompletionRequest, request_id: str) -> None:
        self._card = _Card(request, f"cmpl-{request_id}")
        self._head, self._tail = self._card.event_frame("text_completion", {"text": _MARK, "logprobs": None})

    def piece(self, text: str, answer: Answer) -> bytes:
        return b"%b%b%b" % (self._head, _json(text), self._tail)

    def close(self, text: str, answer: Answer) -> bytes:
        return self._card.closing("text_completion", {"text": text, "logprobs": None}, answer)

    def whole(self, text: str, answer: Answer) -> bytes:
        return self._card.body("text_completion", {"text": text, "logprobs": None}, answer)


class _Card:
    """What every event and body of one answer repeats."""

    def __init__(self, request: _Request, name: str) -> None:
        self._name = name
        self._model = request.model
        self._created = int(time.time())
        self._include_usage = request.stream and request.include_usage

    def event_frame(self, kind: str, choice: dict[str, Any]) -> tuple[bytes, bytes]:
        """The bytes before and after the text of an event."""
        head, _, tail = self.event(kind, choice).rpartition(_json(_MARK))
        return head, tail

    def event(self, kind: str, choice: dict[str, Any], finish_reason: str | None = None) -> bytes:
        chunk = self._object(kind, [{"index": 0, **choice, "finish_reason": finish_reason}])
        if self._include_usage:
            chunk["usage"] = None
        return b"data: %b\n\n" % _json(chunk)

    def closing(self, kind: str, choice: dict[str, Any], answer: Answer) -> bytes:
        """The event with the reason, the one with the usage if asked for, and the mark of the end."""
        last = self.event(kind, choice, _reason(answer))
        if not self._include_usage:
            return last + _DONE
        return b"%bdata: %b\n\n%b" % (last, _json({**self._object(kind, []), "usage": _usage(answer)}), _DONE)

    def body(self, kind: str, choice: dict[str, Any], answer: Answer) -> bytes:
        choices = [{"index": 0, **choice, "finish_reason": _reason(answer)}]
        return _json({**self._object(kind, choices), "usage": _usage(answer)})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def _reason(answer: Answer) -> str | None:
    return None if answer.finish is None else answer.finish.reason.value


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = len(answer.prompt_ids), len(answer.emitted)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _plain(content: str | list[Part] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type != "text":
            told = f"{where}: content of type {part.type!r} is not supported by this server"
            raise RequestError("unsupported_parameter", told, param=f"{where}.content")
    return "".join(part.text or "" for part in content)
