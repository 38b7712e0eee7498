"""The preloaded parent: imports an engine once and forks a worker whenever an agent asks.

Single-threaded on purpose, and it never touches a device: what it holds is what every child starts with. It ends with
the process that started it; its children belong to their agents.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from chimera.engine.api import CannotServe, Engine, Parking
from chimera.engine.preload import NAMES, preload
from chimera.msg.stream import Fork, Forked, Stop
from chimera.weights.store import WeightStore
from chimera.wire.blocking import BlockingChannel
from chimera.wire.process import start_logging
from chimera.worker import process

if TYPE_CHECKING:
    from chimera.spans.engine import EngineSpans

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class Parent:
    def __init__(
        self, socket_path: Path, make_engine: Callable[[], Engine], make_spans: Callable[[str], EngineSpans] | None = None
    ) -> None:
        """`make_spans`, where spans are told, is called in the child: what sends them has a thread of its own."""
        self._make_engine = make_engine
        self._make_spans = make_spans
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(socket_path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._channels: list[BlockingChannel] = []

    def run(self) -> None:
        """Fork on request until told to stop."""
        # Nobody here waits for children: agents see them go by their pidfd.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif self._serve(key.data):
                    return

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        channel = BlockingChannel(connection)
        self._channels.append(channel)
        self._selector.register(channel.fileno(), selectors.EVENT_READ, channel)

    def _serve(self, channel: BlockingChannel) -> bool:
        """One channel's news; whether to stop."""
        for message in channel.receive(0):
            match message:
                case Fork(worker=worker, agent_socket=agent_socket):
                    channel.send(Forked(worker=worker, pid=self._fork(worker, Path(agent_socket))))
                case Stop():
                    return True
        if channel.closed:
            self._selector.unregister(channel.fileno())
            self._channels.remove(channel)
            channel.close()
        return False

    def _fork(self, worker: str, agent_socket: Path) -> int:
        pid = os.fork()
        if pid == 0:
            self._become(worker, agent_socket)
        log.info("forked worker=%s pid=%d", worker, pid)
        return pid

    def _become(self, worker: str, agent_socket: Path) -> NoReturn:
        """In the child: let go of everything of the parent's, then be a worker until the end."""
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the supervisor to translate
            self._selector.close()
            self._listener.close()
            for channel in self._channels:
                channel.close()
            gc.enable()
            spans = None if self._make_spans is None else self._make_spans(worker)
            status = process.run(worker, agent_socket, self._make_engine, spans)
        except BaseException:
            log.critical("worker %s failed", worker, exc_info=True)
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # no parent's atexit handlers, no parent's buffers


def _spans(exporter: str) -> Callable[[str], EngineSpans]:
    """Imported here, once for all workers."""
    from chimera.spans.engine import EngineSpans
    from chimera.spans.spans import exported

    return lambda worker: EngineSpans(exported(worker, exporter))


def end_with_starter() -> None:
    """Ask the kernel to end this process when the one that started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(prog="chimera.worker.parent", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where agents ask for workers")
    parser.add_argument("--engine", choices=NAMES, default="sglang")
    parser.add_argument("--images", type=Path, metavar="DIR", help="share weights there, as images of the loaded models")
    parser.add_argument("--images-bytes", type=int, metavar="N", help="how much the images may take (default: what is free)")
    parser.add_argument("--parked-models", type=int, default=0, metavar="N", help="keep so many that have left a worker in it")
    parser.add_argument("--parked-bytes", type=int, metavar="N", help="and so much of a GPU (default: by their number)")
    parser.add_argument("--host-kv-bytes", type=int, default=0, metavar="N", help="and so much of their caches on the host")
    parser.add_argument("--traces", metavar="EXPORTER", help="send spans of engines by this exporter of OpenTelemetry's")
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    start_logging("parent", arguments.log_level)
    end_with_starter()
    try:
        images = None if arguments.images is None else WeightStore(arguments.images, arguments.images_bytes)
        parking = Parking(models=arguments.parked_models, nbytes=arguments.parked_bytes, host_kv_bytes=arguments.host_kv_bytes)
        make_engine = preload(arguments.engine, images, parking)
    except CannotServe as fault:
        print(fault, file=sys.stderr)
        return 1
    # A temporary name until it listens: whoever sees the socket can use it.
    temporary = arguments.socket.with_suffix(".starting")
    parent = Parent(temporary, make_engine, None if arguments.traces is None else _spans(arguments.traces))
    temporary.rename(arguments.socket)
    log.info("preloaded engine=%s", arguments.engine)
    parent.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
