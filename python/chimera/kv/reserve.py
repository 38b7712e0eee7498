"""Created stripes that nobody maps yet, and the work no step may wait for: creating, scrubbing, unmapping, releasing.

The policy on contents is here, in one place: **what leaves a pool is zeros.** A stripe is scrubbed while it is still
mapped, before its memory can reach anyone else, so neither the reserve nor the machine ever holds what a replica wrote.

Owns a queue and, once started, one thread that does nothing but call `work`. A thread rather than the owner's idle time,
because a busy engine has none, and that is when a pool needs to grow; the calls it makes (`cuMemCreate`, `fallocate`) run
without the interpreter's lock. Never started, it works whenever its owner calls `work`: tests and simulators are
deterministic that way. Knows no slot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from chimera.errors import DriverError
from chimera.kv.arena import Arena
from chimera.kv.budget import Budget
from chimera.units import MIB
from chimera.vmm.driver import Driver, Handle

_SCRUB_BYTES: Final = 64 * MIB
"""Scrubbed in one driver call: long enough to be efficient, short enough that nobody waits for a lock behind it."""


class Departure:
    """Stripes on their way out. `done` when their memory is in the reserve or gone; else `error` says what was refused.

    A refused departure is still mapped whole, and may be asked for again.
    """

    __slots__ = ("arena", "done", "error", "offsets")

    def __init__(self, arena: Arena, offsets: Sequence[int]) -> None:
        self.arena = arena
        self.offsets = sorted(offsets)
        self.done = False
        self.error: DriverError | None = None


class Reserve:
    """Stripes of one make, each of `handles_per_stripe` handles of `handle_bytes`, charged to one budget while they exist.

    Below `low` ready stripes it creates until it has `high`; what comes back is kept up to `high` and released beyond it.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        handle_bytes: int,
        handles_per_stripe: int = 1,
        budget: Budget,
        low: int = 0,
        high: int = 0,
    ) -> None:
        if not 0 <= low <= high:
            raise ValueError(f"marks must be 0 ≤ low ≤ high, not low={low}, high={high}")
        self.driver = driver
        self.handle_bytes = handle_bytes
        self.handles_per_stripe = handles_per_stripe
        self.stripe_bytes = handle_bytes * handles_per_stripe
        self.budget = budget
        self.low = low
        self.high = high
        self._ready: list[Handle] = []
        self._departures: deque[Departure] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._stopping = False
        self._refusal: DriverError | None = None

    @property
    def ready_stripes(self) -> int:
        """Created, charged, mapped nowhere."""
        return len(self._ready) // self.handles_per_stripe

    @property
    def has_thread(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Work in a thread of its own from now on."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="kv-reserve", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Finish what is queued, stop the thread, release every stripe."""
        if self._thread is not None:
            with self._wake:
                self._stopping = True
                self._wake.notify_all()
            self._thread.join()
            self._thread = None
        self._see_all_off()
        self.trim()
        self.check()

    def take(self, stripes: int) -> list[Handle]:
        """The handles of up to this many stripes: ready ones, then new ones while the budget lasts."""
        with self._wake:
            ready = min(stripes, self.ready_stripes) * self.handles_per_stripe
            taken, self._ready = self._ready[:ready], self._ready[ready:]
            fresh = self.budget.take(self.stripe_bytes, stripes - ready // self.handles_per_stripe)
            if self.ready_stripes < self.low:
                self._wake.notify_all()
        try:
            return taken + self._create(fresh)
        except DriverError:
            self.put(taken)
            raise

    def stock(self, stripes: int) -> int:
        """Create ahead until so many are ready, if the budget and the driver give them; how many are."""
        fresh = self.budget.take(self.stripe_bytes, stripes - self.ready_stripes)
        try:
            handles = self._create(fresh)
        except DriverError:
            return self.ready_stripes
        with self._wake:
            self._ready += handles
        return self.ready_stripes

    def put(self, handles: Sequence[Handle]) -> None:
        """Whole clean stripes back: kept up to the high mark, released beyond it."""
        with self._wake:
            room = max(0, self.high - self.ready_stripes) * self.handles_per_stripe
            # By place, so that the next ones taken are neighbours, to be mapped in one call.
            self._ready = sorted([*self._ready, *handles[:room]], key=lambda handle: handle.place)
        self._release(handles[room:])

    def trim(self, keep: int = 0) -> int:
        """Release ready stripes down to `keep`: the first thing to give when memory is recalled. Returns how many went."""
        with self._wake:
            keep = min(keep, self.ready_stripes) * self.handles_per_stripe
            gone, self._ready = self._ready[keep:], self._ready[:keep]
        self._release(gone)
        return len(gone) // self.handles_per_stripe

    def depart(self, arena: Arena, offsets: Sequence[int]) -> Departure:
        """Queue the offsets of whole stripes to be scrubbed, unmapped and kept or released. Nobody may touch them any more."""
        departure = Departure(arena, offsets)
        with self._wake:
            self._departures.append(departure)
            self._wake.notify_all()
        return departure

    def work(self) -> None:
        """See off what is queued, then refill. What the driver refuses here is raised by the owner's next `check`."""
        self._see_all_off()
        self._refill()

    def check(self) -> None:
        """Raise what was refused in the background since the last call; let a refill be tried again."""
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise refusal
        if self._wants_refill():
            with self._wake:
                self._wake.notify_all()

    def settle(self) -> None:
        """Return when everything queued is done, whoever does it."""
        if self._thread is None:
            self._see_all_off()
            return
        with self._wake:
            self._wake.wait_for(lambda: not self._departures and not self._busy)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                self._wake.wait_for(lambda: self._stopping or self._departures or self._wants_refill())
                if self._stopping:
                    return
                self._busy = True
            self.work()

    def _wants_refill(self) -> bool:
        room = self.budget.limit_bytes - self.budget.held_bytes
        return self.ready_stripes < self.low and self._refusal is None and room >= self.stripe_bytes

    def _refill(self) -> None:
        if not self._wants_refill():
            return
        granted = self.budget.take(self.stripe_bytes, self.high - self.ready_stripes)
        try:
            fresh = self._create(granted)
        except DriverError as error:
            self._refusal = error
            return
        with self._wake:
            self._ready += fresh

    def _see_all_off(self) -> None:
        while True:
            with self._wake:
                if not self._departures:
                    return
                departure = self._departures.popleft()
            self._see_off(departure)

    def _see_off(self, departure: Departure) -> None:
        """Scrub first: what the scrub has emptied is unmapped in no time, under a lock that every thread shares."""
        chunk = max(1, _SCRUB_BYTES // self.handle_bytes)
        try:
            for at in range(0, len(departure.offsets), chunk):
                departure.arena.scrub(departure.offsets[at : at + chunk])
            handles = departure.arena.unmap(departure.offsets)
        except DriverError as error:
            departure.error = error
            return
        try:
            self.put(handles)
        except DriverError as error:
            self._refusal = error
        departure.done = True

    def _create(self, stripes: int) -> list[Handle]:
        """Already charged; the charge is given back if the driver refuses."""
        if not stripes:
            return []
        try:
            return self.driver.create(self.handle_bytes, stripes * self.handles_per_stripe)
        except DriverError:
            self.budget.give(stripes * self.stripe_bytes)
            raise

    def _release(self, handles: Sequence[Handle]) -> None:
        """What the driver will not take back stays charged."""
        if handles:
            self.driver.release(handles)
            self.budget.give(len(handles) * self.handle_bytes)
