"""The processes that a script has started, as the kernel sees them: whose child each is, what it has run, what it holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def servers() -> list[int]:
    """Each `chimera serve` that this process has started and that still runs."""
    return [pid for pid in children(os.getpid()) if "serve" in words_of(pid)]


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """Itself first."""
    return [pid, *(one for child in children(pid) for one in descendants(child))]


def parent_of(pid: int) -> int:
    return int(_stat(pid)[1])


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def cpu_s(pids: Iterable[int]) -> float:
    """The time that these have run so far, their threads that have ended included."""
    return sum(int(_stat(pid)[11]) + int(_stat(pid)[12]) for pid in pids) / _TICKS_PER_S


def ran_s(pids: Iterable[int]) -> float:
    """The same to the nanosecond; of threads that run still."""
    ran_ns = 0
    for task in (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            ran_ns += int((task / "schedstat").read_text().split()[0])
    return ran_ns / 1e9


def private_mib(pid: int) -> int:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private_")) // 1024


def _stat(pid: int) -> list[str]:
    """From the state on; a name may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
