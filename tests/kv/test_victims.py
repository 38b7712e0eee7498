"""Choosing what to give back."""

from __future__ import annotations

from chimera.kv.victims import StripeState, StripeView, cheapest, emptiest


def view(stripe: int, used: int, *, evictable: int = 0) -> StripeView:
    return StripeView(stripe=stripe, state=StripeState.MAPPED, used_slots=used, free_slots=8 - used, evictable_slots=evictable)


def test_without_knowledge_the_emptiest_go() -> None:
    assert emptiest([view(1, 5), view(2, 0), view(3, 2)], 2) == [2, 3]


def test_what_running_requests_hold_goes_last() -> None:
    assert emptiest([view(1, 3), view(2, 8, evictable=8), view(3, 6, evictable=4)], 2) == [2, 3]


def test_by_value_ties_go_to_the_emptier() -> None:
    assert cheapest([0, 3.0, 1.0, 1.0])([view(1, 5), view(2, 4), view(3, 2)], 2) == [3, 2]


def test_asking_for_more_than_there_is_gives_all() -> None:
    assert sorted(emptiest([view(1, 5), view(2, 4)], 9)) == [1, 2]
