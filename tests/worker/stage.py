"""A stand-in agent and front-end around a real parent and real workers, over real sockets."""

import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import actions, events, stream
from chimera.wire.blocking import BlockingChannel

M = TypeVar("M")
PATIENCE_S = 30.0


def model(name: str, path: str = "", **fields: Any) -> ModelSpec:
    defaults = {"architecture": "any", "weight_bytes": 1, "kv_bytes_per_token": 4096, "context_length": 4096}
    return ModelSpec(name=name, path=path, tokenizer_path=path, **(defaults | fields))


def payload(prompt: list[int], max_new_tokens: int, **sampling: Any) -> bytes:
    settings = {"temperature": 0.0, "ignore_eos": True} | sampling
    return msgspec.msgpack.encode(
        stream.Payload(input_ids=prompt, sampling=stream.Sampling(max_new_tokens=max_new_tokens, **settings))
    )


class Listener:
    """Accepts one kind of peer and greets it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._socket.settimeout(PATIENCE_S)

    def accept(self) -> BlockingChannel:
        connection, _ = self._socket.accept()
        return BlockingChannel(connection)

    def close(self) -> None:
        self._socket.close()


class Inbox:
    """A channel's messages one by one, whatever pieces they come in."""

    def __init__(self, channel: BlockingChannel) -> None:
        self.channel = channel
        self._ready: list[Any] = []

    def take(self, patience_s: float) -> list[Any]:
        """Whatever is there."""
        ready, self._ready = self._ready, []
        return ready or self.channel.receive(patience_s)

    def next(self, kind: type[M], patience_s: float = PATIENCE_S, past: tuple[type, ...] = ()) -> M:
        """The next message of this kind; counters on the way are skipped, anything else is a failure."""
        deadline = time.monotonic() + patience_s
        while True:
            while self._ready:
                message = self._ready.pop(0)
                if isinstance(message, kind):
                    return message
                assert isinstance(message, (stream.Heartbeat, events.StepsTimed, *past)), (
                    f"expected {kind.__name__}, got {message}"
                )
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind.__name__} within {patience_s} s"
            self._ready = self.take(left)
            assert self._ready or not self.channel.closed, f"the peer ended instead of sending {kind.__name__}"


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    outcome: events.Outcome | None = None
    failed: stream.Failed | None = None

    @property
    def over(self) -> bool:
        return self.outcome is not None or self.failed is not None


class Hired:
    """One worker, as its agent sees it."""

    def __init__(self, stage: "Stage", channel: BlockingChannel, pid: int) -> None:
        self.stage = stage
        self.channel = channel
        self.inbox = Inbox(channel)
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.counter = 0

    def activate(self, spec: ModelSpec, kv_limit_bytes: int | None = None, lease: actions.FirstLease | None = None) -> Epoch:
        self.counter += 1
        epoch = Epoch(1, self.counter)
        seat = Seat(replica=ReplicaId(spec.name), gpu_ids=(0,), kv_limit_bytes=kv_limit_bytes)
        leases = () if lease is None else (lease,)
        self.channel.send(actions.Activate(model=spec, seat=seat, epoch=epoch, leases=leases, reason="a test wants it"))
        return epoch

    def become(
        self, spec: ModelSpec, kv_limit_bytes: int | None = None, lease: actions.FirstLease | None = None
    ) -> tuple[Epoch, events.ReplicaReady]:
        epoch = self.activate(spec, kv_limit_bytes, lease)
        return epoch, self.inbox.next(events.ReplicaReady)

    def grant(self, spec: ModelSpec, epoch: Epoch, revision: int, level: int) -> None:
        order = {"replica": ReplicaId(spec.name), "epoch": epoch, "gpu_id": 0, "revision": revision, "level": level}
        self.channel.send(actions.Grant(**order, reason="a test gives"))

    def recall(self, spec: ModelSpec, epoch: Epoch, revision: int, level: int, within_s: float) -> None:
        order = {"replica": ReplicaId(spec.name), "epoch": epoch, "gpu_id": 0, "revision": revision, "level": level}
        deadline_s = time.monotonic() + within_s
        self.channel.send(actions.Recall(**order, deadline_s=deadline_s, reason="a test takes"))

    def settles(self, revision: int, level: int, patience_s: float = PATIENCE_S) -> list[events.PagesReturned]:
        """Its answers to an order, until it has come down to the level."""
        answers: list[events.PagesReturned] = []
        while not answers or answers[-1].revision != revision or answers[-1].level > level:
            answers.append(self.inbox.next(events.PagesReturned, patience_s, past=(events.PagesWanted, events.RequestFinished)))
        return answers

    def submit(self, request_id: str, epoch: Epoch, content: bytes, front: str = "front-0") -> None:
        self.channel.send(stream.Submit(request_id=request_id, epoch=epoch, front=front, payload=content))

    def leave(self, model_name: str, epoch: Epoch, drain_s: float = 5.0) -> None:
        replica = ReplicaId(model_name)
        self.channel.send(actions.Deactivate(replica=replica, epoch=epoch, drain_s=drain_s, reason="a test is done"))

    def gone(self, patience_s: float = 5.0) -> bool:
        return bool(select.select([self.pidfd], [], [], patience_s)[0])

    def dismiss(self) -> None:
        self.channel.send(stream.Stop())
        assert self.gone(), "a worker told to stop ends"
        self.channel.close()
        os.close(self.pidfd)


