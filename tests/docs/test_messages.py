"""The messages that install.md explains are messages that somebody can really get."""

from __future__ import annotations

import re

import pytest

from tests.docs.documents import ROOT

_TABLE = (ROOT / "install.md").read_text().partition("## Troubleshooting")[2]
MESSAGES = re.findall(r"^\| `([^`]+)` \|", _TABLE, re.MULTILINE)


@pytest.fixture(scope="module")
def sources() -> str:
    """All text that may be said, without the breaks that a long line needs."""
    files = [*(ROOT / "python").rglob("*.py"), ROOT / "Makefile"]
    return re.sub(r'"\s+f?"', "", "\n".join(path.read_text() for path in files))


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 8


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_one_that_is_said(message: str, sources: str) -> None:
    for part in re.split(r"…|: Address already in use", message):
        assert part.strip() in sources, f"nobody says {part.strip()!r}"
