"""The private directory of one running server: its sockets, and what its processes are told at their start.

Owns making it, finding those that a killed server left behind, and removing it. Everything in it is ours.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from chimera.errors import ConfigError

_PREFIX = "chimera-"
_OWNER = "supervisor.pid"
LONGEST_PATH = 70
"""The kernel takes 107 bytes for a socket's path; the names in the directory need the rest."""


def make(wanted: Path | None = None) -> Path:
    """A new directory that only this user can enter; or `wanted`, if it is new or empty."""
    if wanted is None:
        sweep()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        if len(os.fspath(folder)) > LONGEST_PATH:
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    else:
        folder = _take(wanted.absolute())
    (folder / _OWNER).write_text(str(os.getpid()))
    return folder


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove what servers that were killed, with all that watched over them, have left behind."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if owner.stat().st_uid == os.getuid() and not _alive(int(owner.read_text())):
                remove(owner.parent)


def _take(folder: Path) -> Path:
    if len(os.fspath(folder)) > LONGEST_PATH:
        what = f"{folder} is too long for a directory of sockets: {LONGEST_PATH} characters at most"
        raise ConfigError.single("--run-dir", what)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        left = sorted(path.name for path in folder.iterdir())
        if left and _abandoned(folder):
            remove(folder)
            folder.mkdir(mode=0o700)
            left = []
        folder.chmod(0o700)
    except OSError as fault:
        raise ConfigError.single("--run-dir", f"{folder}: {fault.strerror}") from None
    if left:
        raise ConfigError.single(
            "--run-dir", f"{folder} is not empty: {', '.join(left[:3])}", hint="is a server running in it?"
        )
    return folder


def _abandoned(folder: Path) -> bool:
    try:
        return not _alive(int((folder / _OWNER).read_text()))
    except (OSError, ValueError):
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
