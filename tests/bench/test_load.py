"""The client: what it hears of a server, when it sends, and what it does about a server that fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from chimera.bench.dialect import Completions, Dialect, Generate
from chimera.bench.load import Ending, Job, Run, Terms
from chimera.bench.record import Record
from chimera.bench.stream import Target

from tests.bench.stand_in import Asked, StandIn, chunk, piece, usage

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def jobs(url: str, planned: Sequence[float], dialect: Dialect, tokens: int = 3) -> list[Job]:
    target = Target(url)
    made = []
    for number, at_s in enumerate(planned):
        record = Record(request_id=str(number), model="m", planned_s=at_s, prompt_tokens=2, wanted_tokens=tokens)
        made.append(Job(record, target, target.message(dialect.path, dialect.body(record, "two words"))))
    return made


async def run(
    url: str,
    planned: Sequence[float],
    *,
    dialect: Dialect | None = None,
    terms: Terms | None = None,
    at_once: int | None = None,
) -> tuple[list[Record], Ending]:
    dialect = dialect or Completions()
    made = jobs(url, planned, dialect)
    whole = Run(made, dialect, terms or Terms(connections=1))
    ending = await (whole.open_loop() if at_once is None else whole.closed_loop(at_once))
    return [job.record for job in made], ending


async def test_an_answer_is_timed_and_counted() -> None:
    async with StandIn() as server:
        [record], ending = await run(server.url, [0.0])
    assert record.answered and record.status == 200
    assert (record.prompt_tokens, record.output_tokens, len(record.pieces_s)) == (2, 3, 2)
    assert record.sent_s is not None and record.first_token_s is not None and record.last_token_s is not None
    assert record.planned_s <= record.sent_s < record.first_token_s <= record.last_token_s
    assert (ending.planned, ending.sent, ending.partial) == (1, 1, "")


async def test_a_stream_may_be_cut_anywhere() -> None:
    whole = HEAD + b"".join(
        chunk(part)
        for part in (b'data: {"choices":[{"te', b'xt":"a"}]}\n', b'\ndata: {"choices":[{"text":"b"}]}\r\n\r\n: note\n\n')
    )
    whole += chunk(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\ndata: [DONE]\n\n') + b"0\r\n\r\n"

    async def in_bits(asked: Asked) -> None:
        size = 1 + len(server.asked) % 7
        for at in range(0, len(whole), size):
            await asked.raw(whole[at : at + size])
            await asyncio.sleep(0)

    async with StandIn(in_bits) as server:
        records, _ = await run(server.url, [0.0] * 8, at_once=1)
        assert server.connections == 1, "a connection is used again"
    assert [(r.answered, r.prompt_tokens, r.output_tokens) for r in records] == [(True, 7, 2)] * 8


async def test_the_servers_own_clock_is_kept_where_its_api_tells_it() -> None:
    async def native(asked: Asked) -> None:
        for made in (1, 2):
            meta = {"prompt_tokens": 5, "completion_tokens": made, "cached_tokens": 4, "e2e_latency": made / 100}
            events.append({"text": "ab"[:made], "meta_info": meta})
        await asked.events(*events)

    events: list[object] = []
    async with StandIn(native) as server:
        [record], _ = await run(server.url, [0.0], dialect=Generate())
    assert (record.server_ttft_s, record.output_tokens, record.cached_tokens, record.prompt_tokens) == (0.01, 2, 4, 5)
    assert server.asked[0].body["sampling_params"]["max_new_tokens"] == 3


async def test_times_are_honoured_and_lag_is_told() -> None:
    planned = [0.02 * number for number in range(20)]
    async with StandIn() as server:
        records, ending = await run(server.url, planned, terms=Terms(connections=4))
    assert all(record.sent_s is not None and record.sent_s >= record.planned_s for record in records)
    assert ending.lag_max_s == pytest.approx(max(record.lag_s for record in records))
    assert ending.wall_s >= planned[-1]


async def test_a_client_that_cannot_keep_up_says_so() -> None:
    async with StandIn() as server:
        made = jobs(server.url, [0.001 * number for number in range(100)], Completions())
        whole = Run(made, Completions(), Terms(connections=1, keep=lambda record: time.sleep(0.01)))
        ending = await whole.open_loop()
    assert ending.late > 0.05 and ending.is_late


async def test_a_closed_loop_has_never_more_than_its_number_open() -> None:
    async with StandIn() as server:
        records, _ = await run(server.url, [0.0] * 30, at_once=4)
        assert server.most_open <= 4 and len(server.asked) == 30
    assert all(record.answered for record in records)


@pytest.mark.parametrize(
    ("document", "refusal", "words"),
    [
        ({"error": {"code": "queue_full", "message": "come later", "type": "x"}}, "queue_full", "come later"),
        ({"message": "flat, as SGLang's", "code": 429}, "429", "flat"),
        ({"detail": "as FastAPI's"}, "error", "FastAPI"),
    ],
)
async def test_a_refusal_is_kept_in_the_servers_words(document: object, refusal: str, words: str) -> None:
    async with StandIn(lambda asked: asked.json(429, document)) as server:
        [record], _ = await run(server.url, [0.0])
    assert (record.status, record.refusal) == (429, refusal) and words in record.error and not record.answered


async def test_an_error_inside_a_stream_is_no_answer() -> None:
    async with StandIn(lambda asked: asked.events(piece("a"), {"error": {"code": "internal_error", "message": "x"}})) as server:
        [record], _ = await run(server.url, [0.0])
    assert (record.answered, record.refusal) == (False, "internal_error")


async def test_an_answer_without_a_token_is_no_answer() -> None:
    async with StandIn(lambda asked: asked.events(usage(2, 0))) as server:
        [record], _ = await run(server.url, [0.0])
    assert record.refusal == "empty"


async def test_tokens_that_say_nothing_are_an_answer_that_comes_at_its_end() -> None:
    async with StandIn(lambda asked: asked.events(usage(2, 3))) as server:
        [record], _ = await run(server.url, [0.0])
    assert record.answered and record.output_tokens == 3
    assert record.first_token_s == record.last_token_s == record.ended_s


async def test_a_stream_that_breaks_off_is_no_answer() -> None:
    async def breaks(asked: Asked) -> None:
        await asked.raw(HEAD + chunk(b'data: {"choices":[{"text":"a"}]}\n\n'))
        asked.writer.transport.abort()

    async with StandIn(breaks) as server:
        [record], _ = await run(server.url, [0.0])
    assert record.refusal == "broken" and not record.answered and record.first_token_s is not None


async def test_an_event_that_cannot_be_read_is_the_servers_fault_and_ends_one_request() -> None:
    async with StandIn(lambda asked: asked.events("{not json")) as server:
        records, _ = await run(server.url, [0.0, 0.0])
    assert [record.refusal for record in records] == ["strange", "strange"]


async def test_a_server_that_dies_half_way_leaves_what_there_was() -> None:
    async def dies(asked: Asked) -> None:
        if len(server.asked) > 10:
            server.die()
            return
        await asked.events(piece("a"), usage(2, 1))

    async with StandIn(dies) as server:
        records, ending = await run(server.url, [0.05 * number for number in range(100)])
    assert sum(record.answered for record in records) == 10
    assert ending.sent < 100 and "was gone" in ending.partial
    assert all(record.sent_s is None and not record.refusal for record in records[ending.sent :])


async def test_what_takes_too_long_is_given_up() -> None:
    never = asyncio.Event()

    async def hangs(asked: Asked) -> None:
        await never.wait()

    async with StandIn(hangs) as server:
        [record], _ = await run(server.url, [0.0], terms=Terms(connections=1, timeout_s=0.1))
        [late], ending = await run(server.url, [0.0], terms=Terms(connections=1, drain_s=0.1))
        never.set()
    assert record.refusal == "timeout"
    assert late.refusal == "open" and ending.sent == 1 and late.story is not None and not late.story.answered


async def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600.0 * next(jumps))
    async with StandIn() as server:
        records, ending = await run(server.url, [0.01 * number for number in range(10)])
    assert all(record.answered and 0 <= record.lag_s < 1 for record in records)
    assert 0 < ending.wall_s < 5


async def test_a_server_that_is_not_there_from_the_start_is_an_error() -> None:
    async with StandIn() as server:
        url = server.url
    with pytest.raises(OSError, match="Connect call failed"):
        await run(url, [0.0])
