"""The words that several APIs share: bounds of numbers, how tokens are picked, what is promised. Knows no dialect."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from chimera.core.model import Tastes
from chimera.msg.stream import Grammar, Sampling
from chimera.parsing.tools import Toolbox

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
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Priority = Annotated[int, msgspec.Meta(ge=-1000, le=1000)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=86_400_000)]


T = TypeVar("T")


KeepAlive = Annotated[float, msgspec.Meta(ge=-(10**9), le=10**9)] | Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
"""How long the model stays after the request, in Ollama's forms: seconds, or `5m`; 0 not at all, below zero for ever."""


class SloWish(msgspec.Struct, frozen=True, kw_only=True):
    """As a placement file promises it to a model's users."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class Picking(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are picked. After OpenAI's own words come those of SGLang and vLLM."""

    temperature: Temperature | None = None
    top_p: Nucleus | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[Count, Bias] | None = None
    stop: str | list[str] | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    regex: str | None = None
    ebnf: str | None = None

    @property
    def first_seed(self) -> int | None:
        return None

    @property
    def fewest_tokens(self) -> int:
        return 0

    @property
    def form(self) -> tuple[str, Grammar] | None:
        """The form that the answer must have, and the field that asks for it."""
        if self.regex is not None:
            return "regex", Grammar("regex", self.regex)
        return None if self.ebnf is None else ("ebnf", Grammar("ebnf", self.ebnf))

    def sampling(self, max_new_tokens: int, tastes: Tastes) -> Sampling:
        """The request's word goes first, then the model's makers', then OpenAI's."""
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=_first(self.temperature, tastes.temperature, 1.0),
            top_p=_first(self.top_p, tastes.top_p, 1.0),
            top_k=_first(self.top_k, tastes.top_k, 0) or -1,
            min_p=_first(self.min_p, tastes.min_p, 0.0),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=_first(self.repetition_penalty, tastes.repetition_penalty, 1.0),
            min_new_tokens=min(self.fewest_tokens, max_new_tokens),
            seed=self.first_seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=self.logit_bias or None,
        )


class OurWords(Picking, frozen=True, kw_only=True):
    """What every API takes here beside its own words."""

    model: str
    stream: bool | None = None
    slo: SloWish | Seconds | None = None
    """In the place of the model's. A number is the seconds to the first token, as Prism's clients send it."""
    priority: Priority | None = None
    """In the place of the model's; higher goes first."""
    keep_alive: KeepAlive | None = None
    """In the place of the model's."""
    send_loading_state: bool | None = None
    """With `stream`: while the model loads, comments in the stream say how far that is. The headers go out with the first
    of them, so a failure after that is an event."""

    @property
    def stops(self) -> str | list[str] | None:
        return self.stop

    @property
    def choices(self) -> int:
        return 1

    @property
    def alternatives(self) -> int | None:
        return None

    @property
    def toolbox(self) -> Toolbox | None:
        return None

    @property
    def tells_thoughts(self) -> bool:
        return False


def _first(written: T | None, makers: T | None, otherwise: T) -> T:
    if written is not None:
        return written
    return otherwise if makers is None else makers
