"""The words of docs/metrics.md, held to by small stories."""

from __future__ import annotations

from chimera.core.metrics import Latency, Story, measure, measure_by_model
from chimera.core.model import Slo
from pytest import approx

PROMISE = Slo(ttft_s=1.0, tpot_s=0.1)


def story(
    name: str = "r",
    *,
    sent: float = 0.0,
    first: float | None = 0.5,
    last: float | None = 1.4,
    tokens: int = 10,
    slo: Slo = PROMISE,
) -> Story:
    return Story(
        request_id=name,
        model="m",
        sent_s=sent,
        prompt_tokens=5,
        output_tokens=tokens,
        slo=slo,
        first_token_s=None if first is None else sent + first,
        last_token_s=None if last is None else sent + last,
    )


def test_tpot_counts_from_the_first_token_over_the_tokens_after_it() -> None:
    assert story().tpot_s == approx(0.1)
    assert story(tokens=1).tpot_s is None


def test_an_answer_of_one_token_keeps_any_promise_about_tpot() -> None:
    assert story(tokens=1, last=50.0).keeps_both


def test_a_promise_not_given_is_kept_by_every_answer_and_by_no_silence() -> None:
    assert story(first=99.0, last=999.0, slo=Slo()).keeps_both
    assert not story(first=None, last=None, slo=Slo()).keeps_both
    assert not story(first=0.1, last=None).keeps_ttft


def test_attainment_is_of_requests_sent() -> None:
    stories = [
        story(),
        story(sent=4.0, first=2.0, last=2.1),
        story(sent=6.0, last=9.0),
        story(sent=10.0, first=None, last=None),
    ]
    metrics = measure(stories)
    assert (metrics.sent, metrics.answered, metrics.span_s) == (4, 3, 10.0)
    assert (metrics.ttft_attainment, metrics.tpot_attainment, metrics.joint_attainment) == (0.5, 0.5, 0.25)
    assert metrics.goodput_per_s == 0.1
    assert metrics.refusals == {"open": 1}


def test_percentiles_are_values_that_came_up() -> None:
    latency = Latency.of([0.1 * n for n in range(1, 101)])
    assert (latency.p50_s, latency.p95_s, latency.p99_s) == (approx(5.0), approx(9.5), approx(9.9))
    assert Latency.of([]).p99_s is None


def test_nothing_sent_misses_nothing() -> None:
    assert measure([]).joint_attainment == 1.0
    assert list(measure_by_model([story()])) == ["m"]
