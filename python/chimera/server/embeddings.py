"""`/v1/embeddings` in OpenAI's words, and SGLang's `/encode`. Knows no socket."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from chimera.core.model import ModelSpec
from chimera.errors import RequestError
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server import intake
from chimera.server.answer import Answer, Terms
from chimera.server.errors import error_event
from chimera.server.readers import Dialect
from chimera.server.words import KeepAlive, Positive, Priority

_json = msgspec.json.Encoder().encode


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None
    priority: Priority | None = None
    """In the place of the model's; higher goes first."""
    keep_alive: KeepAlive | None = None
    """In the place of the model's."""

    def check(self) -> None:
        if self.dimensions is not None:
            raise RequestError("unsupported_parameter", "dimensions is not supported by this server", param="dimensions")

    @property
    def prompt_field(self) -> str:
        return "input"

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [intake.prompt_ids(tokenizer, prompt, param="input") for prompt in intake.plain_prompts(self.input, "input")]

    def dialect(self, request_id: str) -> Dialect:
        return EmbeddingDialect(self)


class EncodeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's words."""

    model: str | None = None
    text: str | None = None
    input_ids: list[int] | None = None
    rid: str | None = None
    priority: Priority | None = None
    keep_alive: KeepAlive | None = None

    def check(self) -> None:
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("bad_request", "exactly one of text and input_ids is needed", param="text")

    @property
    def prompt_field(self) -> str:
        return "text" if self.input_ids is None else "input_ids"

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        prompt = self.text if self.text is not None else self.input_ids or []
        return [intake.prompt_ids(tokenizer, prompt, param=self.prompt_field)]

    def dialect(self, request_id: str) -> Dialect:
        return EncodeDialect(self.rid or request_id)


class EmbeddingTold(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of their float32."""


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingTold]
    usage: EmbeddingUsage


class EncodeMeta(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    prompt_tokens: int
    cached_tokens: int
    e2e_latency: float


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    embedding: list[float]
    meta_info: EncodeMeta


class _WholeOnly:
    """An embedding is never streamed."""

    def piece(self, text: str, answer: Answer) -> bytes:
        return b""

    def close(self, text: str, answer: Answer) -> bytes:
        return b""

    def done(self, answers: Sequence[Answer]) -> bytes:
        return b""

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)


class EmbeddingDialect(_WholeOnly):
    """How `/v1/embeddings` answers."""

    def __init__(self, request: EmbeddingRequest) -> None:
        self._request = request

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        as_text = self._request.encoding_format == "base64"
        data = [
            EmbeddingTold(
                index=answer.index,
                embedding=base64.b64encode(answer.embedding).decode() if as_text else _numbers(answer.embedding),
            )
            for answer in answers
        ]
        tokens = sum(len(answer.prompt_ids) for answer in answers)
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return _json(Embeddings(model=self._request.model, data=data, usage=usage))


class EncodeDialect(_WholeOnly):
    """How `/encode` answers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        [answer] = answers
        meta = EncodeMeta(
            id=self._name,
            prompt_tokens=len(answer.prompt_ids),
            cached_tokens=answer.cached_tokens,
            e2e_latency=answer.age_s,
        )
        return _json(Encoded(embedding=_numbers(answer.embedding), meta_info=meta))


def terms(spec: ModelSpec, request: EmbeddingRequest | EncodeRequest, prompts: Sequence[Sequence[int]]) -> list[Terms]:
    """Of every prompt's embedding."""
    field = request.prompt_field
    if len(prompts) > intake.MOST_ANSWERS:
        told = f"{field}: {len(prompts)} prompts; at most {intake.MOST_ANSWERS} in a request"
        raise RequestError("bad_request", told, param=field)
    for prompt in prompts:
        if not prompt:
            raise RequestError("bad_request", f"{field}: the prompt is empty", param=field)
        if len(prompt) >= spec.context_length:
            told = f"{spec.name} has a context of {spec.context_length} tokens; the prompt has {len(prompt)}"
            raise RequestError("context_length_exceeded", told, param=field)
    priority = spec.priority if request.priority is None else request.priority
    one = Terms(
        sampling=Sampling(max_new_tokens=1, temperature=0.0),
        slo=spec.slo,
        priority=priority,
        keep_alive_s=intake.keep_alive_s(request.keep_alive),
        embeds=True,
    )
    return [one] * len(prompts)


def _numbers(embedding: bytes) -> list[float]:
    numbers = array("f", embedding)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
