"""The process behind `chimera serve`: starts the others, starts again those that die, and lets nobody outlive it.

Owns the processes, the run directory and the port. Serves nothing itself and decides nothing about models; it reads the news
from control to tell how the start goes, and the operator's files when it is asked to. Workers are not its children but come to
it when their parent dies, so at the end it can make sure of everyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from chimera.cli import port as port_of
from chimera.cli import run_dir
from chimera.cli.cast import cast, write_down
from chimera.cli.children import Child, become_subreaper, child_pids
from chimera.cli.refiling import Refiling
from chimera.cli.service import Service
from chimera.core.gpu import Gpu
from chimera.core.replica import ReplicaId
from chimera.msg.events import ActivationFailed, ReplicaReady
from chimera.msg.stream import EntryFiled, Hello, ReloadWanted
from chimera.wire.codec import Message
from chimera.wire.link import Link

SHORT_LIFE_S = 5.0
MOST_SHORT_LIVES = 5
"""A process that dies so often, each time so soon, will not be helped by starting it again."""
FIRST_PAUSE_S = 0.1
LEAVE_S = 5.0
"""What a process without work is given to leave in order."""
ASK_AGAIN_S = 0.05
PORT_IN_USE = 2
"""The exit status by which a front-end says so."""


class Supervisor:
    def __init__(self, service: Service, say: Callable[[str], None]) -> None:
        self._service = service
        self._say = say
        self._began_s = time.monotonic()
        self._dir = Path()
        self._children: list[Child] = []
        self._preloaded = False
        self._status = 0
        self._told = asyncio.Event()
        """To stop, by a signal or because there is no use in going on."""
        self._hurry = asyncio.Event()
        self._fronts_awaited = {f"front-{i}" for i in range(service.fronts)}
        self._fronts_here = asyncio.Event()
        self._waiting_for = {seat.replica for seat in service.wanted.seats}
        self._failures: dict[ReplicaId, int] = {}
        self._ready_models: set[ReplicaId] = set()
        self._settled = asyncio.Event()
        if not self._waiting_for:
            self._settled.set()
        self._refiling: Refiling | None = None

    async def run(self) -> int:
        """From the first process to the last; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._tell)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(signal.SIGHUP, self._reread)
        become_subreaper()
        with port_of.reserve(self._service.host, self._service.port) as port:
            self._dir = run_dir.make(self._service.run_dir)
            news = Link(self._dir / "control.sock", on_open=lambda: self._greet(news), on_message=self._hear)
            self._refiling = Refiling(self._service.filing, news, self._say)
            starting = asyncio.create_task(self._start(port, news))
            try:
                await self._told.wait()
            finally:
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                await self._refiling.close()
                await news.close()
                await self._stop()
                run_dir.remove(self._dir)
        return self._status

    # Starting.

    async def _start(self, port: int, news: Link) -> None:
        service = self._service
        write_down(service, self._dir)
        self._say(f"{_count(len(service.models), 'model')} on {_gpus(service.gpus)}, engine {service.engine}")
        self._children = cast(service, self._dir, port)
        for child in self._children:
            child.launch(service.log_dir)
        news.start()
        await self._parent_ready()
        self._preloaded = True
        self._say(f"engine preloaded ({self._elapsed})")
        await self._fronts_ready(port)
        if self._service.async_loading:
            self._say(f"listening on {self._url(port)}, models come one by one")
        await self._settled.wait()
        self._announce(port)

    async def _parent_ready(self) -> None:
        listening = asyncio.Event()
        link = Link(self._dir / "parent.sock", on_open=listening.set, on_message=lambda _: None)
        link.start()
        try:
            await listening.wait()
        finally:
            await link.close()

    async def _fronts_ready(self, port: int) -> None:
        """Until control has met each of them, and the port is answered."""
        await self._fronts_here.wait()
        while not await answers(port_of.reachable(self._service.host), port, self._tls):  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(ASK_AGAIN_S)

    def _greet(self, news: Link) -> None:
        news.send(Hello(role="supervisor", name="supervisor", pid=os.getpid()))

    def _hear(self, message: Message) -> None:
        match message:
            case Hello(role="front", name=name):
                self._fronts_awaited.discard(name.partition(".")[0])
                if not self._fronts_awaited:
                    self._fronts_here.set()
            case ReplicaReady(replica=replica) if replica not in self._ready_models:
                self._ready_models.add(replica)
                self._progress(replica, f"ready in {message.load_s:.1f} s")
            case ActivationFailed(replica=replica):
                self._failures[replica] = self._failures.get(replica, 0) + 1
                if message.permanent or self._failures[replica] == 3:
                    self._progress(replica, f"cannot be served: {message.reason}")
            case ReloadWanted() | EntryFiled() if self._refiling is not None:
                self._refiling.order(message)
            case _:
                return
        if not self._waiting_for:
            self._settled.set()

    def _progress(self, replica: ReplicaId, what: str) -> None:
        if replica in self._waiting_for:
            self._waiting_for.discard(replica)
            total = len(self._service.wanted.seats)
            self._say(f"[{total - len(self._waiting_for)}/{total}] {replica.model} {what}")

    def _announce(self, port: int) -> None:
        wanted = {seat.replica for seat in self._service.wanted.seats}
        total, ready = len(wanted), len(wanted & self._ready_models)  # a policy may have brought up others as well
        if total and not ready:
            self._give_up("no model could be brought up")
            return
        short = "" if ready == total else f", {total - ready} of {total} models missing"
        self._say(f"ready in {self._elapsed}: {self._url(port)}{short} (Ctrl-C stops)")

    def _url(self, port: int) -> str:
        host = port_of.reachable(self._service.host)
        scheme = "https" if self._tls else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def _tls(self) -> bool:
        return self._service.access.tls_cert is not None

    @property
    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._began_s:.1f} s"

    def _reread(self) -> None:
        if self._refiling is not None:
            self._refiling.order(None)

    # Watching.

    def _tell(self) -> None:
        """A signal: the first drains, the second does not wait."""
        if self._told.is_set():
            self._hurry.set()
        self._told.set()

    def _give_up(self, why: str) -> None:
        self._say(f"giving up: {why}")
        self._status = 1
        self._told.set()

    def _reap(self) -> None:
        """Somebody is gone: one of ours, or a worker that came to us when its parent died."""
        while True:
            try:
                gone = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if gone is None:
                return
            child = next((c for c in self._children if c.process is not None and c.process.pid == gone.si_pid), None)
            if child is not None and child.process is not None:
                status = gone.si_status if gone.si_code == os.CLD_EXITED else -gone.si_status
                child.process.returncode = status
                self._lost(child, status)

    def _lost(self, child: Child, status: int) -> None:
        child.gone.set()
        if self._told.is_set():
            return
        how = f"exit {status}" if status >= 0 else signal.Signals(-status).name
        if child.name.startswith("front") and status == PORT_IN_USE:
            self._give_up(f"port {self._service.port} was taken by somebody else")
            return
        if child.name == "parent" and status > 0 and not self._preloaded:
            self._give_up(f"the engine {self._service.engine} cannot be loaded ({how})")
            return
        child.short_lives = child.short_lives + 1 if time.monotonic() - child.started_s < SHORT_LIFE_S else 0
        if child.short_lives >= MOST_SHORT_LIVES:
            self._give_up(f"{child.name} dies again and again ({how})")
            return
        self._say(f"{child.name} died ({how}); it is started again")
        pause_s = 0.0 if child.short_lives <= 1 else FIRST_PAUSE_S * 2.0**child.short_lives
        asyncio.get_running_loop().call_later(pause_s, self._relaunch, child)

    def _relaunch(self, child: Child) -> None:
        if self._told.is_set():
            return
        if child.name == "parent":
            for left in self._dir.glob("parent.*"):
                left.unlink()
        child.launch(self._service.log_dir)

    # Stopping.

    async def _stop(self) -> None:
        """Front-ends first, while everyone is there to finish their answers; then control, which would want the models
        back; then the agent and its workers; then whoever is left."""
        fronts = [child for child in self._children if child.name.startswith("front")]
        control = [child for child in self._children if child.name == "control"]
        if self._children and not self._hurry.is_set():
            answers_have = f": open answers have {self._service.drain_s:g} s" if self._fronts_here.is_set() else ""
            self._say(f"stopping{answers_have} (Ctrl-C again stops at once)")
        for group, patience_s in ((fronts, self._service.drain_s + LEAVE_S), (control, LEAVE_S), (self._children, LEAVE_S)):
            for child in group:
                child.signal(signal.SIGTERM)
            await self._all_gone(group, patience_s)
        self._end_everyone()

    async def _all_gone(self, group: list[Child], patience_s: float) -> None:
        """Until the last of the group has left, or patience ends, or the operator's does."""
        if self._hurry.is_set():
            return
        hurry = asyncio.create_task(self._hurry.wait())
        everyone = asyncio.create_task(self._last_of(group))
        await asyncio.wait([everyone, hurry], timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        everyone.cancel()
        await asyncio.gather(hurry, everyone, return_exceptions=True)

    async def _last_of(self, group: list[Child]) -> None:
        for child in group:
            if child.process is not None:
                await child.gone.wait()

    def _end_everyone(self) -> None:
        """Kill what is left, generation after generation: the orphans of the killed come to us."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        while pids := child_pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        for child in self._children:
            if child.process is not None and child.process.returncode is None:
                child.process.returncode = -signal.SIGKILL


async def answers(host: str, port: int, tls: bool = False) -> bool:
    """Whether a front-end is there and fit to serve."""
    context = None
    if tls:  # it is our own, on this machine, under a name that the certificate need not have
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:
        return False
    try:
        writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status = await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()
    return status.startswith(b"HTTP/1.1 200")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _gpus(gpus: tuple[Gpu, ...]) -> str:
    virtual = "virtual " if gpus and gpus[0].virtual else ""
    return _count(len(gpus), f"{virtual}GPU")
