"""Virtual memory on any Linux machine: reserved addresses, pages of an anonymous file, holes punched into it.

Owns one memory file; a handle is a stretch of it. Elasticity is real: it shows in resident memory and in the file's
blocks. A page costs memory from its first touch, not from its creation, so a pool that nobody fills weighs nothing.
Knows no model and no budget.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from chimera.errors import DriverError
from chimera.units import KIB, MIB
from chimera.vmm.driver import Handle, Run, TrackedDriver

HUGE_PAGE_BYTES: Final = 2 * MIB
SMALLEST_GRANULE_BYTES: Final = 64 * KIB
_FILE_BYTES: Final = 1 << 46

# The three that the standard library does not name, as every Linux has them.
PROT_NONE: Final = 0
NORESERVE: Final = 0x4000
FIXED: Final = 0x10
_KEEP_SIZE_PUNCH_HOLE: Final = 0x1 | 0x2
VACANT: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
munmap = _libc.munmap
munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class HostDriver(TrackedDriver):
    """`mmap(PROT_NONE)` reserves, `MAP_FIXED` over the memory file maps, `fallocate(PUNCH_HOLE)` scrubs and releases."""

    def __init__(self, granularity: int = HUGE_PAGE_BYTES) -> None:
        if granularity < SMALLEST_GRANULE_BYTES or granularity % SMALLEST_GRANULE_BYTES:
            raise DriverError("open", errno.EINVAL, granularity, f"a granule is a multiple of {SMALLEST_GRANULE_BYTES} bytes")
        super().__init__(granularity)
        self._file = _sparse_file()
        self._stretches = _Stretches()
        # A granule smaller than a huge page would be punched out of the middle of one, which splits it at every shrink.
        self._huge = granularity % HUGE_PAGE_BYTES == 0
        self._shifts: dict[int, int] = {}

    @property
    def file_bytes(self) -> int:
        """Memory that the file really occupies."""
        return os.fstat(self._file).st_blocks * 512

    def close(self) -> None:
        super().close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _reserve(self, nbytes: int) -> int:
        # Huge pages need addresses and file offsets that agree modulo their size.
        align = HUGE_PAGE_BYTES if self._huge else SMALLEST_GRANULE_BYTES
        start = map_at(None, nbytes + align, PROT_NONE, VACANT)
        address = start + -start % align
        self._shifts[address] = address - start
        return address

    def _free(self, address: int, nbytes: int) -> None:
        align = HUGE_PAGE_BYTES if self._huge else SMALLEST_GRANULE_BYTES
        start = address - self._shifts.pop(address)
        check("munmap", munmap(start, nbytes + align), nbytes)

    def _create(self, nbytes: int, count: int) -> list[int]:
        if self._file < 0:
            raise DriverError("create", errno.EBADF, nbytes * count, "the driver is closed")
        return self._stretches.take(nbytes, count)

    def _released_together(self, handles: Collection[Handle]) -> Iterable[Sequence[Handle]]:
        """One hole for neighbours in the file."""
        groups: list[list[Handle]] = []
        for handle in sorted(handles, key=lambda handle: handle.place):
            if groups and self._joins(groups[-1][-1], handle):
                groups[-1].append(handle)
            else:
                groups.append([handle])
        return groups

    def _release(self, group: Sequence[Handle]) -> None:
        place, nbytes = group[0].place, sum(handle.nbytes for handle in group)
        self._punch(place, nbytes)
        self._stretches.give(place, nbytes)

    def _map(self, address: int, run: Run) -> None:
        flags = mmap.MAP_SHARED | FIXED
        map_at(address, run.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, run.handles[0].place)
        # Advice: a kernel built without huge pages declines it, and small pages serve as well.
        if self._huge and _madvise(address, run.nbytes, mmap.MADV_HUGEPAGE) != 0:
            self._huge = False

    def _unmap(self, address: int, run: Run) -> None:
        map_at(address, run.nbytes, PROT_NONE, VACANT | FIXED)

    def _scrub(self, address: int, run: Run) -> None:
        self._punch(run.handles[0].place, run.nbytes)

    def _joins(self, before: Handle, after: Handle) -> bool:
        return before.place + before.nbytes == after.place

    def _punch(self, place: int, nbytes: int) -> None:
        check("fallocate", _fallocate(self._file, _KEEP_SIZE_PUNCH_HOLE, place, nbytes), nbytes)


class _Stretches:
    """Which parts of the file belong to no handle: sorted, merged, handed out lowest first so that neighbours stay so."""

    def __init__(self) -> None:
        self.end = 0
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int, count: int) -> list[int]:
        """`count` places of `nbytes`; one stretch for all of them where there is one."""
        with self._lock:
            start = self._fit(nbytes * count)
            if start is not None:
                return list(range(start, start + nbytes * count, nbytes))
            places: list[int] = []
            while len(places) < count and (start := self._fit(nbytes)) is not None:
                places.append(start)
            missing = count - len(places)
            places.extend(range(self.end, self.end + nbytes * missing, nbytes))
            self.end += nbytes * missing
            return places

    def give(self, start: int, nbytes: int) -> None:
        with self._lock:
            at = bisect.bisect_left(self._starts, start)
            if at < len(self._starts) and self._starts[at] == start + nbytes:
                nbytes += self._sizes.pop(self._starts.pop(at))
            if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
                self._sizes[self._starts[at - 1]] += nbytes
            else:
                self._starts.insert(at, start)
                self._sizes[start] = nbytes

    def _fit(self, nbytes: int) -> int | None:
        for at, start in enumerate(self._starts):
            size = self._sizes[start]
            if size >= nbytes:
                self._starts.pop(at)
                del self._sizes[start]
                if size > nbytes:
                    self._starts.insert(at, start + nbytes)
                    self._sizes[start + nbytes] = size - nbytes
                return start
        return None


def _sparse_file() -> int:
    """An anonymous file as long as it can ever need to be: growing one step by step would wait for every hole being punched."""
    file = os.memfd_create("chimera-pages", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, _FILE_BYTES)
    except OSError as error:
        os.close(file)
        raise DriverError("ftruncate", error.errno or 0, _FILE_BYTES, "is there a limit on file size (ulimit -f)?") from error
    return file


def map_at(address: int | None, nbytes: int, protection: int, flags: int, file: int = -1, place: int = 0) -> int:
    got = _mmap(address, nbytes, protection, flags, file, place)
    if got is None or got == _FAILED:
        code = ctypes.get_errno()
        raise DriverError("mmap", code, nbytes, os.strerror(code))
    return int(got)


def check(call: str, result: int, nbytes: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise DriverError(call, code, nbytes, os.strerror(code))
