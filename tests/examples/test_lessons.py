"""What the small models learn from: nothing that is asked later, and judges that tell right from wrong."""

from __future__ import annotations

import random
from itertools import islice, pairwise

import pytest
from chimera.parsing.chat_template import ChatTemplate

from examples.tiny_models.lessons import LESSONS, Lesson

EVERY = pytest.mark.parametrize("lesson", LESSONS.values(), ids=LESSONS)


@EVERY
def test_what_is_held_out_is_never_trained_on(lesson: Lesson) -> None:
    dice = random.Random(1)
    trained = {example.request for example in (lesson.example(dice) for _ in range(20_000))}
    assert trained & {example.request for example in lesson.held_out(500)} == set()


@EVERY
def test_a_lessons_own_answers_are_right_and_those_to_other_requests_are_not(lesson: Lesson) -> None:
    cases = list(lesson.held_out(100))
    assert all(lesson.right(case.request, case.answer, case.answer) for case in cases)
    others = [lesson.right(one.request, one.answer, two.answer) for one, two in pairwise(cases)]
    assert sum(others) < 0.1 * len(others)


@EVERY
def test_the_same_seed_teaches_the_same(lesson: Lesson) -> None:
    first, second = (random.Random("seed") for _ in range(2))
    assert [lesson.example(first) for _ in range(50)] == [lesson.example(second) for _ in range(50)]


@EVERY
def test_the_server_writes_a_chat_as_training_did(lesson: Lesson) -> None:
    template = ChatTemplate(lesson.chat_template, {"bos_token": lesson.special[0]}, path="here")
    request = next(islice(lesson.held_out(1), 1)).request
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    assert template.render([*before, {"role": "user", "content": request}]) == lesson.prompt(request)
