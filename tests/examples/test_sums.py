"""How sums are worked out, and judged."""

from __future__ import annotations

from examples.tiny_models.lessons import sums


def test_sums_are_worked_out_column_by_column() -> None:
    assert sums.answer(17, 25) == "7+5=12, 1+2+1=4, so 17 + 25 = 42."
    assert sums.answer(999, 1) == "9+1=10, 9+0+1=10, 9+0+1=10, so 999 + 1 = 1000."


def test_a_wrong_sum_is_wrong_however_well_it_is_told() -> None:
    wanted = sums.answer(17, 25)
    assert sums.right("", wanted, "7+5=12, so 17 + 25 = 42.")
    assert not sums.right("", wanted, "7+5=12, 1+2+1=4, so 17 + 25 = 43.")
