"""What every API's requests have in common on their way in: decoding, refusals by name, the room that a prompt leaves.

Raises RequestError with the parameter at fault. Knows no route and no dialect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from chimera.core.model import ModelSpec, Slo
from chimera.errors import RequestError
from chimera.msg.stream import Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server.answer import Terms
from chimera.server.readers import Dialect

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Nucleus = Annotated[float, msgspec.Meta(gt=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Repetition = Annotated[float, msgspec.Meta(gt=0, le=2)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
Alternatives = Annotated[int, msgspec.Meta(ge=0, le=20)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
Priority = Annotated[int, msgspec.Meta(ge=-1000, le=1000)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=86_400_000)]

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256
MOST_ANSWERS = 128
"""To one request, over all its prompts."""


class SloWish(msgspec.Struct, frozen=True, kw_only=True):
    """As a placement file promises it to a model's users."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class OurWords(msgspec.Struct, frozen=True, kw_only=True):
    """What every API takes here beside its own words."""

    slo: SloWish | Seconds | None = None
    """In the place of the model's. A number is the seconds to the first token, as Prism's clients send it."""
    priority: Priority | None = None
    """In the place of the model's; higher goes first."""

    @property
    def choices(self) -> int:
        return 1

    @property
    def alternatives(self) -> int | None:
        return None


class CompletionWish(Protocol):
    """A request for text, whichever API's words it came in."""

    @property
    def model(self) -> str | None: ...
    @property
    def stream(self) -> bool: ...
    @property
    def stop(self) -> str | list[str] | None: ...
    @property
    def slo(self) -> SloWish | float | None: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def choices(self) -> int:
        """How many answers to each prompt."""

    @property
    def alternatives(self) -> int | None:
        """How many other tokens to report beside each; `None`: no log-probabilities at all."""

    @property
    def answer_tokens(self) -> int | None:
        """How many at most; `None`: as many as there is room for."""

    @property
    def prompt_field(self) -> str:
        """What its API calls the prompt."""

    def check(self) -> None:
        """Refuse by name what is known and not served."""

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]: ...
    def sampling(self, max_new_tokens: int) -> Sampling: ...
    def dialect(self, request_id: str, tokenizer: ModelTokenizer) -> Dialect: ...


T = TypeVar("T")
_PLACE = re.compile(r"(.*) - at `\$\.?(.*)`")


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A request's body. Fields that nobody knows are tolerated, as OpenAI does."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as fault:
        place = _PLACE.fullmatch(str(fault))
        what, param = (place[1], place[2]) if place else (str(fault), None)
        raise RequestError("bad_request", f"{param or 'the body'}: {_lower(what)}", param=param or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise RequestError("bad_request", f"the body is not valid JSON in UTF-8: {fault}") from None


def refuse_unsupported(request: msgspec.Struct, harmless: Mapping[str, Sequence[Any]]) -> None:
    """Fields that are known and not served yet are refused by name, unless they ask for nothing."""
    for name, values in harmless.items():
        value = getattr(request, name)
        if value is not None and value not in values:
            raise RequestError("unsupported_parameter", f"{name} is not supported by this server", param=name)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or not all(0 < len(one) <= _MAX_STOP_LENGTH for one in stops):
        bounds = f"at most {_MAX_STOPS} stop strings of 1 to {_MAX_STOP_LENGTH} characters"
        raise RequestError("bad_request", f"stop: {bounds}", param="stop")
    return stops


def room_for_answer(spec: ModelSpec, wish: CompletionWish, prompt_tokens: int) -> int:
    """How many tokens the answer may have."""
    prompt, wanted = wish.prompt_field, wish.answer_tokens
    if prompt_tokens == 0:
        raise RequestError("bad_request", f"{prompt}: the prompt is empty", param=prompt)
    room = spec.context_length - prompt_tokens
    limit = f"{spec.name} has a context of {spec.context_length} tokens"
    if room < 1:
        told = f"{limit}; the prompt alone has {prompt_tokens}"
        raise RequestError("context_length_exceeded", told, param=prompt)
    if wanted is not None and wanted > room:
        told = f"{limit}; the prompt has {prompt_tokens} and the answer was to have up to {wanted}"
        raise RequestError("context_length_exceeded", told, param=prompt)
    return room if wanted is None else wanted


def terms(spec: ModelSpec, wish: CompletionWish, prompts: Sequence[Sequence[int]]) -> list[Terms]:
    """Of every answer, prompt by prompt. With a seed each answer to a prompt has its own, so that they differ."""
    if len(prompts) * wish.choices > MOST_ANSWERS:
        told = f"{len(prompts)} prompts with {wish.choices} answers each; at most {MOST_ANSWERS} answers to a request"
        raise RequestError("bad_request", f"n: {told}", param="n")
    slo, priority = _slo(spec.slo, wish.slo), spec.priority if wish.priority is None else wish.priority
    found = []
    for prompt in prompts:
        sampling = wish.sampling(room_for_answer(spec, wish, len(prompt)))
        for number in range(wish.choices):
            if number and sampling.seed is not None:
                sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + 1) % 2**63)
            found.append(Terms(sampling=sampling, alternatives=wish.alternatives, slo=slo, priority=priority))
    return found


def _slo(promised: Slo, wish: SloWish | float | None) -> Slo:
    match wish:
        case None:
            return promised
        case SloWish():
            ttft_s = promised.ttft_s if wish.ttft_ms is None else wish.ttft_ms / 1000
            tpot_s = promised.tpot_s if wish.tpot_ms is None else wish.tpot_ms / 1000
            return msgspec.structs.replace(promised, ttft_s=ttft_s, tpot_s=tpot_s)
        case seconds:
            return msgspec.structs.replace(promised, ttft_s=float(seconds))


def prompt_ids(tokenizer: ModelTokenizer, prompt: str | list[int], *, param: str) -> list[int]:
    """A prompt that is a text, or came as tokens: an engine would be torn down by one that its embedding does not have."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not all(0 <= token_id < tokenizer.vocabulary_size for token_id in prompt):
        told = f"{param}: the model's tokens are 0 to {tokenizer.vocabulary_size - 1}"
        raise RequestError("bad_request", told, param=param)
    return prompt


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
