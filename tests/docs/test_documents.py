"""Every link and path in the documents leads somewhere, and every `chimera …` in them is a command that exists."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chimera.cli import examples
from chimera.cli.main import VERBS, make_parser

from tests.docs.documents import ROOT, anchors, commands, documents, flags_of, inline, links, name_of, shell_lines

DOCUMENTS = documents()
EVERY = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
_PATH = re.compile(r"^[\w.-]+(/[\w.-]+)+/?$")
_PLACES = (ROOT, ROOT / "python" / "chimera")
_TOP = {path.name for place in _PLACES for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")}
_KINDS = (".py", ".md", ".json", ".sh", ".txt", ".yaml", ".yml", ".toml", ".png", ".svg", ".service")


@functools.cache
def helps() -> dict[str, str]:
    """What `chimera VERB --help` says on a terminal of 80 columns, the verbs of a verb included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return {words: parser.format_help() for words, parser in _parsers(make_parser(), "")}


def _parsers(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, below in action.choices.items():
                yield f"{words} {verb}".strip(), below
                yield from _parsers(below, f"{words} {verb}".strip())


@EVERY
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in links(document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target.read_text()), f"{path or 'this page'} has no heading {anchor}"


@EVERY
def test_every_path_in_code_marks_exists(document: Path) -> None:
    for word in inline(document.read_text()):
        if _is_ours(word):
            assert any((place / word).exists() for place in (*_PLACES, document.parent)), f"there is no {word}"


@EVERY
def test_every_file_that_a_command_reads_exists(document: Path) -> None:
    for command in shell_lines(document.read_text()):
        for word in command:
            if _PATH.match(word) and (word.endswith((".py", ".sh")) or word.startswith(("deploy/", "model_configs/"))):
                assert any((place / word).exists() for place in _PLACES), f"there is no {word}: {' '.join(command)}"


@EVERY
def test_every_chimera_command_parses(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in shell_lines(document.read_text()):
        _parse(command, capsys)


@EVERY
def test_every_chimera_command_in_a_sentence_has_a_verb_and_flags_that_exist(document: Path) -> None:
    for text in inline(document.read_text()):
        words = text.split()
        if words[0].removeprefix(".venv/bin/") == "chimera" and len(words) > 1 and words[1].islower():
            assert words[1] in VERBS, f"there is no verb {words[1]}: {text}"
            known = flags_of(make_parser({words[1]}))
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= known.keys(), f"chimera {words[1]} has no {flags - known.keys()}: {text}"
            for flag, value in itertools.pairwise(words):
                choices = known[flag].choices if flag in known else None
                assert choices is None or value in choices, f"{flag} has no {value}: {text}"


@pytest.mark.parametrize("verb", helps())
def test_the_examples_of_a_verbs_help_parse_and_are_of_that_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = re.sub(r"\\\n\s*", "", examples.of(verb) or examples.of(verb.partition(" ")[0]) or "")
    # What explains a line stands two spaces and more behind it.
    shown = [line.strip().partition("  ")[0] for line in told.splitlines() if "chimera" in line]
    assert any(line.startswith(f"chimera {verb}") for line in shown)
    for line in shown:
        assert any(_parse(command, capsys) for command in commands(line)), line


@pytest.mark.parametrize("verb", helps())
def test_a_verbs_help_fits_a_terminal_and_says_each_default_once_and_in_words(verb: str) -> None:
    for line in helps()[verb].splitlines():
        assert len(line) <= 80, line
        assert not re.search(r"default: (None|\[|False|True|inf)|default \S+\)|default: [^)]*\) \(default", line), line
    assert len(helps()[verb].split("\n\n")) > 3, "a usage, a purpose, options and examples"


def test_the_first_steps_of_the_help_parse(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip().partition("  ")[0] for line in examples.FIRST_STEPS.splitlines() if line.startswith("  ")]
    assert [_parse(command, capsys) for line in lines for command in commands(line)] == ["doctor", "models", "serve", "chat"]


def test_a_broken_link_and_an_unknown_flag_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = "See [that](nowhere.md).\n```\nchimera serve x.json --no-such-flag  # told\n```\n"
    assert links(text) == ["nowhere.md"]
    [command] = shell_lines(text)
    with pytest.raises(AssertionError, match="--no-such-flag"):
        _parse(command, capsys)


def _parse(command: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The verb of a `chimera …`; `None` for every other program."""
    while command and "=" in command[0]:
        command = command[1:]
    if not command or command[0].removeprefix(".venv/bin/") != "chimera" or command[1:] == ["--version"]:
        return None
    try:
        arguments = make_parser(set(command[1:2])).parse_args(command[1:])
    except SystemExit as end:
        assert end.code == 0, f"{' '.join(command)}: {capsys.readouterr().err}"
        return command[1]
    verb: str = arguments.verb
    return verb


def _is_ours(word: str) -> bool:
    return bool(_PATH.match(word)) and word.partition("/")[0] in _TOP and word.endswith((*_KINDS, "/"))
