"""What happened in a simulation, kept for people: lines of JSON, and Chrome's trace format. Requests are named, not told."""

from __future__ import annotations

from typing import Any

import msgspec

from chimera.core.metrics import Story


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    at_s: float
    what: str
    """`activate`, `serves`, `deactivate`, `left`, `policy`, `reject`, `lost`."""
    replica: str = ""
    gpus: tuple[int, ...] = ()
    request: str = ""
    reason: str = ""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A replica on its GPUs: asked for, serving, gone."""

    replica: str
    gpus: tuple[int, ...]
    asked_s: float
    ready_s: float | None
    gone_s: float


class Chronicle:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.spans: list[Span] = []

    def note(
        self, at_s: float, what: str, *, replica: str = "", gpus: tuple[int, ...] = (), request: str = "", reason: str = ""
    ) -> None:
        self.entries.append(Entry(at_s=at_s, what=what, replica=replica, gpus=gpus, request=request, reason=reason))

    def lines(self) -> bytes:
        encoder = msgspec.json.Encoder()
        return b"".join(encoder.encode(entry) + b"\n" for entry in self.entries)

    def chrome_trace(self, stories: list[Story]) -> bytes:
        """For chrome://tracing and Perfetto: GPUs as processes, replicas as threads, requests as asynchronous spans."""
        events: list[dict[str, Any]] = []
        for span in self.spans:
            for gpu in span.gpus:
                ready_s = span.gone_s if span.ready_s is None else span.ready_s
                events.append(_complete("loading", span.asked_s, ready_s, gpu, span.replica))
                if span.ready_s is not None:
                    events.append(_complete("serving", ready_s, span.gone_s, gpu, span.replica))
        for story in stories:
            if story.last_token_s is not None:
                common = {"cat": "request", "id": story.request_id, "pid": "requests", "tid": story.model, "name": story.model}
                events.append({**common, "ph": "b", "ts": story.sent_s * 1e6})
                events.append({**common, "ph": "e", "ts": story.last_token_s * 1e6})
        return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


def _complete(name: str, from_s: float, to_s: float, gpu: int, replica: str) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": from_s * 1e6, "dur": (to_s - from_s) * 1e6, "pid": f"GPU {gpu}", "tid": replica}
