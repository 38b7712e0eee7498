"""Spans as our processes tell them: seconds of their own clock, and a W3C trace context as the text that travels.

Sent from a thread of its own to where OpenTelemetry's own variables say.
"""

from __future__ import annotations

import threading
import time
from importlib.metadata import entry_points
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import chimera

_LAST_SENT_WITHIN_S: Final = 2.0
"""How long a process that ends waits for a collector that may be away."""

_w3c = TraceContextTextMapPropagator()
Value = str | int | float | bool


class Spans:
    """`wall_s` is what the process's clock lacks to be the wall's."""

    def __init__(self, tracer: Tracer, wall_s: float, provider: TracerProvider | None = None) -> None:
        self._tracer = tracer
        self._wall_s = wall_s
        self._provider = provider

    def begin(self, name: str, trace: str, at_s: float, kind: SpanKind = SpanKind.INTERNAL, **attributes: Value) -> Span:
        """A child of whoever the context is of, or a root. `gen_ai__request__model` names the attribute with dots."""
        return self._tracer.start_span(
            name,
            context=_w3c.extract({"traceparent": trace}, Context()),
            kind=kind,
            start_time=self.ns(at_s),
            attributes={name.replace("__", "."): value for name, value in attributes.items()},
        )

    def end(self, span: Span, at_s: float, fault: str = "", detail: str = "") -> None:
        """`fault`, where there is one, in one word for programs; `detail` for people."""
        if fault:
            span.set_attribute("error.type", fault)
            span.set_status(StatusCode.ERROR, detail)
        span.end(self.ns(at_s))

    def ns(self, at_s: float) -> int:
        return round((at_s + self._wall_s) * 1e9)

    def close(self) -> None:
        """What was not sent yet is sent, if there is somebody to take it."""
        if self._provider is not None:
            last = threading.Thread(target=self._provider.shutdown, daemon=True)
            last.start()
            last.join(_LAST_SENT_WITHIN_S)


def context_of(span: Span) -> str:
    """As it travels: whoever is handed this tells of parts of that span."""
    carrier: dict[str, str] = {}
    _w3c.inject(carrier, set_span_in_context(span, Context()))
    return carrier.get("traceparent", "")


def exported(process: str, exporter: str) -> Spans:
    """`exporter` is the entry point of one that is installed."""
    (found,) = entry_points(group="opentelemetry_traces_exporter", name=exporter)
    own = {"service.name": "chimera", "service.version": chimera.__version__, "service.instance.id": process}
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(found.load()()))
    return Spans(provider.get_tracer("chimera", chimera.__version__), time.time() - time.monotonic(), provider)
