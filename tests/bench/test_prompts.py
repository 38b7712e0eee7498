"""Prompts: exact in tokens, alike for a seed, and shared only where it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import pytest
from chimera.bench.prompts import Sharing, Writer
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.tiny import vocabulary
from chimera.trace.mooncake import BLOCK_TOKENS

SIZES = (1, 2, 3, 5, 8, 21, 52, 128, 700)


@pytest.fixture(scope="module", params=["english", "other"])
def tokenizer(request: pytest.FixtureRequest) -> ModelTokenizer:
    return ModelTokenizer(vocabulary.train(request.param, 1024, seed=0))


def test_a_prompt_has_exactly_the_tokens_that_were_asked_for(tokenizer: ModelTokenizer) -> None:
    writer = Writer.of("m", tokenizer, 42)
    for number, tokens in enumerate(SIZES * 4):
        assert len(tokenizer.encode(writer.write(number, tokens))) == tokens


def test_prompts_are_the_same_for_a_seed_and_differ_from_each_other(tokenizer: ModelTokenizer) -> None:
    texts = [Writer.of("m", tokenizer, 1).write(number, 60) for number in range(50)]
    assert texts == [Writer.of("m", tokenizer, 1).write(number, 60) for number in range(50)]
    assert texts[0] != Writer.of("m", tokenizer, 2).write(0, 60)
    assert len(set(texts)) == 50


def shared(tokenizer: ModelTokenizer, texts: Sequence[str]) -> int:
    columns = zip(*(tokenizer.encode(text) for text in texts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def test_nothing_is_shared_by_accident(tokenizer: ModelTokenizer) -> None:
    writer = Writer.of("m", tokenizer, 42)
    texts = [writer.write(number, 400) for number in range(40)]
    most = max(shared(tokenizer, [a, b]) for a in texts[:20] for b in texts[20:])
    assert most <= 24  # an opening word and what goes with it


def test_as_much_is_shared_as_was_asked_for(tokenizer: ModelTokenizer) -> None:
    writer = Writer.of("m", tokenizer, 42, Sharing(share=0.5, prefixes=1))
    texts = [writer.write(number, 400) for number in range(10)]
    assert all(len(tokenizer.encode(text)) == 400 for text in texts)
    assert 180 <= shared(tokenizer, texts) <= 220
    several = Writer.of("m", tokenizer, 42, Sharing(share=0.5, prefixes=3))
    begun = {tuple(tokenizer.encode(several.write(number, 400))[:150]) for number in range(40)}
    assert len(begun) == 3


def test_equal_blocks_of_a_trace_are_equal_text(tokenizer: ModelTokenizer) -> None:
    writer = Writer.of("m", tokenizer, 42)
    first, second = writer.write(0, 3 * BLOCK_TOKENS, (7, 8, 1)), writer.write(1, 3 * BLOCK_TOKENS, (7, 8, 2))
    assert len(tokenizer.encode(first)) == len(tokenizer.encode(second)) == 3 * BLOCK_TOKENS
    assert 2 * BLOCK_TOKENS - 2 <= shared(tokenizer, [first, second]) <= 2 * BLOCK_TOKENS + 24


def test_without_a_tokenizer_words_are_taken_for_tokens() -> None:
    assert 18 <= Writer.of("m", None, 42).write(0, 20).count(" ") <= 20
