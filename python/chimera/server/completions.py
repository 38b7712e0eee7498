"""`/v1/completions`: OpenAI's oldest words. Knows no socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from chimera.core.model import Tastes
from chimera.errors import RequestError
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import Hearing
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.errors import error_event
from chimera.server.logprobs import CompletionLogprobs, Teller
from chimera.server.openai import MARK, Card, OpenAiRequest, Usage, json, reason
from chimera.server.readers import Dialect
from chimera.server.words import Alternatives


class CompletionRequest(OpenAiRequest, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Alternatives | bool | None = None
    # Known, and not served.
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
        return [intake.prompt_ids(tokenizer, prompt, param="prompt") for prompt in intake.plain_prompts(self.prompt, "prompt")]

    def sampling(self, max_new_tokens: int, tastes: Tastes) -> Sampling:
        """As SGLang's own: the makers' tastes are for chats."""
        return super().sampling(max_new_tokens, Tastes())

    def dialect(self, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> Dialect:
        return CompletionDialect(self, request_id, tokenizer)


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None


class CompletionObject(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an answer, and one event of a stream of them."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionDialect:
    """How `/v1/completions` answers."""

    def __init__(self, request: CompletionRequest, request_id: str, tokenizer: ModelTokenizer) -> None:
        self._card = Card(request, f"cmpl-{request_id}", "text_completion")
        self._teller = None if request.alternatives is None else Teller(tokenizer, intake.MOST_ANSWERS)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def piece(self, text: str, answer: Answer) -> bytes:
        if self._teller is not None:
            return self._card.event(answer.index, {"text": text, "logprobs": self._teller.completion(answer)})
        frame = self._frames.get(answer.index)
        if frame is None:
            frame = self._frames[answer.index] = self._card.event_frame(answer.index, {"text": MARK, "logprobs": None})
        return b"%b%b%b" % (frame[0], json(text), frame[1])

    def close(self, text: str, answer: Answer) -> bytes:
        return self._card.event(answer.index, {"text": text, "logprobs": self._logprobs(answer)}, reason(answer))

    def done(self, answers: Sequence[Answer]) -> bytes:
        return self._card.closing(answers)

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        choices = [
            CompletionChoice(index=answer.index, text=text, logprobs=self._logprobs(answer), finish_reason=reason(answer))
            for text, answer in zip(texts, answers, strict=True)
        ]
        return self._card.body("text_completion", choices, answers)

    def _logprobs(self, answer: Answer) -> CompletionLogprobs | None:
        return None if self._teller is None else self._teller.completion(answer)
