"""The three lessons. Each file holds one: what is asked, what is answered, and how an answer is judged."""

from .lesson import Example, Lesson
from .shell import SHELL
from .stories import STORIES
from .sums import SUMS

__all__ = ["LESSONS", "Example", "Lesson"]

LESSONS = {lesson.name: lesson for lesson in (STORIES, SUMS, SHELL)}
