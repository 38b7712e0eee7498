"""What this front-end tells control of its requests: how each went, and the running sums of what came out token by token.

Control adds up what all front-ends tell, so any of them can answer for the whole server. Told together, a few times a second:
one by one they cost both ends a turn of their loops for each request. Kept back while control is away.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from chimera.core.measures import MOST_MODELS, OTHERS, Steps, Tally
from chimera.core.record import RequestRecord
from chimera.errors import RequestError
from chimera.msg.stream import RequestTold, TallyTold
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server.answer import Answer
from chimera.wire.codec import Message

if TYPE_CHECKING:
    from chimera.spans.client import ClientSpans

_EVERY_S = 1.0
_TOGETHER_S = 0.2
_MOST_UNTOLD = 10_000
_MOST_DETAIL = 500
_LONGEST_ID = 128


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked, as the records name it."""

    client_id: str = ""
    trace: str = ""
    key: str = ""

    @classmethod
    def of(cls, http: web.Request, key: str) -> Caller:
        return cls(client_id=client_id(http), trace=_trace(http), key=key)


def client_id(http: web.Request) -> str:
    """What the client calls its request, if that is a name: it goes into headers and logs."""
    given = http.headers.get("x-request-id", "")
    return given if len(given) <= _LONGEST_ID and given.isascii() and given.isprintable() else ""


def _trace(http: web.Request) -> str:
    """A W3C trace context: version, trace, span and flags, in hexadecimal."""
    given = http.headers.get("traceparent", "")
    parts = given.split("-")
    lengths = tuple(map(len, parts[:4]))
    known = lengths == (2, 32, 16, 2) and parts[0] != "ff" and (len(parts) == 4 or parts[0] != "00")
    hexadecimal = known and all(c in "0123456789abcdef" for part in parts[:4] for c in part)
    zero = hexadecimal and (set(parts[1]) == {"0"} or set(parts[2]) == {"0"})
    return given if hexadecimal and not zero and len(given) <= _LONGEST_ID else ""


class Account:
    def __init__(self, send: Callable[[Message], bool], *, texts: bool = False, spans: ClientSpans | None = None) -> None:
        """`send` says whether control is there to be told. `texts`: prompts and answers are told too. `spans` is told each
        request as well, without them."""
        self.texts = texts
        self._spans = spans
        self._send = send
        self._tally = Tally()
        self._changed = False
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._untold: deque[RequestTold] = deque(maxlen=_MOST_UNTOLD)

    def steps(self, model: str) -> Steps:
        """Where to count what the model's engines bring."""
        self._touch()
        steps = self._tally.steps
        known = steps.get(model)
        if known is None:
            known = steps.setdefault(model if len(steps) < MOST_MODELS else OTHERS, Steps())
        return known

    async def on_prepare(self, http: web.Request, response: web.StreamResponse) -> None:
        """Every answer that goes out; a refusal too bears its client's name for it."""
        self._touch()
        status = str(response.status)
        self._tally.answers[status] = self._tally.answers.get(status, 0) + 1
        if "x-request-id" not in response.headers and (known := client_id(http)):
            response.headers["x-request-id"] = known

    def open_book(self, answer: Answer, caller: Caller) -> None:
        """The answer is about to be asked for."""
        if self._spans is not None:
            embeds = answer.terms.embeds
            answer.trace = self._spans.begin(answer.request_id, answer.model, caller.trace, answer.arrived_s, embeds=embeds)

    def close_book(self, answer: Answer, caller: Caller, tokenizer: ModelTokenizer) -> None:
        """The answer has ended, one way or another."""
        record = _record(answer, caller)
        if self._spans is not None:
            self._spans.end(record)
        if self.texts:
            record = msgspec.structs.replace(
                record, prompt=_text(tokenizer, answer.prompt_ids), answer=_text(tokenizer, answer.emitted)
            )
        self._untold.append(RequestTold(record=record))
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_TOGETHER_S, self._tell_requests)

    def tell(self) -> None:
        """All that control has not heard yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell_requests()
        self._send(TallyTold(tally=self._tally))

    def _tell_requests(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        while self._untold and self._send(self._untold[0]):
            self._untold.popleft()

    def close(self) -> None:
        for timer in (self._timer, self._telling):
            if timer is not None:
                timer.cancel()
        if self._spans is not None:
            self._spans.close()

    def _touch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self.tell)


def _text(tokenizer: ModelTokenizer, token_ids: Sequence[int]) -> str:
    detokenizer = tokenizer.detokenizer(())
    return detokenizer.feed(token_ids) + detokenizer.flush()


def _record(answer: Answer, caller: Caller) -> RequestRecord:
    error: RequestError | None = answer.error
    if answer.finish is not None:
        outcome, detail = str(answer.finish.reason), ""
    elif error is not None:
        outcome, detail = error.code, error.message[:_MOST_DETAIL]
    else:
        outcome, detail = "cancelled", ""
    return RequestRecord(
        request_id=answer.request_id,
        client_id=caller.client_id,
        trace=caller.trace,
        key=caller.key,
        model=answer.model,
        arrived_s=answer.arrived_s,
        first_token_s=answer.first_token_s,
        ended_s=answer.ended_s or time.monotonic(),
        prompt_tokens=len(answer.prompt_ids),
        output_tokens=len(answer.emitted),
        cached_tokens=answer.cached_tokens,
        tries=answer.tries,
        outcome=outcome,
        detail=detail,
        slo=answer.terms.slo,
    )
