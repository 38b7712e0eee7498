from collections.abc import Sequence

from chimera.parsing.detokenizer import Detokenizer
from chimera.parsing.tokenizer import ModelTokenizer
from hypothesis import given
from hypothesis import strategies as st

from tests.parsing.vocabularies import byte_level, sentencepiece_like

BYTES = byte_level()
PIECES = sentencepiece_like()
BYTE_MODEL = ModelTokenizer(BYTES)
PIECE_MODEL = ModelTokenizer(PIECES)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("the你好🦊é "), max_size=40)


def one_by_one(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.feed([i]) for i in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, BYTES.get_vocab_size() + 3), max_size=60))
def test_byte_level_pieces_add_up_to_the_whole_whatever_the_model_says(ids: list[int]) -> None:
    assert "".join(one_by_one(BYTE_MODEL.detokenizer([]), ids)) == BYTES.decode(ids)


@given(TEXT, st.data())
def test_byte_level_text_survives_any_cut(text: str, data: st.DataObject) -> None:
    ids = BYTES.encode(text, add_special_tokens=False).ids
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = BYTE_MODEL.detokenizer([])
    assert detokenizer.feed(ids[:cut]) + detokenizer.feed(ids[cut:]) + detokenizer.flush() == text


@given(TEXT.filter(lambda text: "�" not in text and "▁" not in text))
def test_sentencepiece_pieces_add_up_to_the_whole(text: str) -> None:
    prompt = PIECES.encode("the", add_special_tokens=False).ids
    answer = PIECES.encode(text, add_special_tokens=False).ids
    shown = "".join(one_by_one(PIECE_MODEL.detokenizer(prompt), answer))
    assert "the" + shown == PIECES.decode(prompt + answer)


def test_a_character_of_many_tokens_is_shown_once_it_is_whole() -> None:
    ids = BYTES.encode("🦊!", add_special_tokens=False).ids
    assert one_by_one(BYTE_MODEL.detokenizer([]), ids) == ["", "", "", "🦊", "!", ""]
    byte_tokens = [PIECES.token_to_id(f"<0x{b:02X}>") for b in "🦊".encode()]
    assert one_by_one(PIECE_MODEL.detokenizer([]), byte_tokens) == ["", "", "", "🦊", ""]


def test_the_first_token_keeps_its_space_after_the_prompt() -> None:
    the = PIECES.token_to_id("▁the")
    assert PIECE_MODEL.detokenizer([the]).feed([the]) == " the"


def test_special_tokens_are_not_shown() -> None:
    assert BYTE_MODEL.detokenizer([]).feed([0, BYTES.token_to_id("the"), 1]) == "the"
    assert one_by_one(PIECE_MODEL.detokenizer([]), [1, PIECES.token_to_id("a"), 2])[:2] == ["", "a"]


def test_an_added_token_that_is_not_special_is_shown_as_it_is_written() -> None:
    assert BYTE_MODEL.detokenizer([]).feed([BYTES.token_to_id("<tool call>")]) == "<tool call>"


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    orphan = PIECES.token_to_id("<0x80>")
    pieces = one_by_one(PIECE_MODEL.detokenizer([]), [orphan] * 200)
    longest_silence = max(len(run) for run in "".join("." if p else " " for p in pieces).split("."))
    assert longest_silence <= 16
    assert set("".join(pieces)) == {"�"}


def test_an_answer_cut_within_a_character_ends_in_one_broken_one() -> None:
    ids = BYTES.encode("a🦊", add_special_tokens=False).ids[:-1]
    assert one_by_one(BYTE_MODEL.detokenizer([]), ids) == ["a", "", "", "", "�"]
