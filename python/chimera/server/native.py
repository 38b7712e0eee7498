"""SGLang's words for a completion: `/generate`, with `model` because there are many. Streamed text is cumulative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from chimera.core.model import Tastes
from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.msg.stream import Grammar, Sampling, TokenLogprobs
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import Hearing, Toolbox
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.errors import error_event
from chimera.server.readers import Dialect
from chimera.server.words import Alternatives, Choices, Count, KeepAlive, Picking, Positive, Priority, Seconds, Seed, SloWish

_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


class NativeSampling(Picking, frozen=True, kw_only=True):
    max_new_tokens: Positive = 128
    min_new_tokens: Count = 0
    sampling_seed: Seed | None = None
    n: Choices = 1
    json_schema: str | dict[str, Any] | None = None
    structural_tag: str | dict[str, Any] | None = None

    @property
    def first_seed(self) -> int | None:
        return self.sampling_seed

    @property
    def fewest_tokens(self) -> int:
        return self.min_new_tokens

    @property
    def form(self) -> tuple[str, Grammar] | None:
        if self.json_schema is not None:
            return "json_schema", Grammar("json_schema", _written(self.json_schema))
        if self.structural_tag is not None:
            return "structural_tag", Grammar("structural_tag", _written(self.structural_tag))
        return super().form


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    """May be left out while there is only one."""
    text: str | list[Any] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling = NativeSampling()
    stream: bool | None = None
    rid: str | None = None
    return_logprob: bool = False
    top_logprobs_num: Alternatives = 0
    return_text_in_logprobs: bool = False
    slo: SloWish | Seconds | None = None
    priority: Priority | None = None
    keep_alive: KeepAlive | None = None
    send_loading_state: bool | None = None
    # Known, and not served.
    logprob_start_len: Any = None
    lora_path: Any = None
    image_data: Any = None
    input_embeds: Any = None

    def check(self) -> None:
        unsupported = {"logprob_start_len": (-1,), "lora_path": (), "image_data": ([],), "input_embeds": ()}
        intake.refuse_unsupported(self, unsupported)

    @property
    def prompt_field(self) -> str:
        return "text" if self.input_ids is None else "input_ids"

    @property
    def answer_tokens(self) -> int:
        return self.sampling_params.max_new_tokens

    @property
    def stops(self) -> str | list[str] | None:
        return self.sampling_params.stop

    @property
    def choices(self) -> int:
        return self.sampling_params.n

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs_num if self.return_logprob else None

    @property
    def form(self) -> tuple[str, Grammar] | None:
        return self.sampling_params.form

    @property
    def toolbox(self) -> Toolbox | None:
        return None

    @property
    def tells_thoughts(self) -> bool:
        return False

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [intake.prompt_ids(tokenizer, self._prompt(), param=self.prompt_field)]

    def sampling(self, max_new_tokens: int, tastes: Tastes) -> Sampling:
        """As SGLang's own: the makers' tastes are for chats."""
        return self.sampling_params.sampling(max_new_tokens, Tastes())

    def dialect(self, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> Dialect:
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


TokenTold = tuple[float, int, str | None]


class MetaInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    output_token_logprobs: list[TokenTold] | UnsetType = UNSET
    output_top_logprobs: list[list[TokenTold]] | UnsetType = UNSET


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """An answer so far."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET
    """In a stream of several answers."""


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
        state = self._state(self._texts[answer.index], answer, answer.index if self._several else UNSET)
        return b"data: %b\n\n" % _json(state)

    def close(self, text: str, answer: Answer) -> bytes:
        return self.piece(text, answer)

    def done(self, answers: Sequence[Answer]) -> bytes:
        return _DONE

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        states = [self._state(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return _json(states if self._several else states[0])

    def _state(self, text: str, answer: Answer, index: int | UnsetType = UNSET) -> Generated:
        wanted = self._alternatives
        meta = MetaInfo(
            id=self._name,
            finish_reason=_finish_reason(answer),
            prompt_tokens=len(answer.prompt_ids),
            completion_tokens=len(answer.emitted),
            cached_tokens=answer.cached_tokens,
            e2e_latency=answer.age_s,
            output_token_logprobs=UNSET if wanted is None else [self._told(e.logprob, e.token_id) for e in answer.logprobs],
            output_top_logprobs=[self._told_top(entry) for entry in answer.logprobs] if wanted else UNSET,
        )
        return Generated(text=text, output_ids=answer.emitted, meta_info=meta, index=index)

    def _told_top(self, entry: TokenLogprobs) -> list[TokenTold]:
        return [self._told(logprob, token_id) for token_id, logprob in entry.top]

    def _told(self, logprob: float, token_id: int) -> TokenTold:
        text = self._tokenizer.spell(token_id).decode(errors="replace") if self._with_text else None
        return logprob, token_id, text


def _written(form: str | dict[str, Any]) -> str:
    return form if isinstance(form, str) else _json(form).decode()


def _finish_reason(answer: Answer) -> dict[str, Any] | None:
    match answer.finish:
        case None:
            return None
        case finish if finish.reason is Outcome.LENGTH:
            return {"type": "length", "length": len(answer.emitted)}
        case finish:
            return {"type": "stop", "matched": finish.matched}
