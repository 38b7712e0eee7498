"""Which models are kept when not all can be."""

from collections.abc import Callable

import pytest
from chimera.engine.sglang.shelf import Berth, Parked, Shelf
from chimera.units import MIB

from tests.worker.stage import model


def berth(name: str, image: str = "v1", ceiling_bytes: int = 1) -> Berth:
    return Berth(model=model(name), image=image, gpu_ids=(0,), ceiling_bytes=ceiling_bytes)


def parked(name: str, nbytes: int = MIB, build_s: float = 1.0, since_s: float = 0.0) -> Parked[str]:
    return Parked(berth=berth(name), what=name, nbytes=nbytes, build_s=build_s, since_s=since_s)


@pytest.fixture
def gone() -> list[str]:
    return []


@pytest.fixture
def shelf(gone: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Shelf[str]]:
    monkeypatch.setattr("chimera.engine.sglang.shelf.time.monotonic", lambda: 100.0)
    return lambda most=2, most_bytes=None: Shelf(most, most_bytes, gone.append)


def test_who_comes_back_is_no_longer_there(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf()
    kept.put(parked("a"))
    taken = kept.take(berth("a"))
    assert taken is not None and taken.what == "a" and not kept.on(0) and not gone


@pytest.mark.parametrize("other", [berth("b"), berth("a", image="v2"), berth("a", ceiling_bytes=2)])
def test_only_what_fits_comes_back(shelf: Callable[..., Shelf[str]], other: Berth) -> None:
    kept = shelf()
    kept.put(parked("a"))
    assert kept.take(other) is None and len(kept.on(0)) == 1


def test_of_equals_the_one_that_nobody_asked_for_longest_goes(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf(most=2)
    for name, since_s in (("a", 20.0), ("b", 10.0), ("c", 30.0)):
        kept.put(parked(name, since_s=since_s))
    assert gone == ["b"]


def test_what_is_dear_to_build_stays_longer(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf(most=1)
    kept.put(parked("dear", build_s=60.0, since_s=80.0))
    kept.put(parked("cheap", build_s=1.0, since_s=90.0))
    assert gone == ["cheap"]


def test_what_is_large_goes_first(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf(most=9, most_bytes=10 * MIB)
    kept.put(parked("large", nbytes=8 * MIB))
    kept.put(parked("small", nbytes=4 * MIB))
    assert gone == ["large"] and [p.nbytes for p in kept.on(0)] == [4 * MIB]


def test_one_that_is_larger_than_all_that_may_be_kept_is_not(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf(most_bytes=3 * MIB)
    kept.put(parked("a", nbytes=4 * MIB))
    assert gone == ["a"] and not kept.on(0)


def test_a_second_of_the_same_takes_the_place_of_the_first(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf(most=2)
    kept.put(parked("b"))
    kept.put(Parked(berth=berth("a"), what="old", nbytes=1, build_s=1.0))
    kept.put(Parked(berth=berth("a"), what="new", nbytes=1, build_s=1.0))
    assert gone == ["old"]


def test_trimming_stops_where_it_is_enough(shelf: Callable[..., Shelf[str]], gone: list[str]) -> None:
    kept = shelf(most=9)
    for number, name in enumerate("abc"):
        kept.put(parked(name, since_s=number))
    kept.trim(2 * MIB, "room is needed", 0)
    assert gone == ["a"]
    kept.trim(0, "room is needed", 0)
    assert gone == ["a", "b", "c"]
