"""A front-end's spans: one for each answer, from its request's arrival to its end, in OpenTelemetry's words for generative
models. Its parent is what the client sent along; all that the other processes tell of the request hangs under it.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.trace import Span, SpanKind

from chimera.core.record import ANSWERED, RequestRecord
from chimera.spans.spans import Spans, context_of

_TEXT: Final = "text_completion"
"""Whatever its API was, by here it is tokens in and tokens out."""
_EMBEDDINGS: Final = "embeddings"


class ClientSpans:
    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._open: dict[str, Span] = {}
        """By request; whoever opens one ends it."""

    def begin(self, request_id: str, model: str, trace: str, arrived_s: float, *, embeds: bool) -> str:
        """The context for all that happens to the request from now on."""
        operation = _EMBEDDINGS if embeds else _TEXT
        span = self._open[request_id] = self._spans.begin(
            f"{operation} {model}",
            trace,
            arrived_s,
            SpanKind.SERVER,
            gen_ai__operation__name=operation,
            gen_ai__provider__name="chimera",
            gen_ai__request__model=model,
            gen_ai__response__id=request_id,
        )
        return context_of(span)

    def end(self, record: RequestRecord) -> None:
        span = self._open.pop(record.request_id)
        span.set_attributes(
            {
                "gen_ai.response.model": record.model,
                "gen_ai.response.finish_reasons": [record.outcome],
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.output_tokens,
                "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                "chimera.client_id": record.client_id,
                "chimera.tries": record.tries + 1,
            }
        )
        if record.first_token_s is not None:
            span.add_event("first token", timestamp=self._spans.ns(record.first_token_s))
        self._spans.end(span, record.ended_s, "" if record.outcome in ANSWERED else record.outcome, record.detail)

    def close(self) -> None:
        self._spans.close()
