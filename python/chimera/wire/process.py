"""What every process of ours that lives in an event loop does alike: end in order on SIGTERM, and end at once, with a
report, at the first error that nobody expected. Knows nothing of what the process is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from chimera.units import printable

_log = logging.getLogger(__name__)


def start_logging(name: str, level: str) -> None:
    """To standard error, each line under the name of its process."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(f"%(asctime)s %(levelname).1s {name} %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class OneLine(logging.Formatter):
    """A message is one line, whatever names are in it; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def fresh_log(path: Path) -> Callable[[bytes], object]:
    """Where a new life of a process writes its log: a new file. An earlier life's is kept beside it, under a number."""
    if path.exists():
        number = sum(1 for _ in path.parent.glob(f"{path.stem}.*{path.suffix}"))
        path.rename(path.with_suffix(f".{number + 1}{path.suffix}"))
    return _WholeLines(path).write


class _WholeLines:
    """A log without gaps, or none: where the disk is full it ends with its last whole line, and the process goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._bytes = 0

    def write(self, line: bytes) -> None:
        if self._file.closed:
            return
        try:
            written = self._file.write(line)
        except OSError as fault:
            self._end(fault.strerror or str(fault))
        else:
            if written == len(line):
                self._bytes += written
            else:
                self._end("there was no room for a whole line")

    def _end(self, why: str) -> None:
        self._file.truncate(self._bytes)
        self._file.close()
        _log.error("nothing more is written to %s: %s; the process goes on", self._path, why)


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main(stop)` to its end; `stop` is set by SIGTERM. Returns the exit status.

    An exception in a callback ends the process too: its state can no longer be trusted, and it is started again.
    """
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        return runner.run(_guarded(main))


async def _guarded(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    broken: asyncio.Future[int] = loop.create_future()

    def on_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        cause = context.get("exception")
        if cause is None or isinstance(cause, OSError):  # the world's doing, not ours: a full table of files, a peer's reset
            _log.error("%s: %s", context["message"], cause)
            return
        _log.critical("%s", context["message"], exc_info=cause)
        if not broken.done():
            broken.set_result(1)

    loop.set_exception_handler(on_error)
    task: asyncio.Future[None] = asyncio.ensure_future(main(stop))
    either: tuple[asyncio.Future[Any], ...] = (task, broken)
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return broken.result()
    task.result()
    return 0


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # everything works without it, a little slower
        return None
    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return make
