"""What every API's requests have in common on their way in: decoding, refusals by name, the room that a prompt leaves.

Raises RequestError with the parameter at fault. Knows no route and no dialect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from chimera.core.model import ModelSpec, Slo, Tastes
from chimera.errors import RequestError
from chimera.msg.stream import Grammar, Sampling
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import Hearing, Tool, Toolbox
from chimera.server.answer import Terms
from chimera.server.readers import Dialect
from chimera.server.words import SloWish
from chimera.units import parse_stay

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256
MOST_ANSWERS = 128
"""To one request, over all its prompts."""


class CompletionWish(Protocol):
    """A request for text, whichever API's words it came in."""

    @property
    def model(self) -> str | None: ...
    @property
    def stream(self) -> bool | None: ...
    @property
    def stops(self) -> str | list[str] | None: ...
    @property
    def slo(self) -> SloWish | float | None: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def keep_alive(self) -> float | str | None: ...
    @property
    def send_loading_state(self) -> bool | None: ...
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

    @property
    def form(self) -> tuple[str, Grammar] | None:
        """The form that the answer must have, and the field that asks for it."""

    @property
    def toolbox(self) -> Toolbox | None:
        """What the model may call; `None`: nothing."""

    @property
    def tells_thoughts(self) -> bool:
        """Whether what the model thinks is told apart from what it says, where it can be."""

    def check(self) -> None:
        """Refuse by name what is known and not served."""

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]: ...
    def sampling(self, max_new_tokens: int, tastes: Tastes) -> Sampling: ...
    def dialect(self, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> Dialect:
        """Without a hearing, an answer's text is what it says."""


T = TypeVar("T")
_PLACE = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`")


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


def terms(
    spec: ModelSpec,
    wish: CompletionWish,
    prompts: Sequence[Sequence[int]],
    tokenizer: ModelTokenizer,
    form: tuple[str, Grammar] | None,
) -> list[Terms]:
    """Of every answer, prompt by prompt. With a seed each answer to a prompt has its own, so that they differ."""
    if len(prompts) * wish.choices > MOST_ANSWERS:
        told = f"{len(prompts)} prompts with {wish.choices} answers each; at most {MOST_ANSWERS} answers to a request"
        raise RequestError("bad_request", f"n: {told}", param="n")
    slo, priority = _slo(spec.slo, wish.slo), spec.priority if wish.priority is None else wish.priority
    stay_s = keep_alive_s(wish.keep_alive)
    field, grammar = (None, None) if form is None else form
    found = []
    for prompt in prompts:
        sampling = wish.sampling(room_for_answer(spec, wish, len(prompt)), spec.tastes)
        _check_tokens(sampling.logit_bias or (), tokenizer, "logit_bias")
        if grammar is not None:
            sampling = msgspec.structs.replace(sampling, grammar=grammar)
        for number in range(wish.choices):
            if number and sampling.seed is not None:
                sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + 1) % 2**63)
            found.append(
                Terms(
                    sampling=sampling,
                    alternatives=wish.alternatives,
                    slo=slo,
                    priority=priority,
                    keep_alive_s=stay_s,
                    form_field=field,
                )
            )
    return found


def keep_alive_s(written: float | str | None) -> float | None:
    """Below zero for ever; `None` says nothing of it."""
    if not isinstance(written, str):
        return written
    try:
        return parse_stay(written)
    except ValueError as fault:
        raise RequestError("bad_request", f"keep_alive: {fault}", param="keep_alive") from None


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


def toolbox(
    tools: Sequence[Tool], choice: Literal["none", "auto", "required", "named"] | None, only: str | None, parallel: bool
) -> Toolbox | None:
    """As a request offers it; of a tool that must be called the model is told alone."""
    if choice in ("required", "named") and not tools:
        raise RequestError("bad_request", "tool_choice: there are no tools to choose from", param="tool_choice")
    if not tools or choice == "none":
        return None
    if choice == "named":
        tools = [tool for tool in tools if tool.name == only]
        if not tools:
            raise RequestError("bad_request", f"tool_choice: there is no tool {only!r} among the tools", param="tool_choice")
    return Toolbox(tools=tuple(tools), choice=choice or "auto", parallel=parallel)


def plain_prompts(prompt: str | list[str | int | list[int]], param: str) -> list[str | list[int]]:
    """Each a text or its tokens. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    if not prompt:
        raise RequestError("bad_request", f"{param}: the prompt is empty", param=param)
    if len(tokens) == len(prompt):
        return [tokens]
    if tokens:
        raise RequestError("bad_request", f"{param}: either tokens or prompts, not both in one list", param=param)
    return [item for item in prompt if not isinstance(item, int)]


def prompt_ids(tokenizer: ModelTokenizer, prompt: str | list[int], *, param: str) -> list[int]:
    """A prompt that is a text, or came as tokens: an engine would be torn down by one that its embedding does not have."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    _check_tokens(prompt, tokenizer, param)
    return prompt


def _check_tokens(token_ids: Iterable[int], tokenizer: ModelTokenizer, param: str) -> None:
    if not all(0 <= token_id < tokenizer.vocabulary_size for token_id in token_ids):
        told = f"{param}: the model's tokens are 0 to {tokenizer.vocabulary_size - 1}"
        raise RequestError("bad_request", told, param=param)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
