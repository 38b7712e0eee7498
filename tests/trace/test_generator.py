"""Traces that are made up: as many requests as promised, as bursty, for whom."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import msgspec
import pytest
from chimera.errors import ConfigError
from chimera.trace.generator import ARRIVALS, Recipe, generate
from chimera.trace.sharegpt import Exchange
from chimera.trace.trace import Row, Trace

RECIPE = Recipe(models=("a", "b", "c", "d"), rate=20, seconds=200, prompt_tokens=(8, 16), output_tokens=(1, 4))


def gaps(trace: Trace) -> list[float]:
    return [later.at_s - row.at_s for row, later in itertools.pairwise(trace.rows)]


@pytest.mark.parametrize(
    ("arrivals", "cv"), [("poisson", 1.0), ("gamma", 2.0), ("weibull", 2.0), ("weibull", 0.5), ("constant", 0.0)]
)
def test_arrivals_have_their_rate_and_their_burstiness(arrivals: str, cv: float) -> None:
    trace = generate(msgspec.structs.replace(RECIPE, arrivals=arrivals, cv=cv or 1.0), seed=1)
    found = gaps(trace)
    assert len(trace.rows) == pytest.approx(4000, rel=0.1)
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(cv, rel=0.15, abs=0.01)
    assert all(8 <= row.prompt_tokens <= 16 and 1 <= row.output_tokens <= 4 for row in trace.rows)


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_the_same_seed_makes_the_same_trace(arrivals: str) -> None:
    recipe = msgspec.structs.replace(RECIPE, arrivals=arrivals, seconds=5)
    assert generate(recipe, 7) == generate(recipe, 7)
    assert generate(recipe, 7).rows != generate(recipe, 8).rows


def asked(trace: Trace, from_s: float = 0, to_s: float = 1e9) -> Counter[str]:
    return Counter(row.model for row in trace.rows if from_s <= row.at_s < to_s)


def test_a_power_law_asks_the_first_most() -> None:
    found = asked(generate(msgspec.structs.replace(RECIPE, shape="power-law", alpha=1.0), 1))
    assert found["a"] / found["b"] == pytest.approx(2, rel=0.15)
    assert found["a"] / found["d"] == pytest.approx(4, rel=0.2)


def test_two_phases_ask_other_models() -> None:
    trace = generate(msgspec.structs.replace(RECIPE, shape="two-phase"), 1)
    assert set(asked(trace, 0, 100)) == {"a", "b"}
    assert set(asked(trace, 100)) == {"c", "d"}


def test_models_go_on_and_off_in_turns() -> None:
    recipe = msgspec.structs.replace(RECIPE, shape="on-off", period_s=40, on_share=0.5)
    trace = generate(recipe, 1)
    assert set(asked(trace, 0, 10)) == {"a", "d"}  # d began its turn before the trace did
    assert "a" in asked(trace, 0, 20) and "a" not in asked(trace, 20, 40) and "a" in asked(trace, 40, 60)


def test_lengths_may_come_from_conversations() -> None:
    trace = generate(RECIPE, 1, [Exchange("x", 3, 5), Exchange("y", 7, 9)])
    assert {(row.prompt_tokens, row.output_tokens) for row in trace.rows} == {(3, 5), (7, 9)}


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.0},
        {"seconds": float("inf")},
        {"models": ()},
        {"arrivals": "psychic"},
        {"shape": "round"},
        {"prompt_tokens": (5, 4)},
        {"arrivals": "gamma", "cv": 99.0},
    ],
)
def test_a_recipe_that_makes_nothing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        generate(msgspec.structs.replace(RECIPE, **change), 1)


def test_clipping_cuts_the_answer_to_half_of_the_context_first_and_then_the_prompt() -> None:
    trace = Trace("t", (Row(0, "m", 100, 100), Row(0, "m", 90, 10), Row(0, "m", 10, 500), Row(0, "n", 999, 999)))
    clipped, cut = trace.clipped({"m": 100})
    assert [(row.prompt_tokens, row.output_tokens) for row in clipped.rows] == [(50, 50), (90, 10), (10, 50), (999, 999)]
    assert cut == 2


def test_lengths_are_scaled_and_never_vanish() -> None:
    assert Trace("t", (Row(0, "m", 100, 3),)).length_scaled(0.1).rows == (Row(0, "m", 10, 1),)
