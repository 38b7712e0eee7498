"""Text for requests: seeded, like text that people write, and of exactly as many tokens as a trace asks for.

What a prompt shares with others is chosen, never an accident: a prompt is a shared beginning, if one is wanted, and then
text of its own. Fillers of one repeated word would let a prefix cache answer everything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import msgspec

from chimera.parsing.tokenizer import ModelTokenizer
from chimera.trace.mooncake import BLOCK_TOKENS

Encode = Callable[[str], Sequence[int]]
"""The tokens of a text as a server counts them: with what the tokenizer puts before it."""


def _listed(words: str) -> tuple[str, ...]:
    return tuple(" " + word for word in words.split())


_NOUNS = _listed("""river market engine teacher winter garden letter bridge kitchen window station doctor village paper summer
forest music island planet harbor ticket farmer coffee pencil museum ladder valley sister captain basket thunder camera meadow
painter library mirror blanket corner morning evening question answer journey neighbor mountain season language picture
country machine project office student company history problem system number member result report reason moment""")
_VERBS = _listed("""carries watches builds remembers follows repairs paints finds opens reaches studies brings measures answers
leaves crosses collects describes moves keeps explains prepares visits changes counts discovers protects returns""")
_ADJECTIVES = _listed("""quiet early golden narrow gentle distant careful bright heavy simple hidden modern ancient friendly
patient curious northern broken silver common sudden warm empty famous honest steady wooden clever local entire""")
_LINKS = _listed("""while because although before after until when where since whenever""")
_PLACES = _listed("""near behind beside above below beyond inside around across toward""")
_OPENINGS = _listed("""Please Today Yesterday Perhaps Usually Meanwhile Finally Often Once Nearby Indeed Later Suppose Imagine
Consider Describe Explain Summarize Compare Remember Notice""")
_FILLERS = _listed("the of and to in is it")
_MARKS = (".", ",", ";", "!")
"""One token in nearly every vocabulary, also in one that knows none of these words."""
_MOST_TRIES = 24


class Sharing(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a prompt others begin with too."""

    share: float = 0.0
    """Of its tokens."""
    prefixes: int = 8
    """Different beginnings there are, of each model."""


NOTHING_SHARED = Sharing()


class Writer:
    """Writes the prompts of one model."""

    def __init__(self, model: str, encode: Encode | None, seed: int, sharing: Sharing = NOTHING_SHARED) -> None:
        self._model = model
        self._encode = encode
        self._seed = seed
        self._sharing = sharing
        self._costs: dict[str, int] = {}
        self._short: list[str] = []
        self._begun = len(encode("")) if encode is not None else 0
        self._prefixes: dict[str, str] = {}

    @classmethod
    def of(cls, model: str, tokenizer: ModelTokenizer | None, seed: int, sharing: Sharing = NOTHING_SHARED) -> Writer:
        return cls(model, None if tokenizer is None else tokenizer.encode, seed, sharing)

    def write(self, number: int, tokens: int, blocks: Sequence[int] = ()) -> str:
        """The prompt of the request with this number; the same for the same seed."""
        dice = random.Random(f"{self._seed}/{self._model}/{number}")
        prefix = self._beginning(tokens, blocks, dice)
        return self._exact(prefix, tokens, dice)

    def _beginning(self, tokens: int, blocks: Sequence[int], dice: random.Random) -> str:
        """Whole blocks where the trace knows them; else a part of one of a few long texts."""
        if blocks:
            known = blocks[: max(0, tokens - 1) // BLOCK_TOKENS]
            return "".join(self._prefix(f"block/{block}", BLOCK_TOKENS) for block in known)
        shared = round(self._sharing.share * tokens) - self._begun
        if shared < 1:
            return ""
        return self._prefix(f"prefix/{dice.randrange(self._sharing.prefixes)}/{shared}", shared)

    def _prefix(self, name: str, tokens: int) -> str:
        """Text that several prompts begin with. Two lengths of it are equal but for the last few words of the shorter."""
        if name not in self._prefixes:
            stem = name.rpartition("/")[0] if name.startswith("prefix/") else name
            self._prefixes[name] = self._text(random.Random(f"{self._seed}/{self._model}/{stem}"), tokens)
        return self._prefixes[name]

    def _exact(self, prefix: str, tokens: int, dice: random.Random) -> str:
        left = tokens - self._begun - self._count(prefix)
        text = prefix + self._text(dice, max(0, left))
        return text if self._encode is None else self._corrected(text, tokens, dice)

    def _text(self, dice: random.Random, tokens: int) -> str:
        words: list[str] = []
        passed_over = 0
        stream = _words(dice)
        while tokens > 0 and passed_over < _MOST_TRIES:
            word = next(stream)
            cost = self._cost(word)
            if cost > tokens:
                passed_over += 1
                continue
            words.append(word)
            tokens -= cost
        return "".join(words) + self._fill(tokens, dice)

    def _corrected(self, text: str, tokens: int, dice: random.Random) -> str:
        """Words cost what they cost alone in nearly every tokenizer; the rest is put right here."""
        assert self._encode is not None
        for _ in range(_MOST_TRIES):
            surplus = len(self._encode(text)) - tokens
            if surplus == 0:
                return text
            if surplus < 0:
                text += self._fill(-surplus, dice)
            else:
                shorter = text.rpartition(" ")[0]
                if not shorter:
                    return text  # the model's tokenizer puts more before a text than was asked for
                text = shorter
        return text

    def _fill(self, tokens: int, dice: random.Random) -> str:
        """Words of one token."""
        if tokens <= 0:
            return ""
        if not self._short:
            words = [word for word in (*_LINKS, *_NOUNS, *_FILLERS) if self._cost(word) == 1]
            self._short = words or [mark for mark in _MARKS if self._cost(mark) == 1] or [" a"]
        return "".join(dice.choices(self._short, k=tokens))

    def _count(self, text: str) -> int:
        if self._encode is None:
            return text.count(" ")
        return len(self._encode(text)) - self._begun if text else 0

    def _cost(self, word: str) -> int:
        cost = self._costs.get(word)
        if cost is None:
            # Beside a word that is always the same, since some tokenizers treat the first word of a text as no other.
            cost = self._costs[word] = self._count(" a" + word) - self._count(" a") if self._encode is not None else 1
        return cost


def _words(dice: random.Random) -> Iterator[str]:
    """Sentences without end, word by word, each with the space before it."""
    while True:
        yield dice.choice(_OPENINGS)
        for _ in range(dice.randint(1, 3)):
            yield from (" the", dice.choice(_ADJECTIVES), dice.choice(_NOUNS), dice.choice(_VERBS))
            yield from (" the", dice.choice(_NOUNS), dice.choice(_PLACES), " the", dice.choice(_NOUNS))
            if dice.random() < 0.4:
                yield dice.choice(_LINKS)
        yield "."
