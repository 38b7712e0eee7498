"""Many requests through one worker whose lease moves: sent, cancelled and brought again as a front-end and an agent would."""

import random
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chimera.core.model import ModelSpec
from chimera.core.replica import Epoch, ReplicaId
from chimera.msg import actions, events, stream

from tests.worker.stage import Hired, Stage, payload


@dataclass
class Wish:
    """One request as its client sees it."""

    name: str
    prompt: list[int]
    length: int
    cancel_after: int | None = None
    """Tokens after which the client leaves."""
    tokens: list[int] = field(default_factory=list)
    tries: int = 0
    cached: int = 0
    over: bool = False
    failed: str = ""

    @property
    def request_id(self) -> str:
        return f"{self.name}.{self.tries}"


def wishes(seed: int, count: int, *, longest: int = 160, cancelled: float = 0.0, vocabulary: int = 500) -> list[Wish]:
    """Mixed lengths, many with a beginning in common."""
    chance = random.Random(seed)
    beginnings = [[chance.randrange(3, vocabulary) for _ in range(96)] for _ in range(4)]
    made = []
    for number in range(count):
        prompt = chance.choice(beginnings)[: chance.randrange(96)] if chance.random() < 0.6 else []
        prompt = prompt + [chance.randrange(3, vocabulary) for _ in range(chance.randrange(1, longest))]
        wish = Wish(f"r{number}", prompt, chance.randrange(1, 48))
        if chance.random() < cancelled:
            wish.cancel_after = chance.randrange(wish.length)
        made.append(wish)
    return made


class Crowd:
    """`move_lease(now)` is called again and again; it may send the worker an order."""

    def __init__(self, stage: Stage, worker: Hired, spec: ModelSpec, epoch: Epoch, credits: int) -> None:
        self.stage = stage
        self.worker = worker
        self.spec = spec
        self.epoch = epoch
        self.credits = credits
        self.requeued = 0
        self.answers: list[events.PagesReturned] = []
        self.wanted: list[int] = []
        self.flushed: list[stream.Flushed] = []
        self._inside: dict[str, Wish] = {}

    def run(
        self, wanted: list[Wish], *, move_lease: Callable[[float], None] = lambda now: None, patience_s: float = 120.0
    ) -> None:
        """Until every wish is over."""
        waiting = list(wanted)
        deadline_s = time.monotonic() + patience_s
        front = self.stage.front_inbox
        while waiting or self._inside:
            now = time.monotonic()
            assert now < deadline_s, f"not over: {[w.request_id for w in self._inside.values()][:5]}, {len(waiting)} wait"
            while waiting and len(self._inside) < self.credits:
                self._send(waiting.pop(0))
                front = front or self.stage.meet_worker()
            move_lease(now)
            assert front is not None
            select.select([self.worker.channel.fileno(), front.channel.fileno()], [], [], 0.01)
            for message in self.worker.inbox.take(0):
                self._hear_worker(message)
            for message in front.take(0):
                self._hear_front(message, waiting)

    def _send(self, wish: Wish) -> None:
        wish.tries += 1
        self._inside[wish.request_id] = wish
        left = wish.length - len(wish.tokens)
        self.worker.submit(wish.request_id, self.epoch, payload(wish.prompt + wish.tokens, left))

    def _hear_worker(self, message: Any) -> None:
        match message:
            case events.PagesReturned():
                self.answers.append(message)
            case events.PagesWanted(level=level):
                self.wanted.append(level)
            case stream.Flushed():
                self.flushed.append(message)
            case events.RequestFinished() | events.StepsTimed() | stream.Heartbeat():
                pass
            case _:
                raise AssertionError(f"an agent does not expect {message}")

    def _hear_front(self, message: Any, waiting: list[Wish]) -> None:
        match message:
            case stream.Tokens(deltas=deltas):
                for delta in deltas:
                    wish = self._inside.get(delta.request_id)
                    if wish is not None:
                        self._extend(wish, delta)
            case stream.Failed(request_id=request_id, requeue=requeue, message=why):
                wish = self._inside.pop(request_id, None)
                if wish is None:
                    return  # its client had just left
                if requeue:
                    self.requeued += 1
                    waiting.append(wish)
                else:
                    wish.over, wish.failed = True, why
            case _:
                raise AssertionError(f"a front-end does not expect {message}")

    def _extend(self, wish: Wish, delta: stream.TokenDelta) -> None:
        wish.tokens += delta.token_ids
        wish.cached = max(wish.cached, delta.cached_tokens)
        if delta.outcome is not None:
            wish.over = True
        elif wish.cancel_after is not None and len(wish.tokens) > wish.cancel_after:
            wish.over = True
            order = {"request_id": wish.request_id, "replica": ReplicaId(self.spec.name), "epoch": self.epoch}
            self.worker.channel.send(actions.Abort(**order, reason="its client left"))
        if wish.over:
            del self._inside[wish.request_id]
