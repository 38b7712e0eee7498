"""What the documents say: their links, their paths and their command lines."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+)`")
SHELL = {"", "sh", "bash"}
"""The languages of a block that is typed."""
_ENDS = {"|", ">", ">>", "&", "&&", ";", "2>&1"}


def documents() -> list[Path]:
    """Every Markdown file that is under version control, or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(path for name in listed.split("\0") if name and (path := ROOT / name).exists())


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def links(text: str) -> list[str]:
    return [target for target in _LINK.findall(_FENCE.sub("", text)) if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline(text: str) -> list[str]:
    return _INLINE.findall(_FENCE.sub("", text))


def fences(text: str) -> list[tuple[str, str]]:
    """Each fenced block, with the language that it names."""
    found: list[tuple[str, str]] = _FENCE.findall(text)
    return found


def shell_lines(text: str) -> Iterator[list[str]]:
    """The words of each command line in a fenced block, without its comment; what is piped or joined is several."""
    for language, block in fences(text):
        if language in SHELL:
            yield from commands(block)


def commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # the middle of a quoted text, or no command at all
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in _ENDS:
                yield from [command] * bool(command)
                command = []
            else:
                command.append(word)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Its own, and those of its verbs."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        found |= dict.fromkeys(action.option_strings, action)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= flags_of(below)
    return found
