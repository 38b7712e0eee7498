"""The folders that models may come from when a request names them: no path in it leads anywhere else.

A placement file is the operator's own and may name any folder; what comes over HTTP may not, whoever's key came with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from chimera.config.faults import Faults, shortened
from chimera.config.placement_file import ModelEntry


class Roots:
    """`folders`, one at least; names are relative to the first."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))

    @property
    def base(self) -> Path:
        return self._folders[0]

    def hold(self, entry: ModelEntry, where: str, faults: Faults) -> None:
        """Faults for what leads out of the roots, links followed."""
        for field, name in (("model_path", entry.model_path), ("tokenizer_path", entry.tokenizer_path)):
            if name is not None and not faults.spoil(f"{where}.{field}") and not self._allows(name):
                allowed = f"there are {', '.join(map(str, self._folders))}"
                faults.add(f"{where}.{field}", f"{shortened(name)!r} is not in a folder that models may come from", allowed)
        for option, value in entry.engine_args.items():
            if any("/" in text for text in _texts(value)):
                faults.add(f"{where}.engine_args", f"{shortened(option)} names a path, which only a placement file may do")

    def _allows(self, name: str) -> bool:
        folder = Path(os.path.realpath(self.base / os.path.expanduser(name)))
        return any(folder.is_relative_to(root) for root in self._folders)


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _texts(item)
        case dict():
            for key, item in value.items():
                yield from (key, *_texts(item))
