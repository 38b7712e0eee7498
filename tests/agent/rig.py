"""Control and an agent in one event loop over real sockets, real workers forked from a real parent, and a client."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
from chimera.agent.agent import Agent
from chimera.agent.watchdog import SILENT_S
from chimera.control.exchange import Exchange
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.core.request import Request
from chimera.core.snapshot import Snapshot
from chimera.msg import actions, events, stream
from chimera.msg.events import Outcome
from chimera.wire.channel import Channel, Server, connect, serve
from chimera.wire.codec import Message

PATIENCE_S = 10.0


def model(name: str, *, kv_bytes_per_token: int = 1 << 10, **costs: float) -> ModelSpec:
    return ModelSpec(
        name=name,
        path=f"/nowhere/{name}",
        tokenizer_path=f"/nowhere/{name}",
        architecture="Simulated",
        weight_bytes=1 << 20,
        kv_bytes_per_token=kv_bytes_per_token,
        context_length=4096,
        drain_s=5.0,
        engine="simulated",
        engine_args=dict(costs),
    )


def on_gpu(name: str, gpu_id: int = 0) -> Seat:
    return Seat(replica=ReplicaId(name), gpu_ids=(gpu_id,))


def gpus(count: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(gpu_id=i, capacity_bytes=2 << 30, virtual=True) for i in range(count))


@contextmanager
def parent() -> Iterator[Path]:
    """The preloaded parent's socket."""
    with tempfile.TemporaryDirectory(prefix="chimera-test-") as folder:
        socket = Path(folder) / "parent.sock"
        command = [sys.executable, "-m", "chimera.worker.parent", "--socket", str(socket), "--engine", "simulated"]
        process = subprocess.Popen([*command, "--log-level", "warning"])
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            while not socket.exists():
                assert process.poll() is None, "the parent has died"
                assert time.monotonic() < deadline_s, "the parent does not come up"
                time.sleep(0.01)
            yield socket
        finally:
            process.terminate()
            process.wait()


