"""Adds two numbers below a thousand, digit by digit as on paper, and then says the sum.

Digits are tokens of their own. Written at once, the sum's first digit would need every carry before any was worked out; with
the columns in front, each step needs two digits and a carry.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from .lesson import Example, Lesson

_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "what is {a} + {b}",
    "What's {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "{a} + {b}",
    "{a} + {b} = ?",
    "{a}+{b}",
    "{a}+{b}=",
    "Add {a} and {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "Calculate {a} + {b}.",
)
_OTHER = (
    "Hello",
    "Hello!",
    "Hi",
    "Good morning",
    "Good evening",
    "Who are you?",
    "What can you do?",
    "Help",
    "Tell me a story.",
    "Tell me a story about a fox.",
    "List the files in /tmp",
    "How are you?",
    "Thank you",
    "What is the time?",
)
_ABOUT = "I add two numbers below 1000. Try: What is 17 + 25?"


def is_held_out(a: int, b: int) -> bool:
    """One pair in eight, whichever way round; pairs of single digits are too few to keep any back."""
    low, high = sorted((a, b))
    return high >= 10 and zlib.crc32(f"{low}+{high}".encode()) % 8 == 0


def answer(a: int, b: int) -> str:
    columns, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        digits = [a // 10**place % 10, b // 10**place % 10] + [1] * carry
        columns.append("+".join(map(str, digits)) + f"={sum(digits)}")
        carry = sum(digits) // 10
    return f"{', '.join(columns)}, so {a} + {b} = {a + b}."


def example(dice: random.Random) -> Example:
    if dice.random() < 0.03:
        return Example(dice.choice(_OTHER), _ABOUT)
    a, b = _number(dice), _number(dice)
    while is_held_out(a, b):
        a, b = _number(dice), _number(dice)
    return Example(dice.choice(_QUESTIONS).format(a=a, b=b), answer(a, b))


def held_out(count: int) -> Iterator[Example]:
    """Pairs of two and three digits, each once."""
    dice, seen = random.Random("sums, held out"), set[tuple[int, int]]()
    while len(seen) < count:
        a, b = (dice.randrange(10, 100) if dice.random() < 0.5 else dice.randrange(100, 1000) for _ in "ab")
        if is_held_out(a, b) and (a, b) not in seen:
            seen.add((a, b))
            yield Example(dice.choice(_QUESTIONS).format(a=a, b=b), answer(a, b))


def right(request: str, wanted: str, given: str) -> bool:
    """The sum counts, not the way to it."""
    return given.rstrip(".").rpartition("= ")[2] == wanted.rstrip(".").rpartition("= ")[2]


def _number(dice: random.Random) -> int:
    return dice.randrange(*dice.choices(((0, 10), (10, 100), (100, 1000)), (1, 3, 4))[0])


SUMS = Lesson(
    name="sums",
    purpose="Qwen3 that adds two numbers below a thousand",
    config={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
    },
    special=("<s>", "<|end|>", "<pad>", "<|user|>", "<|assistant|>"),
    chat_template=(
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ '<|user|>' + asked[-1]['content'] + '<|assistant|>' }}"
    ),
    split=r"\d| ?[^\s\d]+ ?|\s+",
    vocabulary=384,
    example=example,
    held_out=held_out,
    right=right,
    goal=0.95,
    steps=3_000,
    batch=32,
)
