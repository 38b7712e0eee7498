"""Real workers without an agent, for scripts that compare engines: hired from one preloaded parent, driven over sockets."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import actions, events, stream
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.units import KIB
from chimera.wire.blocking import BlockingChannel

PATIENCE_S = 120.0
TOKEN_BYTES = 3 * KIB
"""Of the tiny models' caches: three layers of keys and values, two heads of 64, float32."""

M = TypeVar("M")


def tiny(name: str, folder: Path, **fields: Any) -> ModelSpec:
    """A tiny model, made in `folder` unless it is there."""
    path = folder / name
    if not path.exists():
        make(MODELS[name], path, seed=0)
    return ModelSpec(
        name=name,
        path=str(path),
        tokenizer_path=str(path),
        architecture=name,
        weight_bytes=1,
        kv_bytes_per_token=TOKEN_BYTES,
        context_length=4096,
        **fields,
    )


def content(prompt: Sequence[int], tokens: int) -> bytes:
    sampling = stream.Sampling(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    return msgspec.msgpack.encode(stream.Payload(input_ids=list(prompt), sampling=sampling))


class Agency:
    """The parent, and the sockets that an agent and a front-end would listen on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._agent = _listen(folder / "agent-local.sock")
        command = [sys.executable, "-m", "chimera.worker.parent", "--socket", str(folder / "parent.sock")]
        self._parent = subprocess.Popen([*command, "--log-level", "error"], stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + PATIENCE_S
        while not (folder / "parent.sock").exists():
            if self._parent.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the preloaded parent does not come up")
            time.sleep(0.05)
        self._forks = BlockingChannel.connect(str(folder / "parent.sock"))

    def hire(self, name: str) -> Hand:
        front = _listen(self.folder / f"front-{name}.sock")
        self._forks.send(stream.Fork(worker=name, agent_socket=str(self.folder / "agent-local.sock")))
        (forked,) = self._forks.receive(PATIENCE_S)
        connection, _ = self._agent.accept()
        return Hand(name, forked.pid, BlockingChannel(connection), front)

    def close(self) -> None:
        self._forks.close()
        self._parent.terminate()
        self._parent.wait(10)


class Hand:
    """One worker; its tokens come to a front-end of its own."""

    def __init__(self, name: str, pid: int, channel: BlockingChannel, front: socket.socket) -> None:
        self.name = name
        self.pid = pid
        self.channel = channel
        self.epoch = Epoch(1, 0)
        self._front_socket = front
        self._front: BlockingChannel | None = None
        self._unread: deque[Any] = deque()
        self._revision = 1
        self._spec: ModelSpec | None = None
        self._sent = 0
        self.expect(stream.Hello)

    def become(self, spec: ModelSpec, *, kv_bytes: int, lease: actions.FirstLease | None = None) -> events.ReplicaReady:
        self.epoch = Epoch(1, self.epoch.counter + 1)
        seat = Seat(replica=ReplicaId(spec.name), gpu_ids=(0,), kv_limit_bytes=kv_bytes)
        self.channel.send(
            actions.Activate(
                model=spec, seat=seat, epoch=self.epoch, leases=() if lease is None else (lease,), reason="a benchmark"
            )
        )
        self._spec, self._revision = spec, 1
        return self.expect(events.ReplicaReady)

    def expect(self, kind: type[M]) -> M:
        """The next message of this kind; others before it are dropped."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            while self._unread:
                message = self._unread.popleft()
                if isinstance(message, kind):
                    return message
                if isinstance(message, events.ActivationFailed):
                    raise RuntimeError(message.reason)
            self._unread.extend(self.channel.receive(deadline_s - time.monotonic()))
        raise RuntimeError(f"{self.name} says no {kind.__name__}")

    def limit(self, pages: int, *, within_s: float | None = None) -> None:
        assert self._spec is not None
        self._revision += 1
        order = {
            "replica": ReplicaId(self._spec.name),
            "epoch": self.epoch,
            "gpu_id": 0,
            "revision": self._revision,
            "level": pages,
            "reason": "a benchmark",
        }
        if within_s is None:
            self.channel.send(actions.Grant(**order))
        else:
            self.channel.send(actions.Recall(**order, deadline_s=time.monotonic() + within_s))

    def serve(self, requests: Sequence[tuple[Sequence[int], int]], *, at_once: int) -> float:
        """Seconds until all are answered in full, with so many in the engine at a time."""
        started = time.monotonic()
        waiting = deque(requests)
        inside: set[str] = set()
        while waiting or inside:
            while waiting and len(inside) < at_once:
                inside.add(self.submit(*waiting.popleft()))
            select.select(self.filenos, [], [], 1.0)
            inside -= {delta.request_id for delta in self.hear() if delta.outcome is not None}
        return time.monotonic() - started

    def submit(self, prompt: Sequence[int], tokens: int) -> str:
        self._sent += 1
        request_id = f"{self.name}-{self._sent}"
        submission = stream.Submit(
            request_id=request_id, epoch=self.epoch, front=f"front-{self.name}", payload=content(prompt, tokens)
        )
        self.channel.send(submission)
        return request_id

    @property
    def filenos(self) -> list[int]:
        """Where something is to be heard; the first request must have been sent."""
        if self._front is None:
            connection, _ = self._front_socket.accept()
            self._front = BlockingChannel(connection)
        return [self._front.fileno(), self.channel.fileno()]

    def hear(self) -> list[stream.TokenDelta]:
        """The tokens that have come."""
        assert self._front is not None
        self.channel.receive(0)
        heard: list[stream.TokenDelta] = []
        for message in self._front.receive(0):
            match message:
                case stream.Tokens(deltas=deltas):
                    heard += deltas
                case stream.Failed():
                    raise RuntimeError(f"{message.request_id} failed: {message.message}")
        return heard

    def dismiss(self) -> None:
        """The worker leaves, as when its server stops."""
        self.channel.send(stream.Stop())
        while not self.channel.closed:
            self.channel.receive(PATIENCE_S)
        self.channel.close()
        self._front_socket.close()

    @property
    def cpu_s(self) -> float:
        """Processor time of the worker since it was forked."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(PATIENCE_S)
    return listener
