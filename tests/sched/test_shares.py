"""How one GPU's KV pages are divided: by need, then for comfort, then whatever is left."""

from chimera.sched.shares import Claim, divide, is_unfair
from hypothesis import given
from hypothesis import strategies as st


def claim(wanted: int = 0, *, level: int = 0, least: int = 4, ceiling: int = 1000) -> Claim:
    return Claim(level=level, least=least, ceiling=ceiling, wanted=wanted)


def test_memory_that_nobody_needs_is_divided_evenly_for_prefixes() -> None:
    assert divide(100, {"a": claim(), "b": claim()}) == {"a": 50, "b": 50}


def test_a_burst_gets_what_it_needs_from_an_idle_neighbour() -> None:
    levels = divide(100, {"busy": claim(wanted=90), "idle": claim()})
    assert levels["busy"] >= 90 and levels["idle"] >= 4


def test_too_little_for_all_is_divided_so_that_the_smallest_share_is_largest() -> None:
    assert divide(100, {"a": claim(wanted=500), "b": claim(wanted=300), "c": claim(wanted=10)}) == {"a": 45, "b": 45, "c": 10}


def test_nobody_gets_less_than_it_can_work_with() -> None:
    assert divide(100, {"a": claim(wanted=500), "b": claim(least=60)}) == {"a": 40, "b": 60}


def test_nobody_gets_more_than_its_ceiling() -> None:
    assert divide(100, {"a": claim(wanted=500, ceiling=20), "b": claim(ceiling=30)}) == {"a": 20, "b": 30}


def test_levels_that_meet_every_need_stay_however_uneven() -> None:
    assert not is_unfair(100, {"a": claim(wanted=10, level=80), "b": claim(wanted=20, level=20)})


def test_a_need_that_cannot_be_met_better_is_no_reason_to_divide_anew() -> None:
    assert not is_unfair(100, {"a": claim(wanted=500, level=50), "b": claim(wanted=500, level=50)})


def test_a_need_that_a_neighbour_could_meet_is() -> None:
    assert is_unfair(100, {"a": claim(wanted=60, level=20), "b": claim(level=80)})


def test_a_capacity_that_has_shrunk_is() -> None:
    assert is_unfair(90, {"a": claim(level=50), "b": claim(level=50)})


claims = st.builds(
    lambda wanted, level, least, more: claim(wanted, level=level, least=least, ceiling=least + more),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 10),
    st.integers(0, 200),
)


@given(st.integers(0, 500), st.lists(claims, min_size=1, max_size=6))
def test_a_division_fits_and_wastes_nothing_that_someone_may_have(capacity: int, several: list[Claim]) -> None:
    named = dict(enumerate(several))
    levels = divide(capacity, named)
    least, most = sum(c.least for c in several), sum(c.ceiling for c in several)
    assert all(named[key].least <= level <= named[key].ceiling for key, level in levels.items())
    assert sum(levels.values()) <= max(capacity, least)
    assert sum(levels.values()) > min(max(capacity, least), most) - len(several)


@given(st.integers(100, 500), st.lists(claims, min_size=1, max_size=6))
def test_a_new_division_is_fair_by_its_own_measure(capacity: int, several: list[Claim]) -> None:
    named = dict(enumerate(several))
    levels = divide(capacity, named)
    after = {key: Claim(level=levels[key], least=c.least, ceiling=c.ceiling, wanted=c.wanted) for key, c in named.items()}
    assert not is_unfair(capacity, after)
