"""An agent's spans: one for each try at a request, from its delivery until its engine is done with it, and in it how long it
waited for its turn. The engine's own hang under it.
"""

from __future__ import annotations

from opentelemetry.trace import Span

from chimera.core.request import Request
from chimera.msg.actions import Route
from chimera.spans.spans import Spans, context_of


class TrySpans:
    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._open: dict[str, tuple[Span, Request, float]] = {}

    def begin(self, route: Route, now: float) -> None:
        request = route.request
        if request.trace:
            span = self._spans.begin(
                f"try {request.model}",
                request.trace,
                now,
                gen_ai__request__model=request.model,
                chimera__replica=str(route.replica),
                chimera__request=request.request_id,
                chimera__reason=route.reason,
            )
            self._open[request.request_id] = (span, request, now)

    def admit(self, request_id: str, now: float, reason: str) -> str:
        """Its turn has come; the context for its engine."""
        known = self._open.get(request_id)
        if known is None:
            return ""
        span, request, since_s = known
        context = context_of(span)
        queue = self._spans.begin(
            f"queue {request.model}", context, since_s, gen_ai__request__model=request.model, chimera__reason=reason
        )
        self._spans.end(queue, now)
        return context

    def end(self, request_id: str, now: float, fault: str = "", detail: str = "") -> None:
        span, _, _ = self._open.pop(request_id, (None, None, None))
        if span is not None:
            self._spans.end(span, now, fault, detail)

    def close(self) -> None:
        self._spans.close()
