"""Gathers faults while a document is read to its end, and knows which of its places are already spoilt."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

from chimera.errors import ConfigError, Fault

_PLAIN_KEY = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*")
_LONGEST_SHOWN = 64


def at_key(where: str, key: str) -> str:
    if not _PLAIN_KEY.fullmatch(key):
        return f"{where}[{json.dumps(shortened(key))}]"
    return f"{where}.{key}" if where else key


def at_index(where: str, index: int) -> str:
    return f"{where}[{index}]"


def shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint, if one of the known words looks like this one."""
    close = difflib.get_close_matches(word[:_LONGEST_SHOWN], list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


class Faults:
    """Of one source. A document with more than `MOST` is not worth reading to its end."""

    MOST = 100

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: list[Fault] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, where: str, what: str, hint: str = "") -> None:
        if len(self._found) == self.MOST:
            raise ConfigError(
                self._source, [*self.error().faults, Fault("", f"more than {self.MOST} faults; no more are shown")]
            )
        self._found.append(Fault(where, what, hint))

    def adopt(self, where: str, error: ConfigError) -> None:
        """What a part says of itself, at the place where the document names that part."""
        for fault in error.faults:
            self.add(where, str(Fault(fault.where, fault.what)), fault.hint)

    def spoil(self, where: str) -> bool:
        """Whether this place, a part of it or what it is part of is faulty: then no rule should be built on it."""
        return any(_covers(where, fault.where) or (fault.where and _covers(fault.where, where)) for fault in self._found)

    def error(self) -> ConfigError:
        """In the order of the models in the document, whoever found them."""
        return ConfigError(self._source, sorted(self._found, key=_model_number))

    def require_none(self) -> None:
        if self._found:
            raise self.error()


def _model_number(fault: Fault) -> int:
    match = re.match(r"(?:models)?\[(\d+)\]", fault.where)
    return int(match[1]) if match else -1


def _covers(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith((f"{outer}.", f"{outer}["))
