"""`python -m chimera.server`: one front-end process. SIGTERM or SIGINT drains it, a second one ends it at once."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chimera.core.access import Access
from chimera.server.front import FrontEnd, listen
from chimera.wire import process

if TYPE_CHECKING:
    from chimera.spans.client import ClientSpans

PORT_IN_USE = 2


def main() -> int:
    arguments = _parser().parse_args()
    process.start_logging(arguments.name, arguments.log_level)
    try:
        listener = listen(arguments.host, arguments.port)
    except OSError as fault:
        print(f"cannot listen on {arguments.host}:{arguments.port}: {fault.strerror or fault}", file=sys.stderr)
        return PORT_IN_USE
    _run(_serve(arguments, listener))
    return 0


async def _serve(arguments: argparse.Namespace, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    told, told_twice = asyncio.Event(), asyncio.Event()

    def tell() -> None:
        (told_twice if told.is_set() else told).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell)
    starter = os.getppid()
    # No two front-ends ever have the same name: who looks for a dead one must not find its successor.
    name = f"{arguments.name}.{os.getpid()}"
    front = FrontEnd(
        run_dir=arguments.run_dir,
        name=name,
        listener=listener,
        access=_access(arguments.access),
        metrics=not arguments.no_metrics,
        records=arguments.records,
        record_texts=arguments.record_prompts,
        spans=None if arguments.traces is None else _spans(name, arguments.traces),
    )
    await front.start()
    gc.collect()
    gc.freeze()  # what start-up made stays; looking through it again would cost every stream a pause
    await told.wait()
    if os.getppid() != starter:  # the server was killed: its answers end now, and not as if they were whole
        told_twice.set()
    draining, hurrying = asyncio.create_task(front.drain(arguments.drain_s)), asyncio.create_task(told_twice.wait())
    await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurrying.cancel()
    await front.close()


def _access(path: Path | None) -> Access:
    return Access() if path is None else msgspec.json.decode(path.read_bytes(), type=Access)


def _spans(name: str, exporter: str) -> ClientSpans:
    from chimera.spans.client import ClientSpans  # of an extra, and slow to import
    from chimera.spans.spans import exported

    return ClientSpans(exported(name, exporter))


def _run(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # not on every machine; the same, only slower
        asyncio.run(main)
    else:
        uvloop.run(main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m chimera.server", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the server's private directory, with control's socket")
    parser.add_argument("--name", required=True, help="this front-end's name; workers find it by it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="several front-ends may share it; 0 lets the system choose")
    parser.add_argument("--access", type=Path, help="who may ask for what, as whoever starts this has written it down")
    parser.add_argument("--drain-s", type=float, default=30.0, help="how long open answers may go on after SIGTERM")
    parser.add_argument("--records", type=Path, help="the file that control keeps its records in")
    parser.add_argument("--record-prompts", action="store_true", help="have what is asked and answered kept there as well")
    parser.add_argument("--traces", metavar="EXPORTER", help="send a span of each request by this exporter of OpenTelemetry's")
    parser.add_argument("--no-metrics", action="store_true", help="count nothing and tell nothing for the records")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
