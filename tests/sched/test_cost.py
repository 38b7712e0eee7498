"""The cost table: its arithmetic, and the tables that come with the package."""

from __future__ import annotations

import msgspec
import pytest
from chimera.config.cost_tables import read_cost_table, shipped_tables
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable, EngineCost
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from tests.sched.builders import costs, model

COST = costs(step_sequence_s=1e-4, kv_bytes_per_s=1e9).of(model("a"))


@given(st.integers(1, 200), st.integers(0, 100_000), st.integers(1, 5000))
def test_the_steps_that_fit_into_a_time_are_those_that_take_it(batch: int, context: int, steps: int) -> None:
    seconds = COST.decodes_s(batch, context, steps)
    assert COST.decodes_within(batch, context, seconds) == steps
    assert COST.decodes_within(batch, context, seconds * 0.9999) in (steps - 1, steps)


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(1, 30))
def test_a_leap_is_as_long_as_its_steps(batch: int, context: int, steps: int) -> None:
    one_by_one = sum(COST.decode_s(batch, context + batch * n) for n in range(steps))
    assert COST.decodes_s(batch, context, steps) == approx(one_by_one)


def test_a_prompt_in_chunks_costs_no_less_than_its_chunks() -> None:
    cost: EngineCost = costs(chunk_tokens=100, prefill_kv_bytes_per_s=1e6).of(model("a"))
    chunks = cost.prefill_s(100) + cost.prefill_s(100, 100) + cost.prefill_s(50, 200)
    assert cost.prompt_s(250) == approx(chunks)


def test_neighbours_take_turns_and_a_little_more() -> None:
    assert costs(neighbour_slowdown=0.1).slowdown(1) == 1.0
    assert costs(neighbour_slowdown=0.1).slowdown(3) == approx(3.6)


@pytest.mark.parametrize("name", shipped_tables())
def test_a_shipped_table_says_where_each_of_its_figures_comes_from(name: str) -> None:
    table = msgspec.json.decode(read_cost_table(name), type=CostTable)
    assert table.sources.keys() == set(CostTable.__struct_fields__) - {"machine", "sources", "refined"}


def test_an_unknown_table_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="h100-80g-like"):
        read_cost_table("abacus")
