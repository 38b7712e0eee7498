"""Turns an answer's tokens into text as they come: never half a character, and every character as soon as it is whole.

Two ways to the same text. A byte-level vocabulary knows every token's bytes, so a UTF-8 decoder that remembers an unfinished
character is exact and quick. Any other (sentencepiece's spaces and byte tokens, word pieces) says what a token looks like
only beside its neighbours, so a window of the newest tokens is decoded twice and the difference is the news.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_TAIL = 5
"""Tokens of the prompt that show how the first token of the answer is joined to it (a leading space, mostly)."""
_PATIENCE = 16
"""Tokens that may wait for the rest of a character; no character is that long, so what waits longer is no character."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """The text of one answer, piece by piece."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """What is left when no more tokens come: at most one broken character."""


class TokenBytes(dict[int, bytes]):
    """The bytes of every token of a byte-level vocabulary, filled in as they are met. Special ones have none, unless wanted."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = set() if special else {i for i, token in added if token.special}

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            spelled = b""
        elif all(letter in _BYTE_OF for letter in token):
            spelled = bytes(_BYTE_OF[letter] for letter in token)
        else:  # an added token stands for itself
            spelled = token.encode()
        self[token_id] = spelled
        return spelled


class ByteDetokenizer:
    """For byte-level vocabularies."""

    __slots__ = ("_spell", "_unfinished")

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._spell = token_bytes.__getitem__
        self._unfinished = b""
        """The beginning of a character."""

    def feed(self, token_ids: Sequence[int]) -> str:
        spelled = self._unfinished + b"".join(map(self._spell, token_ids))
        text, used = codecs.utf_8_decode(spelled, "replace", False)
        self._unfinished = spelled[used:]
        return text

    def flush(self) -> str:
        text, _ = codecs.utf_8_decode(self._unfinished, "replace", True)
        self._unfinished = b""
        return text


class WindowDetokenizer:
    """For every other vocabulary.

    `_ids[:_read]` has been shown; `_ids[_read:]` waits for the rest of its last character.
    """

    __slots__ = ("_hides_special", "_ids", "_read", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hides_special = not special
        self._ids = list(prompt_ids[-_TAIL:])
        self._read = len(self._ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for token_id in token_ids:
            self._ids.append(token_id)
            waiting = len(self._ids) - self._read
            news = self._news()
            if (news and not news.endswith(_BROKEN)) or waiting > _PATIENCE:
                self._ids = self._ids[self._read :]
                self._read = len(self._ids)
                pieces.append(news)
        return "".join(pieces)

    def flush(self) -> str:
        news = self._news()
        self._read = len(self._ids)
        return news

    def _news(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=self._hides_special)
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=self._hides_special)[len(shown) :])


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable Latin-1 as itself, the others moved up to where nothing else is."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = sorted(set(range(0x100)) - printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(moved)}


_BYTE_OF = _byte_alphabet()
