"""When each request is sent: by the clock (open loop), or as soon as another is answered (closed loop).

The clock is monotonic. A server that cannot be reached any more ends the sending: what was sent stays, and the ending says
that it is not all.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from chimera.bench.dialect import Dialect, refused
from chimera.bench.record import Record
from chimera.bench.stream import Call, Target
from chimera.core.metrics import percentile

LATE_S = 0.010
MOST_LATE = 0.05
"""If more of the requests were sent later than LATE_S after their time, the load was not the one that was asked for."""
_OK = 200
_SWEEP_S = 0.25
_GONE_AFTER_S = 1.0
_FIRST = -10
"""The niceness of whoever makes the load, where it may choose."""


@dataclass(frozen=True, slots=True)
class Job:
    record: Record
    target: Target
    message: bytes


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a run went, apart from its answers."""

    planned: int
    sent: int
    wall_s: float
    """From the first planned moment until the last answer."""
    partial: str = ""
    """Why not all was sent, if it was not."""
    lag_p50_s: float = 0.0
    lag_p99_s: float = 0.0
    lag_max_s: float = 0.0
    late: float = 0.0
    """Share of the requests that were sent more than LATE_S after their time."""

    @property
    def is_late(self) -> bool:
        return self.late > MOST_LATE


@dataclass
class Terms:
    timeout_s: float = 600.0
    """Of one request."""
    drain_s: float = 60.0
    """How long answers may take after the last request was sent; those still open then count as sent and not answered."""
    connections: int = 16
    """Opened beforehand."""
    keep: Callable[[Record], None] = field(default=lambda record: None)
    """Told of every request that ends, as it does."""


class Run:
    """One run of these jobs; used once."""

    def __init__(self, jobs: Sequence[Job], dialect: Dialect, terms: Terms) -> None:
        self._jobs = jobs
        self._dialect = dialect
        self._terms = terms
        self._open: dict[Call, Record] = {}
        self._next = 0
        self._zero_s = 0.0
        self._over = asyncio.Event()
        self._stopped = ""
        self._by_clock = True
        self._timer: asyncio.TimerHandle | None = None
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def now_s(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self._zero_s

    async def open_loop(self) -> Ending:
        return await self._run(self._pump)

    async def closed_loop(self, concurrency: int) -> Ending:
        self._by_clock = False

        def begin() -> None:
            for _ in range(concurrency):
                self._send_next()

        return await self._run(begin)

    def stop(self, why: str) -> None:
        """Nothing more is sent, and nothing more is waited for."""
        if not self._stopped:
            self._stopped = why
            self._next = len(self._jobs)
            self._settle()

    async def _run(self, begin: Callable[[], None]) -> Ending:
        targets = {id(job.target): job.target for job in self._jobs}
        await asyncio.gather(*(target.warm(self._terms.connections) for target in targets.values()))
        with _undisturbed():
            self._zero_s = time.perf_counter()
            sweeping = asyncio.create_task(self._sweep())
            begin()
            self._settle()
            await self._over.wait()
            sweeping.cancel()
        wall_s = self.now_s
        for call in list(self._open):
            call.give_up("open")
        for target in targets.values():
            target.close()
        return self._ending(wall_s)

    def _pump(self) -> None:
        """All that is due is sent, and the rest is waited for."""
        jobs = self._jobs
        now_s = self.now_s
        while self._next < len(jobs) and jobs[self._next].record.planned_s <= now_s:
            self._send_next()
            now_s = self.now_s
        if self._next < len(jobs):
            wait_s = jobs[self._next].record.planned_s - now_s
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._pump)

    def _send_next(self) -> None:
        if self._next == len(self._jobs):
            return
        job = self._jobs[self._next]
        self._next += 1
        record, hear = job.record, self._dialect.hear
        if not self._by_clock:
            record.planned_s = self.now_s

        def written() -> None:
            record.sent_s = self.now_s

        def heard(event: bytes) -> bool:
            at_s = self.now_s
            try:
                return hear(event, record, at_s)
            except msgspec.DecodeError as fault:
                record.refusal, record.error = "strange", f"an event that cannot be read: {fault}"
                return True

        call = Call(job.message, written, heard, self._ended)
        self._open[call] = record
        job.target.send(call)

    def _ended(self, call: Call, why: str) -> None:
        record = self._open.pop(call, None)
        if record is None:
            return
        record.ended_s = self.now_s
        record.status = call.status
        if why:
            record.refusal, _, record.error = why.partition(": ")
            if record.refusal == "unreachable":
                self._ask_after(call)
        elif call.status != _OK:
            refused(record, call.status, call.body)
        elif record.last_token_s is None and not record.refusal:
            if record.output_tokens:  # of tokens that say nothing only the end is seen
                record.first_token_s = record.last_token_s = record.ended_s
            else:
                record.refusal, record.error = "empty", "the answer has no token"
        if record.answered and not record.output_tokens:
            record.output_tokens = len(record.pieces_s) + 1
        self._terms.keep(record)
        if not self._by_clock:
            self._send_next()
        self._settle()

    def _ask_after(self, call: Call) -> None:
        if self._stopped or self._asking:
            return
        target = next(job.target for job in self._jobs if job.message is call.message)
        task = asyncio.create_task(self._gone(target))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _gone(self, target: Target) -> None:
        """One refused connection may be a restart; a second one a moment later is taken for the end."""
        await asyncio.sleep(_GONE_AFTER_S)
        if not await target.is_there():
            sent = self._next
            self.stop(f"{target.url} was gone after {self.now_s:.1f} s; {sent} of {len(self._jobs)} requests were sent")

    def _settle(self) -> None:
        if self._next == len(self._jobs) and (self._stopped or not self._open):
            if self._timer is not None:
                self._timer.cancel()
            self._over.set()

    async def _sweep(self) -> None:
        """Ends what takes too long."""
        last_sent_s: float | None = None
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = self.now_s
            for call, record in list(self._open.items()):
                if record.sent_s is not None and now_s - record.sent_s > self._terms.timeout_s:
                    call.give_up(f"timeout: no end within {self._terms.timeout_s:g} s")
            if self._next == len(self._jobs):
                last_sent_s = now_s if last_sent_s is None else last_sent_s
                if now_s - last_sent_s > self._terms.drain_s:
                    self._over.set()

    def _ending(self, wall_s: float) -> Ending:
        sent = [job.record for job in self._jobs if job.record.sent_s is not None]
        lags = sorted(max(0.0, record.lag_s) for record in sent) or [0.0]
        return Ending(
            planned=len(self._jobs),
            sent=len(sent),
            wall_s=wall_s,
            partial=self._stopped,
            lag_p50_s=percentile(lags, 50),
            lag_p99_s=percentile(lags, 99),
            lag_max_s=lags[-1],
            late=sum(lag > LATE_S for lag in lags) / len(lags),
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A collection of garbage takes longer than a request may be late; and so may a server that wants every core."""
    was_on, niceness = gc.isenabled(), os.getpriority(os.PRIO_PROCESS, 0)
    gc.collect()
    gc.freeze()
    gc.disable()
    with contextlib.suppress(PermissionError):  # only root may come before others
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
        gc.unfreeze()
        if was_on:
            gc.enable()
