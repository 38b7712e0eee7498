"""The models that are shipped answer as well as their cards say, to transformers and to the server alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tiny_models.evaluate import HERE, answer, evaluate
from examples.tiny_models.lessons import LESSONS, Lesson

EVERY = pytest.mark.parametrize("lesson", LESSONS.values(), ids=LESSONS)
LARGEST_BYTES = 8 << 20


@EVERY
def test_a_models_folder_is_the_one_that_its_lesson_would_write(lesson: Lesson, tmp_path: Path) -> None:
    lesson.tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert (HERE / lesson.name / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    assert (HERE / lesson.name / "model.safetensors").stat().st_size <= LARGEST_BYTES


@pytest.mark.slow
@EVERY
def test_a_model_reaches_its_goal_on_what_it_was_not_trained_on(lesson: Lesson) -> None:
    score = evaluate(lesson, HERE / lesson.name, cases=128)
    assert score.share >= lesson.goal, score.wrong


@pytest.mark.slow
@EVERY
def test_a_model_says_what_it_is_for_when_it_is_greeted(lesson: Lesson) -> None:
    [given] = answer(HERE / lesson.name, ["Hello"])
    assert "Try: " in given
