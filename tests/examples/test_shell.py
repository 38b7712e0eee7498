"""How commands are judged."""

from __future__ import annotations

from examples.tiny_models.lessons import shell


def test_a_command_is_right_to_the_letter() -> None:
    assert not shell.right("", "rm notes.txt", "rm notes.txt -f")
