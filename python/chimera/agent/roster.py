"""Who works here, written down in the run directory: all that a restarted agent knows of the workers before they speak.

A process is named by its number and the moment of its birth, so no stranger that was given the same number is taken for a
worker. Knows no connection; decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    pid: int
    born: int
    replica: str = ""
    gpu_ids: tuple[int, ...] = ()
    """Where its replica has memory."""
    settled: bool = True
    """It can tell what it is. While it becomes a model, or does a chore, it can tell nothing."""


class Roster:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: tuple[Entry, ...] = ()

    def living(self) -> list[Entry]:
        """Who was here when the last agent ended, and still is."""
        try:
            entries = msgspec.json.decode(self._path.read_bytes(), type=tuple[Entry, ...])
        except FileNotFoundError:
            return []
        return [entry for entry in entries if born(entry.pid) == entry.born]

    def write(self, entries: Iterable[Entry]) -> None:
        entries = tuple(entries)
        if entries == self._written:
            return
        self._written = entries
        draft = self._path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(entries))
        os.replace(draft, self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def born(pid: int) -> int:
    """When the process began, in the kernel's ticks; 0 when it is gone, or dead and only not yet waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