class Answer:
    """What became of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self.outcome: Outcome | None = None
        self.verdict: Message | None = None
        """The `Reject`, `Requeue` or `Failed` that ended it."""


class Front:
    """A front-end as control and workers see one."""

    def __init__(self, run_dir: Path, name: str = "front-0") -> None:
        self.name = name
        self.answers: dict[str, Answer] = {}
        self.models: asyncio.Queue[str] = asyncio.Queue()
        self._run_dir = run_dir
        self._snapshots: asyncio.Queue[Snapshot] = asyncio.Queue()
        self._control: Channel | None = None
        self._server: Server | None = None

    async def start(self, pid: int | None = None) -> None:
        self._server = await serve(self._run_dir / f"{self.name}.sock", lambda channel: channel.deliver_to(self._worker_says))
        await self.meet_control(pid)

    async def meet_control(self, pid: int | None = None) -> None:
        self._control = await connect(self._run_dir / "control.sock")
        self._control.send(stream.Hello(role="front", name=self.name, pid=pid or os.getpid()))
        self._control.deliver_to(self._control_says)

    async def stop(self) -> None:
        assert self._control is not None and self._server is not None
        self._control.close()
        await self._control.wait_closed()
        await self._server.close()

    def ask(self, request_id: str, of: str, *, prompt: Sequence[int] = (1, 2, 3), tokens: int = 4, tries: int = 0) -> Answer:
        answer = self.answers[request_id] = Answer()
        self.send(enqueue(request_id, of, self.name, prompt, tokens, tries))
        return answer

    def send(self, message: Message) -> None:
        assert self._control is not None
        self._control.send(message)

    async def snapshot(self) -> Snapshot:
        self.send(stream.SnapshotWanted())
        return await asyncio.wait_for(self._snapshots.get(), PATIENCE_S)

    def _control_says(self, message: Message) -> None:
        match message:
            case events.ModelRegistered(model=spec):
                self.models.put_nowait(spec.name)
            case actions.Reject(request_id=request_id) | actions.Requeue(request_id=request_id):
                self._end(request_id, message)
            case stream.SnapshotTaken(snapshot=snapshot):
                self._snapshots.put_nowait(snapshot)

    def _worker_says(self, message: Message) -> None:
        match message:
            case stream.Tokens(deltas=deltas):
                for delta in deltas:
                    answer = self.answers.get(delta.request_id)
                    if answer is None:
                        continue
                    assert not answer.ended.is_set(), "tokens after the end"
                    answer.token_ids += delta.token_ids
                    answer.began.set()
                    if delta.outcome is not None:
                        answer.outcome = delta.outcome
                        answer.ended.set()
            case stream.Failed(request_id=request_id):
                self._end(request_id, message)

    def _end(self, request_id: str, verdict: Message) -> None:
        answer = self.answers.get(request_id)
        if answer is not None:
            assert not answer.ended.is_set(), "a request ends once"
            answer.verdict = verdict
            answer.ended.set()


def enqueue(request_id: str, of: str, front: str, prompt: Sequence[int], tokens: int, tries: int) -> stream.Enqueue:
    request = Request(
        request_id=request_id,
        model=of,
        front=front,
        prompt_tokens=len(prompt),
        max_tokens=tokens,
        arrived_s=time.monotonic(),
        tries=tries,
    )
    payload = stream.Payload(input_ids=list(prompt), sampling=stream.Sampling(max_new_tokens=tokens))
    return stream.Enqueue(request=request, payload=msgspec.msgpack.encode(payload))


class System:
    """Control, one agent, and whatever front-ends a test makes; each may die and come back."""

    def __init__(self, run_dir: Path, models: Sequence[ModelSpec], wanted: Placement, gpu_count: int, elastic: bool) -> None:
        self.run_dir = run_dir
        self._models = models
        self._wanted = wanted
        self._gpu_count = gpu_count
        self._elastic = elastic
        self.silent_s = SILENT_S
        self.news: asyncio.Queue[Message] = asyncio.Queue()

    async def start_control(self) -> None:
        self.control = Exchange(models=self._models, wanted=self._wanted, socket=self.run_dir / "control.sock")
        await self.control.start()
        self.watcher = await connect(self.run_dir / "control.sock")
        self.watcher.send(stream.Hello(role="cli", name="test", pid=os.getpid()))
        self.watcher.deliver_to(self.news.put_nowait)

    async def start_agent(self) -> None:
        self.agent = Agent(
            name="local",
            agent_start=time.time_ns(),
            gpus=gpus(self._gpu_count),
            run_dir=self.run_dir,
            elastic=self._elastic,
            silent_s=self.silent_s,
        )
        await self.agent.start()

    async def kill_agent(self) -> None:
        """Its connections end, nobody is told anything, and what it remembers is gone."""
        dead = self.agent
        dead._pool._stopping = True
        await dead._control.close()
        await dead._pool._parent.close()
        assert dead._pool._server is not None
        await dead._pool._server.close()
        for worker in dead._pool:
            if worker.vigil is not None:
                worker.vigil.close()
        for timer in (dead._timer, dead._memory_timer, dead._ledger_timer):
            if timer is not None:
                timer.cancel()

    async def until(self, kind: type[Message] | type[events.Event], count: int = 1) -> list[Message]:
        """The next `count` pieces of news of this kind."""
        found: list[Message] = []
        while len(found) < count:
            message = await asyncio.wait_for(self.news.get(), PATIENCE_S)
            if isinstance(message, kind):
                found.append(message)
        return found

    def workers(self) -> list[int]:
        return [worker.vigil.pid for worker in self.agent._pool if worker.vigil is not None]

    def check(self) -> None:
        self.control.scheduler.check()
        self.agent.scheduler.check()


@asynccontextmanager
async def system(
    parent_socket: Path,
    models: Sequence[ModelSpec],
    wanted: Sequence[Seat] | None = None,
    gpu_count: int = 1,
    elastic: bool = False,
    silent_s: float = SILENT_S,
) -> AsyncIterator[tuple[System, Front]]:
    """Everything up, with one front-end; afterwards everything down, and nothing left."""
    with tempfile.TemporaryDirectory(prefix="chimera-test-") as folder:
        run_dir = Path(folder)
        (run_dir / "parent.sock").symlink_to(parent_socket)
        seats = tuple(on_gpu(m.name) for m in models) if wanted is None else tuple(wanted)
        made = System(run_dir, models, Placement(seats), gpu_count, elastic)
        made.silent_s = silent_s
        front = Front(run_dir)
        await made.start_control()
        await made.start_agent()
        await front.start()
        try:
            yield made, front
            made.check()
        finally:
            pids = made.workers()
            await made.agent.stop(drain_s=0.0)
            await front.stop()
            made.watcher.close()
            await made.control.stop()
        assert not any(alive(pid) for pid in pids), "a worker is left"
        assert sockets(run_dir) == ["parent.sock"], "a socket is left"


def sockets(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.glob("*.sock")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
