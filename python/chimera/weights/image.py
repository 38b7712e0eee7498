"""One model's tensors in one file: the bytes first, a table of contents last, a mark at the very end.

The bytes are one run, laid out as a device will hold them, so that bringing a model in is one copy, and on a CPU none at
all: tensors are views of the mapped file. A file without its closing mark was never finished. Knows no engine.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch

from chimera.errors import WeightsError
from chimera.units import MIB, ceil_div

ALIGNMENT = 512
"""Of every storage: what device allocators give, and more than any kernel asks for."""
CHECKED_BYTES = 16 * MIB
"""Each run of so many bytes has its own checksum, so that several threads can check."""
THREADS = 4

_MARK = b"chimera1"
_CLOSING = struct.Struct("<QI8s")
"""Length and checksum of the table of contents, and the mark."""
_MAP_NORESERVE = 0x4000  # Linux's; Python names it only in later releases


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor. Several may lie over the same bytes: tied embeddings are one storage with two names."""

    name: str
    """The path to it: modules, then the leaf, joined by dots."""
    kind: str
    """`parameter`, `buffer` or `attribute`."""
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    at: int
    """Its first byte, counted from the beginning of the image."""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and what the model says to it, greedily, as long as its weights are right."""

    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """All that an image says of itself."""

    key: str
    model: str
    data_bytes: int
    entries: tuple[Entry, ...]
    plain: dict[str, bool | int | float | str | None] = {}
    """Plain attributes that loading sets or changes, by their path."""
    absent: tuple[str, ...] = ()
    """Parameters that loading takes away."""
    canary: Canary = Canary()
    build_s: float = 0.0
    """What it costs to build it again."""
    checksums: tuple[int, ...] = ()
    unfit: str = ""
    """Why this model cannot come from an image; then the image has no bytes and keeps others from trying in vain."""


class Image:
    """An image. While it, or any tensor over its bytes, lives, the file counts as in use, whoever removes its name."""

    def __init__(self, path: Path, fd: int) -> None:
        """Takes `fd` over; WeightsError if it is not a whole image."""
        self.path = path
        try:
            self.nbytes = os.fstat(fd).st_size
            self.contents = _read_contents(path, fd, self.nbytes)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def fileno(self) -> int:
        """Open, and with it the lock by which others see that the image is in use, as long as this object lives."""
        return self._fd

    @functools.cached_property
    def bytes(self) -> torch.Tensor:
        # Private: a stray write would be this process's alone. The mapping keeps a duplicate of the file, and of its lock.
        mapping = mmap.mmap(self._fd, self.nbytes, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(mapping, dtype=torch.uint8)

    @classmethod
    def open(cls, path: Path) -> Image | None:
        """`None` if there is no such image, or no longer."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink == 0:  # it went between the two calls
            os.close(fd)
            return None
        return cls(path, fd)

    def tensors(self, run: torch.Tensor | None = None) -> Iterator[tuple[Entry, torch.Tensor]]:
        """Each entry over `run`, which holds the image's bytes on some device; over the mapping itself without it."""
        storage = (self.bytes if run is None else run).untyped_storage()
        base = 0 if run is None else run.storage_offset()
        device = self.bytes.device if run is None else run.device
        for entry in self.contents.entries:
            dtype = dtype_of(entry.dtype)
            empty = torch.empty(0, dtype=dtype, device=device)
            yield entry, empty.set_(storage, (base + entry.at) // dtype.itemsize, entry.shape, entry.stride)

    def require_intact(self) -> None:
        """WeightsError if any byte is not what was written."""
        sums = checksums(self.bytes[: self.contents.data_bytes])
        if sums != self.contents.checksums:
            broken = next(i for i, (a, b) in enumerate(zip(sums, self.contents.checksums, strict=True)) if a != b)
            raise WeightsError(f"{self.path}: the checksum of its bytes from {broken * CHECKED_BYTES} on is wrong")


def dtype_of(name: str) -> torch.dtype:
    dtype: Any = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightsError(f"this torch knows no dtype {name!r}")
    return dtype


def checksums(data: torch.Tensor) -> tuple[int, ...]:
    """Of a run of bytes on the CPU."""
    view = memoryview(data.numpy())
    starts = range(0, len(view), CHECKED_BYTES)
    with ThreadPoolExecutor(THREADS) as threads:
        return tuple(threads.map(lambda at: zlib.crc32(view[at : at + CHECKED_BYTES]), starts))


def aligned(nbytes: int) -> int:
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT


def copy_in(target: torch.Tensor, pieces: Sequence[tuple[int, torch.Tensor]], copied: Callable[[int], object]) -> None:
    """Each piece, bytes wherever they are, to its place in `target`; several at a time. `copied` hears of each one's bytes."""

    def copy(piece: tuple[int, torch.Tensor]) -> int:
        at, source = piece
        nbytes: int = source.numel()
        target[at : at + nbytes].copy_(source)
        return nbytes

    with ThreadPoolExecutor(THREADS) as threads:
        for nbytes in threads.map(copy, pieces):
            copied(nbytes)


def closing(contents: Contents) -> bytes:
    """What goes behind the bytes of a finished image."""
    table = msgspec.msgpack.encode(contents)
    return table + _CLOSING.pack(len(table), zlib.crc32(table), _MARK)


def _read_contents(path: Path, fd: int, nbytes: int) -> Contents:
    if nbytes < _CLOSING.size:
        raise WeightsError(f"{path}: {nbytes} bytes are no image")
    length, checksum, mark = _CLOSING.unpack(os.pread(fd, _CLOSING.size, nbytes - _CLOSING.size))
    if mark != _MARK or length > nbytes - _CLOSING.size:
        raise WeightsError(f"{path}: not an image, or never finished")
    table = os.pread(fd, length, nbytes - _CLOSING.size - length)
    if zlib.crc32(table) != checksum:
        raise WeightsError(f"{path}: the checksum of its table of contents is wrong")
    try:
        contents = msgspec.msgpack.decode(table, type=Contents)
    except msgspec.DecodeError as fault:
        raise WeightsError(f"{path}: its table of contents cannot be read: {fault}") from fault
    for entry in contents.entries:
        if entry.at % dtype_of(entry.dtype).itemsize or not 0 <= entry.at <= _end(entry) <= contents.data_bytes:
            raise WeightsError(f"{path}: {entry.name} lies outside of the image")
    if contents.data_bytes > nbytes - _CLOSING.size - length:
        raise WeightsError(f"{path}: the image is shorter than its table of contents says")
    return contents


def _end(entry: Entry) -> int:
    if 0 in entry.shape:
        return entry.at
    span = sum((n - 1) * stride for n, stride in zip(entry.shape, entry.stride, strict=True)) + 1
    element_bytes: int = dtype_of(entry.dtype).itemsize
    return entry.at + span * element_bytes
