"""Log-probabilities in OpenAI's two spellings. Each token is told once: with the text it is part of, or with what follows.

Knows tokens and how they are spelled; no request and no stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from chimera.msg.stream import TokenLogprobs
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server.answer import Answer


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative, frozen=True, kw_only=True):
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """As in `/v1/chat/completions`."""

    content: list[ChatToken]
    refusal: list[ChatToken] | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """As in `/v1/completions`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Teller:
    """What was told of each answer of one request, and what is new."""

    def __init__(self, tokenizer: ModelTokenizer, answers: int) -> None:
        self._tokenizer = tokenizer
        self._told = [0] * answers
        self._offsets = [0] * answers
        """Characters of the text before the next token."""

    def chat(self, answer: Answer) -> ChatLogprobs:
        return ChatLogprobs(content=[self._entry(entry) for entry in self._news(answer)])

    def completion(self, answer: Answer) -> CompletionLogprobs:
        entries = self._news(answer)
        texts = [self._text(entry.token_id) for entry in entries]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[answer.index])
            self._offsets[answer.index] += len(text)
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[{self._text(token_id): logprob for token_id, logprob in entry.top} for entry in entries],
            text_offset=offsets,
        )

    def _news(self, answer: Answer) -> Sequence[TokenLogprobs]:
        told = self._told[answer.index]
        self._told[answer.index] = len(answer.logprobs)
        return answer.logprobs[told:]

    def _entry(self, entry: TokenLogprobs) -> ChatToken:
        token, spelled = self._text(entry.token_id), list(self._tokenizer.spell(entry.token_id))
        top = [self._one(token_id, logprob) for token_id, logprob in entry.top]
        return ChatToken(token=token, logprob=entry.logprob, bytes=spelled, top_logprobs=top)

    def _one(self, token_id: int, logprob: float) -> Alternative:
        return Alternative(token=self._text(token_id), logprob=logprob, bytes=list(self._tokenizer.spell(token_id)))

    def _text(self, token_id: int) -> str:
        return self._tokenizer.spell(token_id).decode(errors="replace")
