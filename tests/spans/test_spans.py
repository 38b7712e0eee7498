"""What each process tells of a request hangs in its caller's trace, in OpenTelemetry's words, under the right parent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from chimera.core.record import Alternative, RequestRecord
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import actions, events

from tests.sched.builders import model, request, seat
from tests.server.conftest import set_up
from tests.server.test_metrics import record

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="not shown: no opentelemetry-sdk")

from chimera.spans.client import ClientSpans  # noqa: E402 - only where there is the extra
from chimera.spans.decisions import DecisionSpans  # noqa: E402
from chimera.spans.engine import EngineSpans  # noqa: E402
from chimera.spans.spans import Spans  # noqa: E402
from chimera.spans.tries import TrySpans  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402

TRACE, SPAN = "a" * 32, "b" * 16
CALLER = f"00-{TRACE}-{SPAN}-01"


class Told:
    def __init__(self) -> None:
        self._exporter = memory.InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = Spans(provider.get_tracer("test"), wall_s=1000.0)

    @property
    def all(self) -> list[Any]:
        return list(self._exporter.get_finished_spans())

    def only(self) -> Any:
        (span,) = self.all
        return span


def times(span: Any) -> tuple[float, float]:
    return span.start_time / 1e9, span.end_time / 1e9


def written(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def context(span: Any) -> str:
    return written(span.context)


def parent(span: Any) -> str | None:
    return None if span.parent is None else written(span.parent)


def test_an_answers_span_is_its_record_in_other_words() -> None:
    told = Told()
    client = ClientSpans(told.spans)
    given = client.begin("r", "m", CALLER, 10.0, embeds=False)
    client.end(record(client_id="mine", cached_tokens=4))
    span = told.only()
    assert (span.name, span.kind.name, times(span)) == ("text_completion m", "SERVER", (1010.0, 1010.95))
    assert (context(span), parent(span)) == (given, CALLER)
    assert [(event.name, event.timestamp) for event in span.events] == [("first token", 1010_050_000_000)]
    assert span.attributes["gen_ai.request.model"] == "m"
    assert span.attributes["gen_ai.usage.input_tokens"] == 7 and span.attributes["gen_ai.usage.output_tokens"] == 10
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.status.is_unset


def test_a_refusal_is_an_error_and_a_request_without_a_trace_begins_one() -> None:
    told = Told()
    client = ClientSpans(told.spans)
    client.begin("r", "m", "", 10.0, embeds=True)
    client.end(record(outcome="queue_full", detail="256 wait", first_token_s=None))
    span = told.only()
    assert span.name == "embeddings m"
    assert not span.status.is_ok and span.status.description == "256 wait"
    assert span.attributes["error.type"] == "queue_full"
    assert span.parent is None and span.events == ()


def test_who_is_not_to_be_traced_is_not() -> None:
    told = Told()
    client = ClientSpans(told.spans)
    assert client.begin("r", "m", f"00-{TRACE}-{SPAN}-00", 10.0, embeds=False).endswith("-00")
    client.end(record())
    assert told.all == []


ASKED = msgspec.structs.replace(request("r", "m"), trace=CALLER)
M = ReplicaId("m")


@pytest.mark.parametrize(
    ("decided", "fault"),
    [
        (actions.Route(request=ASKED, replica=M, agent="local", reason="the least loaded"), ""),
        (actions.Reject(request_id="r", front="f", code=actions.RejectCode.QUEUE_FULL, reason="256 wait"), "queue_full"),
    ],
)
def test_control_tells_how_long_a_request_waited_for_a_replica(decided: actions.Action, fault: str) -> None:
    told = Told()
    control = DecisionSpans(told.spans)
    control.step(events.RequestArrived(request=ASKED), [], 2.0)
    control.step(events.RequestArrived(request=request("quiet", "m")), [], 2.0)  # of a client that is not traced
    control.step(events.Woke(), [decided], 5.0)
    span = told.only()
    assert (span.name, parent(span), times(span)) == ("dispatch m", CALLER, (1002.0, 1005.0))
    assert span.attributes["chimera.reason"] == decided.reason and span.attributes.get("error.type", "") == fault


END: dict[str, Callable[[ReplicaId], events.Event]] = {
    "": lambda replica: events.ReplicaReady(
        replica=replica, epoch=Epoch(1, 1), credits=1, kv_tokens=1, context_length=1, load_s=1.0
    ),
    "failed": lambda replica: events.ActivationFailed(replica=replica, epoch=Epoch(1, 1), reason="no files"),
    "lost": lambda replica: events.WorkerLost(worker="w", replica=replica, epoch=Epoch(1, 1), reason="signal 9"),
    "stopped": lambda replica: events.ReplicaStopped(replica=replica, epoch=Epoch(1, 1), reason="called off"),
}


@pytest.mark.parametrize("fault", END)
def test_control_tells_of_an_activation_what_was_weighed_and_what_became_of_it(fault: str) -> None:
    told = Told()
    control = DecisionSpans(told.spans)
    weighed = (Alternative(what="bert stays", score=1.5, unit="requests"),)
    order = actions.Activate(model=model("m"), seat=seat("m", 0), reason="r waits for it", alternatives=weighed)
    given = control.activate(order, 2.0)
    control.step(END[fault](ReplicaId("another")), [], 3.0)
    assert told.all == []
    control.step(END[fault](M), [], 4.0)
    span = told.only()
    assert (span.name, context(span), times(span)) == ("activate m", given, (1002.0, 1004.0))
    assert span.attributes["chimera.reason"] == "r waits for it" and span.attributes["chimera.gpus"] == (0,)
    assert [(event.name, event.attributes["score"]) for event in span.events] == [("bert stays", 1.5)]
    assert span.attributes.get("error.type", "") == fault


def test_a_departure_is_told_from_its_order_until_it_is_gone() -> None:
    told = Told()
    control = DecisionSpans(told.spans)
    control.step(events.Woke(), [actions.Deactivate(replica=M, epoch=Epoch(1, 1), reason="bert comes")], 2.0)
    control.step(END["stopped"](M), [], 2.5)
    assert (told.only().name, times(told.only())) == ("deactivate m", (1002.0, 1002.5))


def test_an_agent_tells_of_a_try_and_of_its_place_in_the_queue() -> None:
    told = Told()
    agent = TrySpans(told.spans)
    route = actions.Route(request=ASKED, replica=M, agent="local", reason="the least loaded")
    agent.begin(route, 2.0)
    given = agent.admit("r", 3.0, "first in line")
    agent.end("r", 4.0, "requeued", "its engine was lost")
    agent.end("r", 5.0)  # once is enough
    queue, attempt = told.all
    assert (attempt.name, context(attempt), parent(attempt), times(attempt)) == ("try m", given, CALLER, (1002.0, 1004.0))
    assert (queue.name, parent(queue), times(queue)) == ("queue m", given, (1002.0, 1003.0))
    assert attempt.attributes["error.type"] == "requeued" and attempt.attributes["chimera.replica"] == "m/0"
    agent.begin(msgspec.structs.replace(route, request=request("quiet", "m")), 2.0)
    assert agent.admit("quiet", 3.0, "") == ""


def test_a_worker_tells_of_the_prompt_and_of_the_tokens() -> None:
    told = Told()
    counts = {"prompt_tokens": 7, "cached_tokens": 4, "output_tokens": 10}
    EngineSpans(told.spans).request(CALLER, "m", 1.0, 2.0, 5.0, outcome="length", **counts)
    prefill, decode = told.all
    assert (prefill.name, parent(prefill), times(prefill)) == ("prefill m", CALLER, (1001.0, 1002.0))
    assert (decode.name, parent(decode), times(decode)) == ("decode m", CALLER, (1002.0, 1005.0))
    assert (prefill.attributes["gen_ai.usage.input_tokens"], decode.attributes["gen_ai.usage.output_tokens"]) == (7, 10)
    assert decode.status.is_unset


def test_a_prompt_that_came_to_nothing_is_an_error() -> None:
    told = Told()
    counts = {"prompt_tokens": 7, "cached_tokens": 4, "output_tokens": 0}
    EngineSpans(told.spans).request(CALLER, "m", 1.0, None, 5.0, outcome="requeued", **counts)
    assert (told.only().name, times(told.only()), told.only().attributes["error.type"]) == (
        "prefill m",
        (1001.0, 1005.0),
        "requeued",
    )


async def test_a_front_end_hands_its_context_on_and_tells_what_its_record_tells() -> None:
    told = Told()
    async with set_up(spans=ClientSpans(told.spans)) as stage:
        stage.rehearsal.hold = True
        headers = {"x-request-id": "mine-1", "traceparent": CALLER}
        body = {"model": "m", "prompt": "hi", "max_tokens": 2}
        asking = asyncio.create_task(stage.client.post(stage.url + "/v1/completions", json=body, headers=headers))
        asked = await stage.rehearsal.next_request()
        await stage.rehearsal.worker.say(asked, "ab", events.Outcome.LENGTH)
        assert (await asking).status == 200
        kept: RequestRecord = await stage.rehearsal.records.get()
    assert (context(told.only()), parent(told.only())) == (asked.trace, CALLER)
    assert told.only().attributes["gen_ai.response.id"] == kept.request_id
    assert kept.trace == CALLER
