"""Virtual memory as arithmetic: no byte is mapped, every rule is kept.

Owns the counts of the calls a real device would have seen, the refusals it is told to make, and a note of what each
handle would contain. For tests, the simulator and the demonstration. Knows no device.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Sequence

from chimera.errors import DriverError
from chimera.units import MIB
from chimera.vmm.driver import Handle, Range, Run, TrackedDriver

_FIRST_ADDRESS = 1 << 40


class FakeDriver(TrackedDriver):
    def __init__(self, granularity: int = 2 * MIB, *, capacity_bytes: int | None = None) -> None:
        super().__init__(granularity)
        self.capacity_bytes = capacity_bytes
        self.calls: Counter[str] = Counter()
        """How often each primitive was called: one per run, as on a device."""
        self._refusals: dict[str, set[int]] = {}
        self._contents: dict[Handle, str] = {}
        self._places = itertools.count(1)
        self._next_address = _FIRST_ADDRESS

    def refuse(self, call: str, nth: int = 1) -> None:
        """Refuse the `nth` call of this primitive from now on: `create`, `map`, `unmap`, `scrub`, `release`, `reserve`."""
        self._refusals.setdefault(call, set()).add(self.calls[call] + nth)

    def write(self, where: Range, offset: int, contents: str) -> None:
        """What a kernel that writes there would leave behind."""
        self._contents[where.mapped[offset]] = contents

    def read(self, where: Range, offset: int) -> str:
        """What a kernel that reads there would see; empty for zeros."""
        return self._contents.get(where.mapped[offset], "")

    def _reserve(self, nbytes: int) -> int:
        self._count("reserve", nbytes)
        address = self._next_address
        self._next_address += nbytes + self.granularity
        return address

    def _free(self, address: int, nbytes: int) -> None:
        self._count("free", nbytes)

    def _create(self, nbytes: int, count: int) -> list[int]:
        self._count("create", nbytes * count)
        if self.capacity_bytes is not None and self.created_bytes + nbytes * count > self.capacity_bytes:
            raise DriverError("create", errno.ENOMEM, nbytes * count, f"capacity is {self.capacity_bytes}")
        return list(itertools.islice(self._places, count))

    def _release(self, group: Sequence[Handle]) -> None:
        for handle in group:
            self._count("release", handle.nbytes)
            self._contents.pop(handle, None)

    def _map(self, address: int, run: Run) -> None:
        self._count("map", run.nbytes)

    def _unmap(self, address: int, run: Run) -> None:
        self._count("unmap", run.nbytes)

    def _scrub(self, address: int, run: Run) -> None:
        self._count("scrub", run.nbytes)
        for handle in run.handles:
            self._contents.pop(handle, None)

    def _count(self, call: str, nbytes: int) -> None:
        self.calls[call] += 1
        if self.calls[call] in self._refusals.get(call, ()):
            raise DriverError(call, errno.ENOMEM, nbytes, "told to refuse")
