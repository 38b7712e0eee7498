"""One answer under way: takes the tokens of its request, makes text of them, and tells its reader.

Keeps every token it has taken, so that its request can go on elsewhere with the prompt it then has. Knows no socket.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from chimera.core.model import Slo
from chimera.core.request import Request
from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.msg.stream import Enqueue, Payload, Sampling, StandingTold, TokenDelta, TokenLogprobs
from chimera.parsing.detokenizer import Detokenizer
from chimera.parsing.stops import StopStrings

_encode_payload = msgspec.msgpack.Encoder().encode


class Reader(Protocol):
    """Who waits for an answer. Told of text as it comes, and once of the end."""

    def text(self, text: str, answer: Answer) -> None: ...

    def end(self, text: str, answer: Answer) -> None:
        """The last text, which may be empty. The answer knows how it ended."""

    def fail(self, error: RequestError) -> None: ...

    def waiting(self, told: StandingTold) -> None:
        """Nobody has begun with it; asked for by those that can show it."""


class Finish(msgspec.Struct, frozen=True):
    """How a whole answer ended."""

    reason: Outcome
    """`stop` or `length`."""
    matched: int | str | None = None
    """The token or the string that stopped it."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for beside the text itself."""

    sampling: Sampling
    alternatives: int | None = None
    """How many other tokens to report beside each, with log-probabilities; `None` reports none."""
    slo: Slo = Slo()
    priority: int = 0
    keep_alive_s: float | None = None
    form_field: str | None = None
    """The client's field that asks for a form, if one does: an engine that cannot keep to the form blames it."""

    embeds: bool = False
    """The answer is the prompt's embedding."""


def new_request_id() -> str:
    """The millisecond, and chance behind it: the records' index grows at its end, and a commit touches few pages of it."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


class Answer:
    """From the request's acceptance to its end. A client's request may want several; `index` is its number among them."""

    __slots__ = (
        "_detokenizer",
        "_reader",
        "_stops",
        "arrived_s",
        "cached_tokens",
        "embedding",
        "emitted",
        "ended_s",
        "error",
        "faults",
        "finish",
        "first_token_s",
        "index",
        "logprobs",
        "losses",
        "model",
        "newest_token_s",
        "preempted",
        "prompt_ids",
        "request_id",
        "source",
        "terms",
        "trace",
        "tries",
    )

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        prompt_ids: list[int],
        terms: Terms,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        reader: Reader,
        arrived_s: float,
        index: int = 0,
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.prompt_ids = prompt_ids
        self.terms = terms
        self.trace = ""
        """The context under which others tell of it, where spans are told."""
        self.index = index
        self.arrived_s = arrived_s
        self.emitted: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        """Of the emitted tokens, when they are wanted."""
        self.cached_tokens = 0
        self.embedding = b""
        """When that is what is wanted: float32, lowest byte first."""
        self.finish: Finish | None = None
        self.error: RequestError | None = None
        self.first_token_s: float | None = None
        self.newest_token_s: float | None = None
        self.ended_s: float | None = None
        self.tries = 0
        self.faults = 0
        """Tries that ended because something broke, or came to nothing."""
        self.losses = 0
        self.preempted = 0
        self.source: object | None = None
        """The connection its tokens come by, from the first on; tokens from anywhere else are not for it."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(tuple(stops)) if stops else None
        self._reader = reader

    @property
    def attempt_id(self) -> str:
        """What this try is called on the wire: late messages about an earlier one find nobody."""
        return f"{self.request_id}.{self.tries}" if self.tries else self.request_id

    @property
    def remaining_tokens(self) -> int:
        return self.terms.sampling.max_new_tokens - len(self.emitted)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.arrived_s

    def enqueue(self, front: str) -> Enqueue:
        """The request as control takes it; tokens already shown are part of the prompt."""
        prompt_ids, sampling = self.prompt_ids, self.terms.sampling
        if self.emitted:
            prompt_ids = prompt_ids + self.emitted
            minimum = max(0, sampling.min_new_tokens - len(self.emitted))
            sampling = msgspec.structs.replace(sampling, max_new_tokens=self.remaining_tokens, min_new_tokens=minimum)
        request = Request(
            request_id=self.attempt_id,
            model=self.model,
            front=front,
            prompt_tokens=len(prompt_ids),
            max_tokens=sampling.max_new_tokens,
            arrived_s=self.arrived_s,
            slo=self.terms.slo,
            priority=self.terms.priority,
            keep_alive_s=self.terms.keep_alive_s,
            trace=self.trace,
            emitted_tokens=len(self.emitted),
            tries=self.tries,
            losses=self.losses,
            preempted=self.preempted,
        )
        payload = Payload(
            input_ids=prompt_ids,
            sampling=sampling,
            logprobs=self.terms.alternatives,
            resumed_tokens=len(self.emitted),
            embeds=self.terms.embeds,
        )
        return Enqueue(request=request, payload=_encode_payload(payload))

    def take(self, delta: TokenDelta) -> bool:
        """The tokens of one step; says whether a stop string in them ended the answer."""
        token_ids = delta.token_ids
        self.emitted += token_ids
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
        text = self._detokenizer.feed(token_ids)
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.matched is not None:
                self._close(Finish(Outcome.STOP, self._stops.matched), text)
                return True
        if text:
            self._reader.text(text, self)
        return False

    def show_standing(self, told: StandingTold) -> None:
        self._reader.waiting(told)

    def take_last(self, delta: TokenDelta, outcome: Outcome) -> None:
        """The tokens of the last step. The one that stopped the answer is counted, and not shown."""
        token_ids = delta.token_ids
        self.emitted += token_ids
        self.cached_tokens = delta.cached_tokens
        self.embedding = delta.embedding or b""
        if delta.matched_stop is not None and token_ids and token_ids[-1] == delta.matched_stop:
            token_ids = token_ids[:-1]
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs[: len(token_ids)]
        self.end(outcome, token_ids, delta.matched_stop)

    def end(self, outcome: Outcome, last_ids: Sequence[int] = (), matched: int | str | None = None) -> None:
        """No more tokens come."""
        text = self._detokenizer.feed(last_ids) + self._detokenizer.flush()
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.matched is not None:
                outcome, matched = Outcome.STOP, self._stops.matched
            text += self._stops.flush()
        self._close(Finish(outcome, matched), text)

    def fail(self, error: RequestError) -> None:
        field = self.terms.form_field
        if field is not None and error.code in ("bad_request", "unsupported_parameter"):
            # Of a request that came so far, only the form can still be wrong.
            error = RequestError(error.code, f"{field}: {error.message}", param=field)
        self.error, self.ended_s = error, time.monotonic()
        self._reader.fail(error)

    def _close(self, finish: Finish, text: str) -> None:
        self.finish, self.ended_s = finish, time.monotonic()
        self._reader.end(text, self)
