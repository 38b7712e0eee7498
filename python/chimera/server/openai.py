"""OpenAI's words for a completion: what a client may ask, and what it is told. Knows no socket.

An event of a stream is a head and a tail that are the same for the whole stream, and the text as JSON between them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from chimera.errors import RequestError
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.errors import error_event
from chimera.server.intake import (
    Alternatives,
    Choices,
    Count,
    Nucleus,
    OurWords,
    Penalty,
    Positive,
    Repetition,
    Seed,
    Share,
    Temperature,
    TopK,
)
from chimera.server.logprobs import Teller
from chimera.server.readers import Dialect

_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_MARK = "\N{SYMBOL FOR UNIT SEPARATOR}"
"""Stands for the text while an event's head and tail are made; never sent."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
}
"""Known and not served, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool = False


class _Request(OurWords, frozen=True, kw_only=True):
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
    n: Choices | None = None
    # Known, and not served yet.
    logit_bias: Any = None

    @property
    def choices(self) -> int:
        return self.n or 1

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
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    # Known, and not served yet.
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

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("bad_request", "top_logprobs: needs logprobs", param="top_logprobs")

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [tokenizer.encode_chat(self._plain_messages(), self.chat_template_kwargs)]

    def dialect(self, request_id: str, tokenizer: ModelTokenizer) -> Dialect:
        return ChatDialect(self, request_id, tokenizer)

    def _plain_messages(self) -> list[dict[str, Any]]:
        """As chat templates take them: fields that were given, and the content of each as one text."""
        if not self.messages:
            raise RequestError("bad_request", "messages: there is none", param="messages")
        return [{**msgspec.to_builtins(m), "content": _plain(m.content, f"messages[{i}]")} for i, m in enumerate(self.messages)]


class CompletionRequest(_Request, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Alternatives | bool | None = None
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

    @property
    def alternatives(self) -> int | None:
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [intake.prompt_ids(tokenizer, prompt, param="prompt") for prompt in self._plain_prompts()]

    def dialect(self, request_id: str, tokenizer: ModelTokenizer) -> Dialect:
        return CompletionDialect(self, request_id, tokenizer)

    def _plain_prompts(self) -> list[str | list[int]]:
        """Each a text or its tokens. A list of numbers is one prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        tokens = [item for item in prompt if isinstance(item, int)]
        if not prompt:
            raise RequestError("bad_request", "prompt: the prompt is empty", param="prompt")
        if len(tokens) == len(prompt):
            return [tokens]
        if tokens:
            raise RequestError("bad_request", "prompt: either tokens or prompts, not both in one list", param="prompt")
        return [item for item in prompt if not isinstance(item, int)]


class ChatDialect:
    """How `/v1/chat/completions` answers."""

    def __init__(self, request: ChatRequest, request_id: str, tokenizer: ModelTokenizer) -> None:
        self._card = _Card(request, f"chatcmpl-{request_id}", "chat.completion.chunk")
        self._teller = None if request.alternatives is None else Teller(tokenizer, request.choices)
        self._frames = [
            self._card.event_frame(index, {"delta": {"content": _MARK}, "logprobs": None}) for index in range(request.choices)
        ]
        self._unopened = set(range(request.choices))

    def piece(self, text: str, answer: Answer) -> bytes:
        index = answer.index
        if self._teller is not None:
            event = self._card.event(index, {"delta": {"content": text}, "logprobs": self._teller.chat(answer)})
        else:
            head, tail = self._frames[index]
            event = b"%b%b%b" % (head, _json(text), tail)
        return self._opening(index) + event if self._unopened else event

    def close(self, text: str, answer: Answer) -> bytes:
        last = self.piece(text, answer) if text else self._opening(answer.index)
        logprobs = None if self._teller is None else self._teller.chat(answer)
        return last + self._card.event(answer.index, {"delta": {}, "logprobs": logprobs}, _reason(answer))

    def done(self, answers: Sequence[Answer]) -> bytes:
        return self._card.closing(answers)

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        choices = []
        for text, answer in zip(texts, answers, strict=True):
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append({"message": message, "logprobs": None if self._teller is None else self._teller.chat(answer)})
        return self._card.body("chat.completion", choices, answers)

    def _opening(self, index: int) -> bytes:
        if index not in self._unopened:
            return b""
        self._unopened.discard(index)
        return self._card.event(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})


class CompletionDialect:
    """How `/v1/completions` answers."""

    def __init__(self, request: CompletionRequest, request_id: str, tokenizer: ModelTokenizer) -> None:
        self._card = _Card(request, f"cmpl-{request_id}", "text_completion")
        self._request = request
        self._teller = None if request.alternatives is None else Teller(tokenizer, intake.MOST_ANSWERS)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def piece(self, text: str, answer: Answer) -> bytes:
        if self._teller is not None:
            return self._card.event(answer.index, {"text": text, "logprobs": self._teller.completion(answer)})
        frame = self._frames.get(answer.index)
        if frame is None:
            frame = self._frames[answer.index] = self._card.event_frame(answer.index, {"text": _MARK, "logprobs": None})
        return b"%b%b%b" % (frame[0], _json(text), frame[1])

    def close(self, text: str, answer: Answer) -> bytes:
        return self._card.event(answer.index, {"text": text, "logprobs": self._logprobs(answer)}, _reason(answer))

    def done(self, answers: Sequence[Answer]) -> bytes:
        return self._card.closing(answers)

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        pairs = zip(texts, answers, strict=True)
        choices = [{"text": text, "logprobs": self._logprobs(answer)} for text, answer in pairs]
        return self._card.body("text_completion", choices, answers)

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        return None if self._teller is None else self._teller.completion(answer)


class _Card:
    """What every event and body of one request repeats."""

    def __init__(self, request: _Request, name: str, kind: str) -> None:
        self._name = name
        self._kind = kind
        self._model = request.model
        self._created = int(time.time())
        self._choices = request.choices
        self._include_usage = request.stream and request.include_usage

    def event_frame(self, index: int, choice: dict[str, Any]) -> tuple[bytes, bytes]:
        """The bytes before and after the text of an event."""
        head, _, tail = self.event(index, choice).rpartition(_json(_MARK))
        return head, tail

    def event(self, index: int, choice: dict[str, Any], finish_reason: str | None = None) -> bytes:
        chunk = self._object(self._kind, [{"index": index, **choice, "finish_reason": finish_reason}])
        if self._include_usage:
            chunk["usage"] = None
        return b"data: %b\n\n" % _json(chunk)

    def closing(self, answers: Sequence[Answer]) -> bytes:
        """The event with the usage if it was asked for, and the mark of the end."""
        if not self._include_usage:
            return _DONE
        return b"data: %b\n\n%b" % (_json({**self._object(self._kind, []), "usage": self._usage(answers)}), _DONE)

    def body(self, kind: str, choices: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> bytes:
        told = [
            {"index": answer.index, **choice, "finish_reason": _reason(answer)}
            for choice, answer in zip(choices, answers, strict=True)
        ]
        return _json({**self._object(kind, told), "usage": self._usage(answers)})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Of all answers; a prompt with several answers counts once."""
        prompt = sum(len(answer.prompt_ids) for answer in answers if answer.index % self._choices == 0)
        completion = sum(len(answer.emitted) for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers)},
        }


def _reason(answer: Answer) -> str | None:
    return None if answer.finish is None else answer.finish.reason.value


def _plain(content: str | list[Part] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type != "text":
            told = f"{where}: content of type {part.type!r} is not supported by this server"
            raise RequestError("unsupported_parameter", told, param=f"{where}.content")
    return "".join(part.text or "" for part in content)
