"""The folder of images: one builder at a time, a budget, and what must go when it is full.

All processes of a host share one folder and no memory of their own about it: who builds, and what is in use, is told by
locks that the kernel takes back from whoever dies. An image gets its name when it is whole. Knows no engine.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import torch

from chimera.errors import WeightsError
from chimera.units import format_bytes
from chimera.weights.image import Contents, Image, checksums, closing, copy_in
from chimera.weights.source import FileStamp

log = logging.getLogger(__name__)

IMAGE = ".image"
PART = ".part"
LOCK = ".lock"


class ImageKey(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is an image of: these files, loaded this way. Anything else is another image."""

    folder: str
    files: tuple[FileStamp, ...]
    engine: str
    """With its version: another release may lay tensors out differently."""
    device: str
    settings: str
    """Everything else that the engine was told, in its own words."""
    rank: int = 0
    tp_size: int = 1

    @property
    def slot(self) -> str:
        """The same for all versions of the files."""
        return _digest((self.folder, self.engine, self.device, self.settings, self.rank, self.tp_size))

    @property
    def name(self) -> str:
        return f"{self.slot}.{_digest(self.files)}"


class WeightStore:
    """`budget_bytes` bounds all images together; `None` leaves it to the room there is."""

    def __init__(self, folder: Path, budget_bytes: int | None = None) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes

    def open(self, key: ImageKey) -> Image | None:
        """The image, in use from now on. One that is damaged is taken away, as if it had never been."""
        path = self._path(key)
        try:
            image = Image.open(path)
        except WeightsError as fault:
            log.warning("removed an image that cannot be used reason=%s", fault)
            path.unlink(missing_ok=True)
            return None
        if image is not None:
            with suppress(FileNotFoundError):  # it has gone since, and is ours all the same
                os.utime(path)
        return image

    def discard(self, image: Image, reason: str) -> None:
        """Nobody finds it any more; who uses it keeps it."""
        log.warning("discarded image=%s model=%s reason=%s", image.path.name, image.contents.model, reason)
        image.path.unlink(missing_ok=True)

    @contextmanager
    def turn(self, key: ImageKey) -> Iterator[None]:
        """One builder of this model at a time. Who had to wait looks again before it builds."""
        with _Locked(self.folder / f"{key.slot}{LOCK}"):
            yield

    def put(
        self,
        key: ImageKey,
        contents: Contents,
        pieces: Sequence[tuple[int, torch.Tensor]],
        copied: Callable[[int], object] = int,
    ) -> Image:
        """A new image of `pieces`, bytes with their places. WeightsError, with nothing changed, if there is no room."""
        table_bytes = len(closing(contents)) + 8 * (1 + contents.data_bytes // (1 << 20))  # checksums are still to come
        part, fd = self._reserve(key, contents.data_bytes + table_bytes)
        try:
            if contents.data_bytes:
                sums = _fill(fd, contents.data_bytes, pieces, copied)
                contents = msgspec.structs.replace(contents, checksums=sums)
            end = closing(contents)
            os.pwrite(fd, end, contents.data_bytes)
            os.ftruncate(fd, contents.data_bytes + len(end))
            part.rename(self._path(key))
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(fd)
            raise
        fcntl.flock(fd, fcntl.LOCK_SH)
        image = Image(self._path(key), fd)
        self._drop_older(key)
        return image

    def used_bytes(self) -> int:
        """By images and by those being built."""
        return sum(_held_bytes(path) for path in self._files(IMAGE, PART))

    # Room.

    def _reserve(self, key: ImageKey, nbytes: int) -> tuple[Path, int]:
        """A file of so many bytes, all of them there: a full file system shows now and not in the middle of a copy."""
        part = self.folder / f"{key.name}{PART}"
        with self._books():
            self._sweep()
            self._make_room(nbytes)
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.posix_fallocate(fd, 0, nbytes)
            except OSError as fault:
                part.unlink(missing_ok=True)
                os.close(fd)
                if fault.errno != errno.ENOSPC:
                    raise
                what = f"no room for an image of {format_bytes(nbytes)}: {self.folder} is full"
                raise WeightsError(what, passing=True) from fault
        return part, fd

    def _make_room(self, nbytes: int) -> None:
        """Images go, the cheapest to build again first, until `nbytes` fit; all that could go stay if that is no use."""
        short = nbytes - self._room()
        going, freed = [], 0
        for path in self._evictable() if short > 0 else ():
            if freed >= short:
                break
            going.append(path)
            freed += _held_bytes(path)
        if freed < short:
            budget = "" if self.budget_bytes is None else f", the budget is {format_bytes(self.budget_bytes)}"
            what = f"no room for an image of {format_bytes(nbytes)} in {self.folder}: {format_bytes(self._room())} are free"
            raise WeightsError(f"{what}{budget}, and what is in use cannot go", passing=True)
        for path in going:
            log.info("evicted image=%s bytes=%d", path.name, _held_bytes(path))
            path.unlink(missing_ok=True)

    def _room(self) -> int:
        system = os.statvfs(self.folder)
        free = system.f_bavail * system.f_frsize
        return free if self.budget_bytes is None else min(free, self.budget_bytes - self.used_bytes())

    def _evictable(self) -> list[Path]:
        """What nobody uses, the least loss first: seconds to build again, per byte, the less the longer it lay idle."""
        now_s = time.time()
        ranked = []
        for path in self._files(IMAGE):
            if _in_use(path):
                continue
            try:
                image = Image.open(path)
            except WeightsError:
                image = None
            try:
                idle_s = max(1.0, now_s - path.stat().st_mtime)
            except FileNotFoundError:  # discarded meanwhile
                continue
            build_s = 0.0 if image is None else image.contents.build_s
            ranked.append((build_s / max(1, _held_bytes(path)) / idle_s, path))
        return [path for _, path in sorted(ranked)]

    def _sweep(self) -> None:
        """What a builder left that died half-way."""
        for path in self._files(PART):
            if not _in_use(path):
                log.info("swept image=%s reason=its builder is gone", path.name)
                path.unlink(missing_ok=True)

    def _drop_older(self, key: ImageKey) -> None:
        """Its files have changed since, so nobody will ask for them again."""
        with self._books():
            for path in self.folder.glob(f"{key.slot}.*{IMAGE}"):
                if path != self._path(key) and not _in_use(path):
                    path.unlink(missing_ok=True)

    # Files.

    def _books(self) -> _Locked:
        return _Locked(self.folder / f"books{LOCK}")

    def _path(self, key: ImageKey) -> Path:
        return self.folder / f"{key.name}{IMAGE}"

    def _files(self, *suffixes: str) -> list[Path]:
        return [path for suffix in suffixes for path in self.folder.glob(f"*{suffix}")]


def _fill(fd: int, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], copied: Callable[[int], object]) -> tuple[int, ...]:
    with mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        data = torch.frombuffer(mapping, dtype=torch.uint8)
        copy_in(data, pieces, copied)
        sums = checksums(data)
        del data  # or the mapping cannot be closed
    return sums


def _held_bytes(path: Path) -> int:
    """Blocks rather than length: what it takes of the memory."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _in_use(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class _Locked:
    """Holds a file's lock; whoever dies lets go of it. The file stays: to remove it would let two in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(value)).hexdigest()[:20]
