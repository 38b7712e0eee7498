"""What one small model is to learn: its data, how an answer is judged, and the shape it has. Knows no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Template
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers


@dataclass(frozen=True, slots=True)
class Example:
    request: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    name: str
    purpose: str
    config: dict[str, Any]
    """What its `config.json` says beyond what all three have in common."""
    special: tuple[str, ...]
    """In the order of their ids: the begin, the end of an answer, the padding, and what the template needs."""
    chat_template: str
    """Writes the last request alone: every question stands by itself, so a long chat does not lead a small model astray."""
    split: str
    """The regular expression that cuts text before byte pairs are merged."""
    vocabulary: int
    example: Callable[[random.Random], Example]
    """One to train on; never one that is held out."""
    held_out: Callable[[int], Iterator[Example]]
    """So many that training never saw."""
    right: Callable[[str, str, str], bool]
    """Whether an answer will do: the request, the example's answer, the model's answer."""
    goal: float
    """The share of held-out cases that have to be right."""
    steps: int
    batch: int
    temperature: float = 0.0
    """How it is sampled when it is judged, and by default when it is served."""

    @property
    def sampling(self) -> str:
        return f"sampled at temperature {self.temperature:g}" if self.temperature else "greedy"

    def prompt(self, request: str) -> str:
        messages = [{"role": "user", "content": request}]
        return _template(self.chat_template).render(messages=messages, bos_token=self.special[0])

    def tokenizer(self) -> Tokenizer:
        """Byte pairs merged as often as `vocabulary` has room, learnt from the lesson's own text."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            special_tokens=list(self.special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        dice = random.Random(self.name)
        examples = (self.example(dice) for _ in range(5_000))
        tokenizer.train_from_iterator((f"{e.request}\n{e.answer}" for e in examples), trainer)
        return tokenizer


@cache
def _template(source: str) -> Template:
    return Template(source)
