"""Where a running server keeps its weight images: the flags that say so, and the folder from its making to its end.

A folder that an operator names stays, and the next start finds its images there. Any other lies in shared memory and goes
with the server; what a killed one leaves behind goes with the next start.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chimera.core.model import ModelSpec
from chimera.errors import ConfigError
from chimera.units import MIB, format_bytes, parse_bytes

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "chimera-images-"
_OWNER = "owner.lock"
_BESIDE_WEIGHTS_BYTES = 16 * MIB
"""Rotary tables and the like, which an image has and a checkpoint has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A folder of images, and how much they may take; `None` is as much as there is room for."""

    folder: Path
    budget_bytes: int | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--enable-cpu-share-memory",
        action=argparse.BooleanOptionalAction,
        help="keep each model's weights once in host memory, shared by all workers (default: if they fit)",
    )
    parser.add_argument("--cpu-share-memory", metavar="SIZE", help="how much they may take: 64GiB (default: what is free)")
    parser.add_argument("--image-dir", type=Path, help="keep them in this folder over restarts (default: in shared memory)")


@contextlib.contextmanager
def images_of(
    arguments: argparse.Namespace, models: Sequence[ModelSpec], say: Callable[[str], None]
) -> Iterator[Images | None]:
    """Empty when weights are read from their files each time; `say` hears why, unless that is what was asked for."""
    wanted: bool | None = arguments.enable_cpu_share_memory
    if wanted is False or arguments.engine != "sglang" or not models:
        yield None
        return
    budget_bytes = budget_of(arguments.cpu_share_memory)
    with _folder(arguments.image_dir) as folder:
        short = _shortage(folder, budget_bytes, models)
        if not short:
            yield Images(folder=folder, budget_bytes=budget_bytes)
        elif wanted:
            raise ConfigError.single("--enable-cpu-share-memory", short, hint="docker run --shm-size=64g, or --image-dir")
        else:
            say(f"weights are read from their files each time: {short} (--image-dir names another place)")
            yield None


def budget_of(written: str | None) -> int | None:
    try:
        return None if written is None else parse_bytes(written)
    except ValueError as fault:
        raise ConfigError.single("--cpu-share-memory", str(fault)) from None


def _shortage(folder: Path, budget_bytes: int | None, models: Sequence[ModelSpec]) -> str:
    """Not all need fit, for images make room for each other; but each must."""
    system = os.statvfs(folder)
    room_bytes = system.f_blocks * system.f_frsize
    if budget_bytes is not None:
        room_bytes = min(room_bytes, budget_bytes)
    largest = max(models, key=lambda model: model.weight_bytes)
    needed_bytes = largest.weight_bytes + _BESIDE_WEIGHTS_BYTES
    if needed_bytes <= room_bytes:
        return ""
    needed, room = format_bytes(needed_bytes), format_bytes(room_bytes)
    return f"{largest.name} needs {needed}, and in {folder.parent} images may take {room}"


@contextlib.contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None:
        try:
            wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as fault:
            raise ConfigError.single("--image-dir", f"{wanted}: {fault.strerror}") from None
        yield wanted.absolute()
        return
    shared = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    sweep(shared)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=shared))
    # Held as long as this process lives: the kernel lets go of it whatever happens.
    owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(owner, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def sweep(shared: Path) -> None:
    """Remove the folders whose servers are gone."""
    for lock in shared.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):
            owner = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(owner).st_uid == os.getuid():
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(owner)
