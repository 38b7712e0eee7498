"""Choosing what to give back: whole prefixes go, with all that continues them."""

from __future__ import annotations

import pytest
import torch
from chimera.kv.victims import Prefixes, StripeState, StripeView, cheapest, emptiest

PER_STRIPE = 8


def view(stripe: int, used: int) -> StripeView:
    return StripeView(stripe=stripe, state=StripeState.MAPPED, used_slots=used, free_slots=PER_STRIPE - used)


def prefixes(*nodes: tuple[int, list[int]], locked: tuple[int, ...] = (), values: list[float] | None = None) -> Prefixes:
    """Each node is (parent, its slots)."""
    return Prefixes(
        slots=torch.tensor([slot for _, slots in nodes for slot in slots], dtype=torch.int64),
        lengths=torch.tensor([len(slots) for _, slots in nodes], dtype=torch.int64),
        parents=torch.tensor([parent for parent, _ in nodes], dtype=torch.int64),
        values=torch.tensor(values or [1.0] * len(nodes)),
        locked=torch.tensor([index in locked for index in range(len(nodes))], dtype=torch.bool),
        slots_per_stripe=PER_STRIPE,
        stripes=6,
    )


def run(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def candidates(tree_slots: dict[int, int]) -> list[StripeView]:
    return [view(stripe, used) for stripe, used in tree_slots.items()]


def test_without_knowledge_the_emptiest_go() -> None:
    assert emptiest([view(1, 5), view(2, 0), view(3, 2)], 2) == [2, 3]


def test_by_value_ties_go_to_the_emptier() -> None:
    assert cheapest([0, 3.0, 1.0, 1.0])([view(1, 5), view(2, 4), view(3, 2)], 2) == [3, 2]


def test_a_prefix_costs_what_continues_it() -> None:
    """Stripe 1 holds a short system prompt that everything in stripes 3 and 4 continues; stripe 2 holds a full leaf."""
    tree = prefixes((-1, run(8, 2)), (-1, run(16, 8)), (0, run(24, 8)), (0, run(32, 8)))
    assert tree.choose(candidates({1: 2, 2: 8, 3: 8, 4: 8}), 1) == [2]


def test_what_one_stripe_takes_along_makes_the_next_cheaper() -> None:
    """A prefix over stripes 2 and 3 is paid once: both together cost less than 2 and the cheaper-looking 4."""
    tree = prefixes((-1, run(8, 8)), (-1, run(16, 14)), (-1, run(32, 8)))
    chosen = tree.choose(candidates({1: 8, 2: 8, 3: 6, 4: 8}), 4)
    assert abs(chosen.index(2) - chosen.index(3)) == 1


def test_running_requests_are_touched_last() -> None:
    tree = prefixes((-1, run(8, 1)), (-1, run(16, 8)), (-1, run(24, 8)), locked=(0,))
    # Stripe 4 holds one slot that no prefix knows: a running request's own.
    assert sorted(tree.choose(candidates({1: 1, 2: 8, 3: 8, 4: 1}), 2)) == [2, 3]


def test_worthless_prefixes_go_before_warm_ones() -> None:
    tree = prefixes((-1, run(8, 4)), (-1, run(16, 8)), values=[5.0, 0.1])
    assert tree.choose(candidates({1: 4, 2: 8}), 1) == [2]


def test_what_must_be_evicted_is_named_children_after_parents() -> None:
    tree = prefixes((-1, run(8, 8)), (0, run(16, 8)), (1, run(24, 8)), (-1, run(32, 8)))
    assert tree.touching([2]).tolist() == [1, 2]
    assert tree.touching([1, 4]).tolist() == [0, 1, 2, 3]


def test_asking_for_more_than_there_is_gives_all_once() -> None:
    tree = prefixes((-1, run(8, 8)))
    assert sorted(tree.choose(candidates({1: 8, 2: 0}), 5)) == [1, 2]
    assert tree.choose([], 3) == []


def test_an_empty_cache_is_no_obstacle() -> None:
    assert prefixes().choose(candidates({1: 0, 2: 3}), 1) == [1]


def test_a_child_before_its_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="comes after"):
        prefixes((1, run(8, 2)), (-1, run(16, 2)))
