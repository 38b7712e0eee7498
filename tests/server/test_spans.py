"""A request's span says in OpenTelemetry's words what its record says, and hangs in its caller's trace."""

from __future__ import annotations

import msgspec
import pytest
from chimera.cli.keeping import Keeping
from chimera.server.spans import Spans

from tests.server.conftest import Stage
from tests.server.test_metrics import record

export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="not shown: no opentelemetry-sdk")
trace = pytest.importorskip("opentelemetry.sdk.trace", reason="not shown: no opentelemetry-sdk")
simple = pytest.importorskip("opentelemetry.sdk.trace.export", reason="not shown: no opentelemetry-sdk")

TRACE, SPAN = "a" * 32, "b" * 16


class Collected:
    def __init__(self) -> None:
        self._exporter = export.InMemorySpanExporter()
        provider = trace.TracerProvider()
        provider.add_span_processor(simple.SimpleSpanProcessor(self._exporter))
        self.spans = Spans(provider.get_tracer("test"), wall_s=1000.0)

    def only(self):  # type: ignore[no-untyped-def]
        (span,) = self._exporter.get_finished_spans()
        return span


def test_a_span_is_its_record_in_other_words() -> None:
    collected = Collected()
    collected.spans.tell(record(trace=f"00-{TRACE}-{SPAN}-01", client_id="mine", cached_tokens=4))
    span = collected.only()
    assert (span.start_time, span.end_time) == (1010 * 10**9, 1010_950_000_000)
    assert [(event.name, event.timestamp) for event in span.events] == [("first token", 1010_050_000_000)]
    assert span.attributes["gen_ai.request.model"] == "m"
    assert span.attributes["gen_ai.usage.input_tokens"] == 7 and span.attributes["gen_ai.usage.output_tokens"] == 10
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == SPAN
    assert span.status.is_unset


def test_a_refusal_is_an_error_and_a_request_without_a_trace_begins_one() -> None:
    collected = Collected()
    collected.spans.tell(record(outcome="queue_full", detail="256 wait", first_token_s=None))
    span = collected.only()
    assert not span.status.is_ok and span.status.description == "256 wait"
    assert span.attributes["error.type"] == "queue_full"
    assert span.parent is None and span.events == ()


async def test_a_front_end_tells_each_request_with_the_context_that_it_came_with(stage: Stage) -> None:
    told = []
    assert stage.front._account is not None
    stage.front._account._spans = told.append
    headers = {"x-request-id": "mine-1", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    body = {"model": "m", "prompt": "hi", "max_tokens": 2}
    async with stage.client.post(stage.url + "/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200
    kept = await stage.rehearsal.records.get()
    assert [msgspec.structs.asdict(one) for one in told] == [msgspec.structs.asdict(kept)]
    assert (told[0].trace, told[0].client_id) == (headers["traceparent"], "mine-1")


def test_front_ends_are_told_to_send_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert "--traces" in Keeping(traces=True).words_for_front(tmp_path)
    assert "--traces" in Keeping(traces=True, records=False).words_for_front(tmp_path)
    assert "--traces" not in Keeping().words_for_front(tmp_path)
