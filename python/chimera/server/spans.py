"""A span of OpenTelemetry for each request that has ended, in its words for generative models; an extra, installed apart.

The request's own trace context, where it came with one, is the parent: the span hangs where its caller's trace left off.
What happened within the server is told by `/explain`, under the same request id and the same trace.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.trace import SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import chimera
from chimera.core.record import ANSWERED, RequestRecord

_OPERATION: Final = "text_completion"
"""Whatever its API was, by here it is tokens in and tokens out."""


class Spans:
    """`wall_s` is what the records' clock lacks to be the wall's."""

    def __init__(self, tracer: Tracer, wall_s: float) -> None:
        self._tracer = tracer
        self._wall_s = wall_s

    def tell(self, record: RequestRecord) -> None:
        span = self._tracer.start_span(
            f"{_OPERATION} {record.model}",
            context=TraceContextTextMapPropagator().extract({"traceparent": record.trace}),
            kind=SpanKind.SERVER,
            start_time=self._ns(record.arrived_s),
            attributes={
                "gen_ai.operation.name": _OPERATION,
                "gen_ai.provider.name": "chimera",
                "gen_ai.request.model": record.model,
                "gen_ai.response.model": record.model,
                "gen_ai.response.id": record.request_id,
                "gen_ai.response.finish_reasons": [record.outcome],
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.output_tokens,
                "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                "chimera.client_id": record.client_id,
                "chimera.tries": record.tries + 1,
            },
        )
        if record.first_token_s is not None:
            span.add_event("first token", timestamp=self._ns(record.first_token_s))
        if record.outcome not in ANSWERED:
            span.set_attribute("error.type", record.outcome)
            span.set_status(StatusCode.ERROR, record.detail)
        span.end(self._ns(record.ended_s))

    def _ns(self, at_s: float) -> int:
        return round((at_s + self._wall_s) * 1e9)


def exported(wall_s: float) -> Spans:
    """Sent to where OpenTelemetry's own variables say (`OTEL_EXPORTER_OTLP_ENDPOINT`), from a thread of its own."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "chimera", "service.version": chimera.__version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider.get_tracer("chimera", chimera.__version__), wall_s)
