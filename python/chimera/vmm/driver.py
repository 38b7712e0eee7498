"""What every driver of virtual memory promises, and the bookkeeping that makes all three keep it alike.

Owns the protocol, the record of what is mapped where, and the rule that a batch happens whole or not at all. Knows no
device: a concrete driver adds one primitive per call, over one *run* of neighbouring pages.

Two threads may use a driver at once as long as they touch different offsets and different handles; that is how a pool
grows while a helper unmaps what it gave up.
"""

from __future__ import annotations

import abc
import errno
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

from chimera.errors import DriverError
from chimera.units import ceil_div


class Handle(NamedTuple):
    """A piece of physical memory: created once, mapped at one place at a time, released once."""

    serial: int
    """Unique for the life of a driver, so that a stale handle is never taken for a new one."""
    place: int
    """Where the driver finds it: an offset in a file, or the device's own handle."""
    nbytes: int


class Range:
    """Reserved addresses, and which handle lies at which offset. Addresses never change while the range is open."""

    __slots__ = ("_taken", "address", "granularity", "mapped", "nbytes", "open")

    def __init__(self, *, address: int, nbytes: int, granularity: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.granularity = granularity
        self.open = True
        self.mapped: dict[int, Handle] = {}
        self._taken = bytearray(nbytes // granularity)

    @property
    def mapped_bytes(self) -> int:
        return sum(handle.nbytes for handle in self.mapped.values())

    def is_free(self, run: Run) -> bool:
        """Whether no granule of the run is mapped."""
        return self._taken.find(1, run.offset // self.granularity, (run.offset + run.nbytes) // self.granularity) < 0

    def enter(self, run: Run) -> None:
        self._mark(run, b"\1")
        self.mapped.update(zip(run.offsets, run.handles, strict=True))

    def leave(self, run: Run) -> None:
        self._mark(run, b"\0")
        for offset in run.offsets:
            del self.mapped[offset]

    def _mark(self, run: Run, value: bytes) -> None:
        first, count = run.offset // self.granularity, run.nbytes // self.granularity
        self._taken[first : first + count] = value * count


class Run:
    """Handles at neighbouring addresses that the driver can treat in one call."""

    __slots__ = ("handles", "nbytes", "offset", "offsets")

    def __init__(self, offsets: list[int], handles: list[Handle]) -> None:
        self.offset = offsets[0]
        self.offsets = offsets
        self.handles = handles
        self.nbytes = offsets[-1] + handles[-1].nbytes - offsets[0]


class Driver(Protocol):
    """Physical memory under fixed addresses. Every call but `reserve` is a batch; a refusal is a `DriverError`.

    A batch that is refused half-way leaves everything as it was before. The one exception is `release`: memory that was
    given back cannot be called back, so it goes on to the end and then reports the first refusal.
    """

    @property
    def granularity(self) -> int:
        """Every size and offset is a multiple of this many bytes."""
        ...

    @property
    def created_bytes(self) -> int:
        """Physical memory held: created and not yet released, mapped or not."""
        ...

    def reserve(self, nbytes: int) -> Range:
        """Set addresses aside, rounded up to whole granules. Touching them faults until something is mapped there."""
        ...

    def free(self, where: Range) -> None:
        """Give the addresses back. Nothing may be mapped there."""
        ...

    def create(self, nbytes: int, count: int = 1) -> list[Handle]:
        """Make `count` handles of `nbytes` each. Their contents are zeros, or what this process left there unscrubbed."""
        ...

    def release(self, handles: Collection[Handle]) -> None:
        """Give physical memory back to the machine. None may be mapped."""
        ...

    def map(self, where: Range, placements: Mapping[int, Handle]) -> None:
        """Put each handle at its offset, readable and writable. No offset may be mapped, no handle elsewhere."""
        ...

    def unmap(self, where: Range, offsets: Collection[int]) -> list[Handle]:
        """Take away what is mapped at these offsets. The handles keep their contents, and come back in the order asked."""
        ...

    def scrub(self, where: Range, offsets: Collection[int]) -> None:
        """Replace the contents at these offsets by zeros, before any later reader on any stream or thread."""
        ...

    def close(self) -> None:
        """Unmap, release and free whatever is left."""
        ...


class TrackedDriver(abc.ABC):
    """The whole protocol over seven primitives: the checks, the runs and the rollback live here, once."""

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self._serials = itertools.count(1)
        self._unmapped: set[Handle] = set()
        self._ranges: list[Range] = []
        self._created_bytes = 0
        self._lock = threading.Lock()

    # The primitives: one call to the device each, raising DriverError.

    @abc.abstractmethod
    def _reserve(self, nbytes: int) -> int: ...

    @abc.abstractmethod
    def _free(self, address: int, nbytes: int) -> None: ...

    @abc.abstractmethod
    def _create(self, nbytes: int, count: int) -> list[int]:
        """The places of `count` new pieces, all or none."""

    @abc.abstractmethod
    def _release(self, group: Sequence[Handle]) -> None: ...

    @abc.abstractmethod
    def _map(self, address: int, run: Run) -> None: ...

    @abc.abstractmethod
    def _unmap(self, address: int, run: Run) -> None: ...

    @abc.abstractmethod
    def _scrub(self, address: int, run: Run) -> None: ...

    def _joins(self, before: Handle, after: Handle) -> bool:
        """Whether two handles at neighbouring addresses may share one call."""
        return True

    def _released_together(self, handles: Collection[Handle]) -> Iterable[Sequence[Handle]]:
        """The groups in which `_release` sees them."""
        return ((handle,) for handle in handles)

    # The protocol.

    @property
    def created_bytes(self) -> int:
        return self._created_bytes

    def reserve(self, nbytes: int) -> Range:
        if nbytes <= 0:
            raise DriverError("reserve", errno.EINVAL, nbytes, "a range has at least one granule")
        nbytes = ceil_div(nbytes, self.granularity) * self.granularity
        where = Range(address=self._reserve(nbytes), nbytes=nbytes, granularity=self.granularity)
        self._ranges.append(where)
        return where

    def free(self, where: Range) -> None:
        self._require_open("free", where)
        if where.mapped:
            raise DriverError("free", errno.EBUSY, where.mapped_bytes, f"{len(where.mapped)} handles are still mapped")
        self._free(where.address, where.nbytes)
        where.open = False
        self._ranges.remove(where)

    def create(self, nbytes: int, count: int = 1) -> list[Handle]:
        if nbytes <= 0 or nbytes % self.granularity:
            raise DriverError("create", errno.EINVAL, nbytes, f"not a multiple of the granule of {self.granularity}")
        handles = [Handle(next(self._serials), place, nbytes) for place in self._create(nbytes, count)]
        with self._lock:
            self._unmapped.update(handles)
            self._created_bytes += nbytes * count
        return handles

    def release(self, handles: Collection[Handle]) -> None:
        self._claim("release", handles)
        refused: DriverError | None = None
        for group in self._released_together(handles):
            try:
                self._release(group)
            except DriverError as error:
                refused = refused or error
                self._unmapped.update(group)
                continue
            with self._lock:
                self._created_bytes -= sum(handle.nbytes for handle in group)
        if refused is not None:
            raise refused

    def map(self, where: Range, placements: Mapping[int, Handle]) -> None:
        self._require_open("map", where)
        offsets = sorted(placements)
        runs = self._runs("map", offsets, [placements[offset] for offset in offsets])
        for run in runs:
            self._require_room(where, run)
        self._claim("map", placements.values())
        try:
            self._each(runs, where, self._map, undo=self._unmap)
        except DriverError:
            self._unmapped.update(placements.values())
            raise
        for run in runs:
            where.enter(run)

    def unmap(self, where: Range, offsets: Collection[int]) -> list[Handle]:
        runs = self._mapped_runs("unmap", where, offsets)
        handles = [where.mapped[offset] for offset in offsets]
        self._each(runs, where, self._unmap, undo=self._map)
        for run in runs:
            where.leave(run)
        self._unmapped.update(handles)
        return handles

    def scrub(self, where: Range, offsets: Collection[int]) -> None:
        for run in self._mapped_runs("scrub", where, offsets):
            self._scrub(where.address + run.offset, run)

    def close(self) -> None:
        for where in list(self._ranges):
            self.unmap(where, list(where.mapped))
            self.free(where)
        self.release(list(self._unmapped))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # How the protocol is kept.

    def _each(
        self,
        runs: Sequence[Run],
        where: Range,
        act: Callable[[int, Run], None],
        *,
        undo: Callable[[int, Run], None],
    ) -> None:
        """Act on every run, or on none: what was done before a refusal is undone, last first."""
        for done, run in enumerate(runs):
            try:
                act(where.address + run.offset, run)
            except DriverError:
                for earlier in reversed(runs[:done]):
                    undo(where.address + earlier.offset, earlier)
                raise

    def _runs(self, call: str, offsets: list[int], handles: list[Handle]) -> list[Run]:
        """Cut ascending placements where addresses have a gap, or where the driver cannot join two handles."""
        joins = self._joins
        runs: list[Run] = []
        first, end = 0, offsets[0] if offsets else 0
        for at, (offset, handle) in enumerate(zip(offsets, handles, strict=True)):
            if offset != end or (at > first and not joins(handles[at - 1], handle)):
                if offset < end:
                    raise DriverError(call, errno.EEXIST, handle.nbytes, f"offset {offset} lies inside the handle before it")
                runs.append(Run(offsets[first:at], handles[first:at]))
                first = at
            end = offset + handle.nbytes
        if offsets:
            runs.append(Run(offsets[first:], handles[first:]))
        return runs

    def _mapped_runs(self, call: str, where: Range, offsets: Collection[int]) -> list[Run]:
        self._require_open(call, where)
        mapped, ascending = where.mapped, sorted(offsets)
        try:
            handles = [mapped[offset] for offset in ascending]
        except KeyError as error:
            raise DriverError(call, errno.ENOENT, where.granularity, f"nothing is mapped at offset {error.args[0]}") from None
        return self._runs(call, ascending, handles)

    def _claim(self, call: str, handles: Collection[Handle]) -> None:
        """Take these out of the unmapped set, all or none; a handle is in one caller's hands at a time."""
        wanted = set(handles)
        with self._lock:
            if len(wanted) != len(handles) or not self._unmapped.issuperset(wanted):
                why = "a handle is named twice, mapped, or released already"
                raise DriverError(call, errno.EBUSY, sum(handle.nbytes for handle in handles), why)
            self._unmapped.difference_update(wanted)

    def _require_room(self, where: Range, run: Run) -> None:
        end = run.offset + run.nbytes
        if run.offset < 0 or end > where.nbytes or run.offset % self.granularity:
            raise DriverError("map", errno.EINVAL, run.nbytes, f"offset {run.offset} is no granule of this range")
        if not where.is_free(run):
            raise DriverError("map", errno.EEXIST, run.nbytes, f"offsets {run.offset} to {end} are mapped already")

    def _require_open(self, call: str, where: Range) -> None:
        if not where.open:
            raise DriverError(call, errno.EBADF, where.nbytes, "the range was given back")
