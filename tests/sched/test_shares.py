"""How one GPU's KV pages are divided: by need, then for comfort, then whatever is left."""

import msgspec
from chimera.sched.shares import Claim, divide, divide_all, is_unfair
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
    assert not is_unfair({0: 100}, {0: {"a": claim(wanted=10, level=80), "b": claim(wanted=20, level=20)}})


def test_a_need_that_cannot_be_met_better_is_no_reason_to_divide_anew() -> None:
    assert not is_unfair({0: 100}, {0: {"a": claim(wanted=500, level=50), "b": claim(wanted=500, level=50)}})


def test_a_need_that_a_neighbour_could_meet_is() -> None:
    assert is_unfair({0: 100}, {0: {"a": claim(wanted=60, level=20), "b": claim(level=80)}})


def test_a_capacity_that_has_shrunk_is() -> None:
    assert is_unfair({0: 90}, {0: {"a": claim(level=50), "b": claim(level=50)}})


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
    assert not is_unfair({0: capacity}, {0: after})


# Several GPUs.


def test_a_gang_gets_on_all_gpus_what_the_tightest_gives_and_others_get_what_it_leaves() -> None:
    divided = divide_all({0: 100, 1: 100}, {0: {"g": claim(), "a": claim()}, 1: {"g": claim(), "b": claim(wanted=80)}})
    assert divided[0]["g"] == divided[1]["g"] == 100 - divided[1]["b"] < 20
    assert divided[0]["a"] == 100 - divided[0]["g"]


@given(
    st.dictionaries(st.integers(0, 3), st.integers(0, 500), min_size=1),
    st.lists(st.tuples(claims, st.sets(st.integers(0, 3), min_size=1)), min_size=1, max_size=6),
)
def test_a_division_over_several_gpus_fits_each_and_is_fair(
    capacities: dict[int, int], several: list[tuple[Claim, set[int]]]
) -> None:
    named = {gpu: {key: c for key, (c, gpus) in enumerate(several) if gpu in gpus} for gpu in capacities}
    divided = divide_all(capacities, named)
    for gpu, levels in divided.items():
        least = sum(c.least for c in named[gpu].values())
        assert all(level <= named[gpu][key].ceiling for key, level in levels.items())
        assert sum(levels.values()) <= max(capacities[gpu], least)
        assert all(divided[other][key] == level for key, level in levels.items() for other in divided if key in divided[other])
        named[gpu] = {key: msgspec.structs.replace(c, level=levels[key]) for key, c in named[gpu].items()}
    roomy = all(sum(c.least for c in its.values()) <= capacities[gpu] for gpu, its in named.items())
    assert not (roomy and is_unfair(capacities, named))
