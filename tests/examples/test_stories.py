"""Which stories are in the language."""

from __future__ import annotations

import pytest

from examples.tiny_models.lessons import stories

STORY = (
    "Once there was a shy fox called Mia. More than anything, she wished to sing. She tried and tried on the hill,"
    ' and it went wrong every time. Then she met a wise owl named Otto. "It only takes patience," said Otto,'
    " and before long she could sing. Mia and Otto danced for joy until the moon rose."
)


def test_a_story_is_in_the_language() -> None:
    assert stories.right("Tell me a story about a fox.", "", STORY)
    assert stories.right("Write a story about a fox who wants to sing.", "", STORY)


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        ("before long she", "before long he"),
        ("Mia and Otto danced", "Mia and Pip danced"),
        ("said Otto", "said Pip"),
        ("could sing", "could swim"),
        ("a wise owl", "a wise goldfish"),
        (" Then she met a wise owl named Otto.", ""),
        ("the moon rose.", "the moon rose. The end."),
    ],
)
def test_a_story_that_forgets_what_it_said_is_not(was: str, is_now: str) -> None:
    assert was in STORY
    assert not stories.right("Tell me a story about a fox.", "", STORY.replace(was, is_now))


def test_a_story_about_somebody_else_is_not_what_was_asked_for() -> None:
    assert not stories.right("Tell me a story about a bear.", "", STORY)