class Stage:
    def __init__(self, folder: Path, engine: str, *options: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "chimera.worker.parent", "--socket", str(folder / "parent.sock"), "--engine", engine]
        self.parent = subprocess.Popen([*command, *options, "--log-level", "warning"])
        self._agent = Listener(folder / "agent-local.sock")
        self._front = Listener(folder / "front-0.sock")
        self._front_inbox: Inbox | None = None
        self.answers: dict[str, Answer] = {}
        self._wait_for_parent()

    def _wait_for_parent(self) -> None:
        deadline = time.monotonic() + 120
        while not (self.folder / "parent.sock").exists():
            assert self.parent.poll() is None, "the parent has ended"
            assert time.monotonic() < deadline, "the parent does not listen"
            select.select([], [], [], 0.02)
        self.forks = Inbox(BlockingChannel.connect(str(self.folder / "parent.sock")))

    def hire(self, name: str = "w0") -> Hired:
        self.forks.channel.send(stream.Fork(worker=name, agent_socket=str(self._agent.path)))
        forked = self.forks.next(stream.Forked)
        channel = self._agent.accept()
        hired = Hired(self, channel, forked.pid)
        hello = hired.inbox.next(stream.Hello)
        assert (hello.role, hello.name, hello.pid) == ("worker", name, forked.pid)
        return hired

    def new_act(self) -> None:
        """Forget the last worker and what it said."""
        self.answers.clear()
        if self._front_inbox is not None:
            self._front_inbox.channel.close()
        self._front_inbox = None

    @property
    def front_inbox(self) -> Inbox | None:
        """What the worker has streamed to the front-end; empty until it has connected."""
        return self._front_inbox

    def meet_worker(self) -> Inbox:
        """Accept the next worker's connection to the front-end."""
        self._front_inbox = Inbox(self._front.accept())
        self._front_inbox.next(stream.Hello)
        return self._front_inbox

    def read_front(self, until: Any, patience_s: float = PATIENCE_S) -> None:
        """Take in what the worker streams until the condition holds."""
        if self._front_inbox is None:
            self.meet_worker()
        assert self._front_inbox is not None
        deadline = time.monotonic() + patience_s
        while not until():
            assert time.monotonic() < deadline, f"not within {patience_s} s: {self.answers}"
            messages = self._front_inbox.take(deadline - time.monotonic())
            assert messages, f"the worker's stream ended: {self.answers}"
            for message in messages:
                self._take(message)

    def finished(self, *request_ids: str) -> list[Answer]:
        self.read_front(lambda: all(self.answers.get(r, Answer()).over for r in request_ids))
        return [self.answers[r] for r in request_ids]

    def _take(self, message: Any) -> None:
        match message:
            case stream.Tokens(deltas=deltas):
                for delta in deltas:
                    answer = self.answers.setdefault(delta.request_id, Answer())
                    assert not answer.over, f"{delta.request_id} goes on after its end"
                    answer.tokens += delta.token_ids
                    answer.outcome = delta.outcome
            case stream.Failed(request_id=request_id):
                self.answers.setdefault(request_id, Answer()).failed = message
            case _:
                raise AssertionError(f"a front-end does not expect {message}")

    def close(self) -> None:
        self.forks.channel.close()
        if self._front_inbox is not None:
            self._front_inbox.channel.close()
        self.parent.terminate()
        self.parent.wait(10)
        self._agent.close()
        self._front.close()
