"""Control and a worker, played in the test's own loop over real sockets with the real messages.

Left alone it answers every request with letters that follow from the prompt, one message a token. Told to `hold`, it waits
for the test to say each word.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from chimera.control.lookout import Lookout
from chimera.core.gpu import Gpu
from chimera.core.ledger_view import GpuLedgerView
from chimera.core.measures import Measures
from chimera.core.model import ModelSpec
from chimera.core.record import Entry, RequestRecord
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.msg import actions, stream
from chimera.msg.events import ModelRegistered, ModelRemoved, Outcome
from chimera.msg.stream import Payload, TokenDelta, TokenLogprobs
from chimera.wire.channel import Channel, Server, connect, serve
from chimera.wire.codec import Message

from tests.parsing.vocabularies import byte_level

EOS = 1
LETTERS = [byte_level().token_to_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
CONTEXT = 512
_LONGEST = 24
_NEWS_WITHIN_S = 10.0


def model_folder(path: Path) -> Path:
    """A tokenizer and a chat template; nothing else is read here."""
    path.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (path / "chat_template.jinja").write_text(template)
    return path


def model(name: str, folder: Path, aliases: tuple[str, ...] = (), **more: Any) -> ModelSpec:
    return ModelSpec(
        name=name,
        path=str(folder),
        tokenizer_path=str(folder),
        architecture="LlamaForCausalLM",
        weight_bytes=1 << 20,
        kv_bytes_per_token=1 << 10,
        context_length=CONTEXT,
        aliases=aliases,
        **more,
    )


def tokens_of(text: str) -> list[int]:
    ids: list[int] = byte_level().encode(text, add_special_tokens=False).ids
    return ids


def letters_for(payload: Payload) -> tuple[list[int], Outcome]:
    """What the model says to this prompt, and how that ends."""
    seed = payload.sampling.seed
    dice = random.Random(f"{payload.input_ids}" if seed is None else f"{payload.input_ids} {seed}")
    wanted = payload.sampling.max_new_tokens
    if wanted < _LONGEST:
        return dice.choices(LETTERS, k=wanted), Outcome.LENGTH
    return [*dice.choices(LETTERS, k=_LONGEST - 1), EOS], Outcome.STOP


def numbers_for(prompt: Sequence[int]) -> list[float]:
    """The embedding of a prompt: numbers that a float32 holds exactly."""
    return [float(len(prompt)), *(token / 4 for token in prompt[:3])]


def likely(token_id: int, alternatives: int) -> TokenLogprobs:
    """Half a nat for what was said, one more for each that was not."""
    others = [letter for letter in LETTERS if letter != token_id][: max(0, alternatives - 1)]
    top = [(one, -0.5 - number) for number, one in enumerate([token_id, *others])] if alternatives else []
    return TokenLogprobs(token_id, -0.5, tuple(top))


T = TypeVar("T")


class News(asyncio.Queue[T]):
    """A queue whose reader does not wait for ever for what never comes."""

    async def get(self) -> T:
        async with asyncio.timeout(_NEWS_WITHIN_S):
            return await super().get()


class Worker:
    """One worker, as far as front-ends see it."""

    def __init__(self, run_dir: Path, replica: ReplicaId) -> None:
        self._run_dir = run_dir
        self._replica = replica
        self._fronts: dict[str, Channel] = {}

    async def tell(self, front: str, message: Message) -> None:
        channel = self._fronts.get(front)
        if channel is None or channel.ended:
            channel = self._fronts[front] = await connect(self._run_dir / f"{front}.sock")
            channel.send(stream.Hello(role="worker", name="worker-0", pid=1))
        channel.send(message)

    async def say(
        self,
        request: Request,
        words: str | list[int],
        outcome: Outcome | None = None,
        matched_stop: int | None = None,
        alternatives: int | None = None,
    ) -> None:
        """The tokens of one step for one request."""
        ids = tokens_of(words) if isinstance(words, str) else words
        logprobs = None if alternatives is None else [likely(token_id, alternatives) for token_id in ids]
        delta = TokenDelta(request.request_id, ids, outcome, matched_stop=matched_stop, logprobs=logprobs)
        await self.tell(request.front, stream.Tokens(replica=self._replica, epoch=Epoch(1, 1), deltas=[delta]))

    async def embed(self, request: Request, payload: Payload) -> None:
        embedding = array("f", numbers_for(payload.input_ids)).tobytes()
        delta = TokenDelta(request.request_id, [], Outcome.STOP, embedding=embedding)
        await self.tell(request.front, stream.Tokens(replica=self._replica, epoch=Epoch(1, 1), deltas=[delta]))

    async def fail(self, request: Request, code: str, message: str, *, requeue: bool = False) -> None:
        failed = stream.Failed(request_id=request.request_id, code=code, message=message, requeue=requeue)
        await self.tell(request.front, failed)

    async def die(self) -> None:
        for channel in self._fronts.values():
            channel.abort()
            await channel.wait_closed()
        self._fronts.clear()


class Rehearsal:
    def __init__(self, run_dir: Path, models: list[ModelSpec]) -> None:
        self.models = models
        self.hold = False
        self.enqueued: News[stream.Enqueue] = News()
        """Filled only while holding."""
        self.cancelled: News[str] = News()
        self.records: News[RequestRecord] = News()
        self.measures = Measures()
        self.lookout = Lookout(0.0)
        self.sights = 0
        """How often somebody asked for one."""
        self.news: list[tuple[int, Entry]] = []
        self.fault = ""
        """Why records cannot be kept."""
        self.worker = self.another_worker(run_dir)
        self.serving: list[ReplicaId] = [ReplicaId(models[0].name)]
        self.fronts: list[Channel] = []
        self.greeted = asyncio.Event()
        """A front-end knows the models."""
        self.run_dir = run_dir
        self._server: Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    @staticmethod
    def another_worker(run_dir: Path) -> Worker:
        return Worker(run_dir, ReplicaId("m"))

    async def start(self) -> None:
        self._server = await serve(self.run_dir / "control.sock", self._front_came)

    async def stop(self) -> None:
        """Control goes; the worker stays."""
        if self._server is not None:
            await self._server.close()
        self.fronts.clear()

    async def close(self) -> None:
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        await self.worker.die()
        await self.stop()

    async def next_request(self) -> Request:
        return (await self.enqueued.get()).request

    async def next_ask(self) -> tuple[Request, Payload]:
        enqueue = await self.enqueued.get()
        return enqueue.request, msgspec.msgpack.decode(enqueue.payload, type=Payload)

    def reject(
        self,
        request: Request,
        code: str,
        reason: str,
        retry_after_s: float | None = None,
        queue_position: int | None = None,
    ) -> None:
        self._tell(
            actions.Reject(
                request_id=request.request_id,
                front=request.front,
                code=code,
                reason=reason,
                retry_after_s=retry_after_s,
                queue_position=queue_position,
            )
        )

    def requeue(self, request: Request, reason: str = "the agent went away") -> None:
        self._tell(actions.Requeue(request_id=request.request_id, front=request.front, reason=reason))

    def register(self, spec: ModelSpec) -> None:
        self.models.append(spec)
        self._tell(ModelRegistered(model=spec))

    def remove(self, name: str) -> None:
        self.models = [spec for spec in self.models if spec.name != name]
        self._tell(ModelRemoved(model=name))

    def _tell(self, message: Message) -> None:
        for channel in self.fronts:
            channel.send(message)

    def _front_came(self, channel: Channel) -> None:
        self.fronts.append(channel)
        channel.deliver_to(lambda message: self._hear(channel, message))

    def _hear(self, channel: Channel, message: Message) -> None:
        match message:
            case stream.Hello():
                for spec in self.models:
                    channel.send(ModelRegistered(model=spec))
            case stream.SnapshotWanted():
                channel.send(stream.SnapshotTaken(snapshot=self.snapshot()))
                self.greeted.set()
            case stream.RequestTold(record=record):
                self.records.put_nowait(record)
            case stream.TallyTold(tally=tally):
                self.measures.tally = tally
            case stream.MeasuresWanted():
                channel.send(stream.MeasuresTaken(measures=self.measures, snapshot=self.snapshot()))
            case stream.SightWanted(cast=cast, after=after):
                self.sights += 1
                self.lookout.note(self.snapshot(), self.measures)
                news = [(number, entry) for number, entry in self.news if number > after]
                channel.send(stream.SightTaken(sight=self.lookout.sight(self.snapshot(), news, cast=cast, fault=self.fault)))
            case stream.PastWanted():
                channel.send(stream.PastTaken(past=self.lookout.past(self.snapshot(), self.news)))
            case stream.Cancel(request_id=request_id):
                self.cancelled.put_nowait(request_id)
            case stream.Enqueue():
                if self.hold:
                    self.enqueued.put_nowait(message)
                else:
                    self._go(lambda: self._answer(message))

    def snapshot(self) -> Snapshot:
        views = [
            ReplicaView(replica=replica, epoch=Epoch(1, 1), state=ReplicaState.SERVING, gpu_ids=(0,), running=2, kv_tokens=4096)
            for replica in self.serving
        ]
        gpu = Gpu(gpu_id=0, capacity_bytes=2 << 30)
        return Snapshot(
            now_s=time.monotonic(),
            policy="static",
            gpus=(gpu,),
            models=tuple(self.models),
            replicas=tuple(views),
            ledgers=(GpuLedgerView(gpu=gpu),),
            waiting={"absent": 3},
        )

    def _go(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(work())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, enqueue: stream.Enqueue) -> None:
        payload = msgspec.msgpack.decode(enqueue.payload, type=Payload)
        if payload.embeds:
            await self.worker.embed(enqueue.request, payload)
            return
        token_ids, outcome = letters_for(payload)
        for token_id in token_ids[:-1]:
            await self.worker.say(enqueue.request, [token_id], alternatives=payload.logprobs)
        last = token_ids[-1]
        matched = last if outcome is Outcome.STOP else None
        await self.worker.say(enqueue.request, [last], outcome, matched, alternatives=payload.logprobs)
