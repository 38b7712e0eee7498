"""Reads a JSON or YAML file into plain values, within bounds, and fills in `${env.NAME}`. Knows no schema.

YAML is read by its 1.2 core rules, so `on` is a key and `no` is a name; an alias costs what it stands for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from chimera.config.faults import Faults, at_index, at_key, shortened
from chimera.errors import ConfigError
from chimera.units import MIB, format_bytes

SUFFIXES = (".json", ".yaml", ".yml")
LARGEST_FILE_BYTES = 1 * MIB
DEEPEST = 32
MOST_VALUES = 100_000
_ENVIRONMENT = re.compile(r"\$\{env\.([^}]*)\}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_document(path: Path, environment: Mapping[str, str], faults: Faults) -> Any:
    """The file's contents. What can be passed over becomes a fault; a file that cannot be parsed is a ConfigError."""
    if path.suffix not in SUFFIXES:
        raise ConfigError.single(str(path), f"the name does not end in one of {', '.join(SUFFIXES)}")
    text = _text(path)
    parse = _parse_json if path.suffix == ".json" else _parse_yaml
    value = parse(path, text, faults)
    return _Filling(environment, faults).fill(value, "", 0)


def read_lines(path: Path, environment: Mapping[str, str], faults: Faults) -> list[Any]:
    """The same for a file of JSON that has a value in each line."""
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n")) if line.strip()]
    return [_Filling(environment, faults).fill(_parse_json(path, line, faults, above=number), "", 0) for number, line in lines]


def _text(path: Path) -> str:
    source = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE_BYTES + 1)
    except (OSError, ValueError) as reason:
        detail = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise ConfigError.single(source, f"cannot be read: {detail}") from None
    if len(raw) > LARGEST_FILE_BYTES:
        raise ConfigError.single(source, f"is larger than {format_bytes(LARGEST_FILE_BYTES)}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise ConfigError.single(source, f"is not UTF-8 text: byte {reason.start} is {raw[reason.start]:#04x}") from None


def _parse_json(path: Path, text: str, faults: Faults, *, above: int = 0) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                faults.add("", f"key {shortened(key)!r} is written twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as reason:
        where = f"line {above + reason.lineno}, column {reason.colno}"
        raise ConfigError.single(str(path), f"is not JSON: {reason.msg}", where=where) from None
    except ValueError as reason:  # a number of thousands of digits
        raise ConfigError.single(str(path), f"is not JSON: {reason}") from None
    except RecursionError:
        raise ConfigError.single(str(path), f"is nested deeper than {DEEPEST}") from None


def _parse_yaml(path: Path, text: str, faults: Faults) -> Any:
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as reason:
        mark = reason.problem_mark or reason.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError.single(str(path), f"is not YAML: {reason.problem}", where=where) from None
    except (yaml.YAMLError, ValueError) as reason:
        raise ConfigError.single(str(path), f"is not YAML: {' '.join(str(reason).split())}") from None
    except RecursionError:
        raise ConfigError.single(str(path), f"is nested deeper than {DEEPEST}") from None
    for line, key in loader.repeated:
        faults.add(f"line {line}", f"key {shortened(key)!r} is written twice in one mapping")
    return value


class _Loader(yaml.SafeLoader):
    """YAML's core schema, without tags; aliases are charged with the values they stand for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[tuple[int, str]] = []
        self._values = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            anchor = str(event.anchor)
            if anchor in self.anchors and anchor not in self._sizes:
                raise _refused(event, "an alias stands for what it is part of")
            self._charge(event, self._sizes.get(anchor, 0))
            return super().compose_node(parent, index)
        if event.tag is not None:
            raise _refused(event, f"tag {event.tag!r} is not used here")
        before = self._values
        self._charge(event, 1)
        node = super().compose_node(parent, index)
        if event.anchor is not None:
            self._sizes[event.anchor] = self._values - before
        if isinstance(node, yaml.MappingNode):
            self._note_repeated(node)
        return node

    def _note_repeated(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self.repeated.append((key.start_mark.line + 1, key.value))
                seen.add(key.value)

    def _charge(self, event: Any, values: int) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise _refused(event, f"more than {MOST_VALUES} values")


def _refused(event: Any, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # SafeLoader's own takes 010 for eight


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


class _Filling:
    """Replaces `${env.NAME}` in every text, and refuses what no later reader could hold."""

    def __init__(self, environment: Mapping[str, str], faults: Faults) -> None:
        self._environment = environment
        self._faults = faults

    def fill(self, value: Any, where: str, depth: int) -> Any:
        if depth > DEEPEST:
            self._faults.add(where, f"is nested deeper than {DEEPEST}")
            return None
        match value:
            case str():
                return self._text(value, where)
            case float() if not math.isfinite(value):
                self._faults.add(where, f"{value} is not a number to work with")
            case int() if not -(1 << 63) <= value < 1 << 63:
                self._faults.add(where, "is a number of more than 64 bits")
            case list():
                return [self.fill(item, at_index(where, index), depth + 1) for index, item in enumerate(value)]
            case dict():
                return dict(self._pair(key, item, where, depth) for key, item in value.items())
        return value

    def _pair(self, key: Any, item: Any, where: str, depth: int) -> tuple[str, Any]:
        if not isinstance(key, str):
            self._faults.add(where, f"key {key!r} is not text", "put it in quotes")
            key = str(key)
        self._storable(key, where)
        return key, self.fill(item, at_key(where, key), depth + 1)

    def _text(self, text: str, where: str) -> str:
        def replaced(match: re.Match[str]) -> str:
            name = match[1]
            if not _VARIABLE.fullmatch(name):
                self._faults.add(where, f"{shortened(match[0])!r} names no environment variable")
            elif name not in self._environment:
                self._faults.add(where, f"environment variable {shortened(name)} is not set")
            return self._environment.get(name, "")

        filled = _ENVIRONMENT.sub(replaced, text)
        self._storable(filled, where)
        return filled

    def _storable(self, text: str, where: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._faults.add(where, f"{shortened(text)!r} is not valid Unicode")
        if "\0" in text:
            self._faults.add(where, f"{shortened(text)!r} holds a zero byte")
