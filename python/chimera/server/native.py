"""SGLang's words for a completion: `/generate`, with `model` because there are many. Streamed text is cumulative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.msg.stream import Sampling, TokenLogprobs
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
from chimera.server.readers import Dialect

_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


class NativeSampling(msgspec.Struct, frozen=True, kw_only=True):
    max_new_tokens: Positive = 128
    temperature: Temperature = 1.0
    top_p: Nucleus = 1.0
    top_k: TopK = -1
    min_p: Share = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Repetition = 1.0
    min_new_tokens: Count = 0
    sampling_seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool = False
    n: Choices = 1
    # Known, and not served yet.
    regex: Any = None
    json_schema: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    logit_bias: Any = None

    def sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            min_new_tokens=min(self.min_new_tokens, max_new_tokens),
            seed=self.sampling_seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


class GenerateRequest(OurWords, frozen=True, kw_only=True):
    model: str | None = None
    """May be left out while there is only one."""
    text: str | list[Any] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling = NativeSampling()
    stream: bool = False
    rid: str | None = None
    return_logprob: bool = False
    top_logprobs_num: Alternatives = 0
    return_text_in_logprobs: bool = False
    # Known, and not served yet.
    logprob_start_len: Any = None
    lora_path: Any = None
    image_data: Any = None
    input_embeds: Any = None

    def check(self) -> None:
        unsupported = {"logprob_start_len": (-1,), "lora_path": (), "image_data": ([],), "input_embeds": ()}
        intake.refuse_unsupported(self, unsupported)
        grammars: dict[str, tuple[Any, ...]] = {"regex": (), "json_schema": (), "ebnf": (), "structural_tag": ()}
        intake.refuse_unsupported(self.sampling_params, {**grammars, "logit_bias": ({},)})

    @property
    def prompt_field(self) -> str:
        return "text" if self.input_ids is None else "input_ids"

    @property
    def answer_tokens(self) -> int:
        return self.sampling_params.max_new_tokens

    @property
    def stop(self) -> str | list[str] | None:
        return self.sampling_params.stop

    @property
    def choices(self) -> int:
        return self.sampling_params.n

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs_num if self.return_logprob else None

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [intake.prompt_ids(tokenizer, self._prompt(), param=self.prompt_field)]

    def sampling(self, max_new_tokens: int) -> Sampling:
        return self.sampling_params.sampling(max_new_tokens)

    def dialect(self, request_id: str, tokenizer: ModelTokenizer) -> Dialect:
        return NativeDialect(self, self.rid or request_id, tokenizer)

    def _prompt(self) -> str | list[int]:
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("bad_request", "exactly one of text and input_ids is needed", param="text")
        if isinstance(self.text, str):
            return self.text
        tokens = [token for token in self.input_ids or () if isinstance(token, int)]
        if self.input_ids is None or len(tokens) != len(self.input_ids):
            told = f"{self.prompt_field}: one prompt in a request, not several"
            raise RequestError("unsupported_parameter", told, param=self.prompt_field)
        return tokens


class NativeDialect:
    """How `/generate` answers."""

    def __init__(self, request: GenerateRequest, name: str, tokenizer: ModelTokenizer) -> None:
        self._several = request.choices > 1
        self._alternatives = request.alternatives
        self._with_text = request.return_text_in_logprobs
        self._name = name
        self._tokenizer = tokenizer
        self._texts = [""] * request.choices

    def piece(self, text: str, answer: Answer) -> bytes:
        self._texts[answer.index] += text
        state = self._state(self._texts[answer.index], answer)
        return b"data: %b\n\n" % _json({**state, "index": answer.index} if self._several else state)

    def close(self, text: str, answer: Answer) -> bytes:
        return self.piece(text, answer)

    def done(self, answers: Sequence[Answer]) -> bytes:
        return _DONE

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        states = [self._state(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return _json(states if self._several else states[0])

    def _state(self, text: str, answer: Answer) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self._name,
            "finish_reason": _finish_reason(answer),
            "prompt_tokens": len(answer.prompt_ids),
            "completion_tokens": len(answer.emitted),
            "cached_tokens": answer.cached_tokens,
            "e2e_latency": answer.age_s,
        }
        if self._alternatives is not None:
            meta["output_token_logprobs"] = [self._told(e.logprob, e.token_id) for e in answer.logprobs]
            if self._alternatives:
                meta["output_top_logprobs"] = [self._told_top(entry) for entry in answer.logprobs]
        return {"text": text, "output_ids": answer.emitted, "meta_info": meta}

    def _told_top(self, entry: TokenLogprobs) -> list[tuple[float, int, str | None]]:
        return [self._told(logprob, token_id) for token_id, logprob in entry.top]

    def _told(self, logprob: float, token_id: int) -> tuple[float, int, str | None]:
        text = self._tokenizer.spell(token_id).decode(errors="replace") if self._with_text else None
        return logprob, token_id, text


def _finish_reason(answer: Answer) -> dict[str, Any] | None:
    match answer.finish:
        case None:
            return None
        case finish if finish.reason is Outcome.LENGTH:
            return {"type": "length", "length": len(answer.emitted)}
        case finish:
            return {"type": "stop", "matched": finish.matched}
