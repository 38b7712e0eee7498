from chimera.parsing.stops import StopStrings
from hypothesis import given
from hypothesis import strategies as st

LETTERS = st.text("ab", max_size=24)


def shown(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    watch = StopStrings(stops)
    text = "".join([watch.feed(piece) for piece in pieces]) + watch.flush()
    return text, watch.matched


def test_text_without_a_stop_string_passes_whole() -> None:
    assert shown(("END",), ["one", "two"]) == ("onetwo", None)


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    watch = StopStrings(("END",))
    assert [watch.feed(piece) for piece in ["say E", "N", "D more"]] == ["say ", "", ""]
    assert watch.matched == "END"


def test_what_only_began_like_a_stop_string_is_shown_as_soon_as_that_is_known() -> None:
    watch = StopStrings(("END",))
    assert [watch.feed(piece) for piece in ["E", "N", "e"]] == ["", "", "ENe"]


def test_text_held_back_is_shown_when_the_answer_ends() -> None:
    assert shown(("END",), ["the EN"]) == ("the EN", None)


def test_the_stop_string_complete_first_wins() -> None:
    assert shown(("abc", "b"), ["abc"]) == ("a", "b")
    assert shown(("abc", "b"), ["a", "b", "c"]) == ("a", "b")


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    assert shown(("aab",), ["aa", "ab"]) == ("a", "aab")


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(LETTERS, max_size=6))
def test_how_the_text_is_cut_makes_no_difference(stops: list[str], pieces: list[str]) -> None:
    assert shown(tuple(stops), pieces) == shown(tuple(stops), ["".join(pieces)]) == shown(tuple(stops), [*"".join(pieces)])
