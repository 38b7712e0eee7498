"""One life of a worker: one replica, one epoch, from its activation to its last token.

This is the engine's `Post`. Orders of another epoch are refused, a paused engine is simply not let out of `collect`, and
a draining one leaves when its last request is done or its time is up; whatever is left goes back to its front-end.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.engine.api import Engine, Flush, Leave, Limit, Order, Stats, Submission, Withdrawal
from chimera.msg import actions, stream
from chimera.msg.events import Outcome, ReplicaReady, RequestFinished
from chimera.msg.stream import Payload, TokenDelta
from chimera.wire.codec import Message
from chimera.worker.keeping import Keeping
from chimera.worker.lease import LeaseDesk
from chimera.worker.stopwatch import Stopwatch
from chimera.worker.ties import Ties

if TYPE_CHECKING:
    from chimera.spans.engine import EngineSpans

HEARTBEAT_S = 0.25
"""Counters are sent on change and at most this often, and once more before the engine falls idle."""

_payload_decoder = msgspec.msgpack.Decoder(Payload)


class _Open:
    """A request the engine has."""

    __slots__ = ("began_s", "cached_tokens", "first_token_s", "front", "output_tokens", "prompt_tokens", "request")

    def __init__(self, front: str, request: Request | None = None, prompt_tokens: int = 0) -> None:
        self.front = front
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.output_tokens = 0
        self.cached_tokens = 0
        self.began_s = 0.0
        self.first_token_s: float | None = None
        """Both only where spans are told."""


class Life:
    def __init__(
        self,
        replica: ReplicaId,
        epoch: Epoch,
        engine: Engine,
        ties: Ties,
        keeping: Keeping,
        lease: LeaseDesk | None = None,
        spans: EngineSpans | None = None,
    ) -> None:
        self.replica = replica
        self.epoch = epoch
        self.stop_reason = ""
        self.told_to_stop = False
        """The whole process is to end with this life."""
        self._engine = engine
        self._ties = ties
        self._keeping = keeping
        self._lease = lease
        self._spans = spans
        self._open: dict[str, _Open] = {}
        self._paused_until_s: float | None = None
        self._kept: list[Order] = []
        self._flushes: deque[stream.Flush] = deque()
        """Given to the engine, which carries them out in their order."""
        self._leave_by_s: float | None = None
        self._told = Stats()
        self._told_s = 0.0
        self._watch = Stopwatch(replica, epoch)

    # The engine's side.

    def collect(self, wait_s: float | None) -> Sequence[Order]:
        while True:
            if self._leave_by_s is not None and (not self._open or time.monotonic() >= self._leave_by_s):
                self._hand_back_rest()
                raise Leave
            patience_s = self._patience_s(wait_s)
            self._heartbeat(falling_idle=patience_s is None)
            self._report_lease(falling_idle=patience_s is None)
            if wait_s is None or self._is_paused():
                self._watch.hold()
            self._kept += [order for message in self._ties.receive(patience_s) if (order := self._order(message)) is not None]
            paused = self._is_paused()
            orders = self._due_orders(paused)
            # One that drains has steps to take for as long as it has requests.
            if orders or (not paused and (self._open if self._leave_by_s is not None else wait_s is not None)):
                self._watch.let_go(time.monotonic())
                return orders

    def _is_paused(self) -> bool:
        """It goes on by itself when its time is over: who paused it may be gone."""
        if self._paused_until_s is not None and self._paused_until_s <= time.monotonic():
            self._paused_until_s = None
        return self._paused_until_s is not None

    def _due_orders(self, paused: bool) -> list[Order]:
        """What the engine may hear of now: with an order it takes a step, so a paused one hears of nothing but its limit."""
        due = [order for order in self._kept if not paused or isinstance(order, Limit)]
        self._kept = [order for order in self._kept if paused and not isinstance(order, Limit)]
        return due

    def deliver(self, deltas: list[TokenDelta]) -> None:
        by_front: dict[str, list[TokenDelta]] = {}
        self._time(deltas)
        for delta in deltas:
            request = self._open.get(delta.request_id)
            if request is None:
                continue
            request.output_tokens += len(delta.token_ids)
            request.cached_tokens = delta.cached_tokens
            by_front.setdefault(request.front, []).append(delta)
        for front, its_deltas in by_front.items():
            tokens = stream.Tokens(replica=self.replica, epoch=self.epoch, deltas=its_deltas)
            if not self._ties.tell_front(front, tokens):
                self._call_off(front)
        for delta in deltas:
            if delta.outcome is not None:
                self._finish(delta.request_id, delta.outcome)

    def _time(self, deltas: list[TokenDelta]) -> None:
        stepped = [request for delta in deltas if (request := self._open.get(delta.request_id)) is not None]
        fresh = [request.prompt_tokens for request in stepped if not request.output_tokens]
        read = sum(request.prompt_tokens + request.output_tokens for request in stepped if request.output_tokens)
        tokens, prompt_tokens = len(stepped) - len(fresh), sum(fresh)
        now = time.monotonic()
        if fresh and self._spans is not None:
            for request in stepped:
                if not request.output_tokens:
                    request.first_token_s = now
        self._watch.step(now, tokens=tokens, context_tokens=read, prompts=len(fresh), prompt_tokens=prompt_tokens)

    def fail(self, request_id: str, code: str, message: str) -> None:
        request = self._open.get(request_id)
        if request is not None:
            self._ties.tell_front(request.front, stream.Failed(request_id=request_id, code=code, message=message))
            self._finish(request_id, Outcome.FAILED)

    def give_back(self, request_id: str, reason: str, code: str = "requeue") -> None:
        request = self._open.get(request_id)
        if request is not None:
            self._ties.tell_front(request.front, _requeue(request_id, reason, code))
            self._finish(request_id, Outcome.REQUEUED)

    def flushed(self) -> None:
        order = self._flushes.popleft()
        self._ties.tell_agent(stream.Flushed(order=order.order, front=order.front, replica=self.replica))

    def _call_off(self, front: str) -> None:
        """The front-end is gone, and with it everybody who waited for these answers."""
        for request_id in [request_id for request_id, request in self._open.items() if request.front == front]:
            self._finish(request_id, Outcome.CANCELLED)
            self._kept.append(Withdrawal(request_id))

    # The agent's side.

    def standing(self, activation: actions.Activate, ready: ReplicaReady) -> list[Message]:
        """What an agent must know that comes after the one which started this life. It knows of no pause, so it ends."""
        self._paused_until_s, self._told, self._told_s = None, Stats(), 0.0
        running = tuple(request.request for request in self._open.values() if request.request is not None)
        leaving = self._leave_by_s is not None
        told: list[Message] = [stream.Standing(activation=activation, ready=ready, running=running, leaving=leaving)]
        holding = None if self._lease is None else self._engine.holding()
        if self._lease is not None and holding is not None:
            told += self._lease.held(self._ties.worker, holding, activation.model.weight_bytes)
        return told

    def _order(self, message: object) -> Order | None:
        """What the agent's message means to the engine, if anything."""
        match message:
            case stream.Submit():
                return self._submission(message)
            case actions.Abort(request_id=request_id):
                known = request_id in self._open
                self._finish(request_id, Outcome.CANCELLED)
                return Withdrawal(request_id) if known else None
            case actions.Deactivate(epoch=self.epoch, drain_s=drain_s, reason=reason):
                self._leave_by_s = time.monotonic() + drain_s
                self.stop_reason = reason
            case actions.Preempt(epoch=self.epoch, request_id=request_id, reason=reason) if request_id in self._open:
                self.give_back(request_id, reason, code="preempted")
                return Withdrawal(request_id)
            case actions.Pause(epoch=self.epoch, for_s=for_s):
                self._paused_until_s = math.inf if for_s is None else time.monotonic() + for_s
            case actions.Resume(epoch=self.epoch):
                self._paused_until_s = None
            case actions.Grant(epoch=self.epoch) | actions.Recall(epoch=self.epoch) if self._lease is not None:
                return self._lease.obey(message, time.monotonic())
            case stream.Ping():
                self._ties.tell_agent(stream.Pong())
            case stream.LetGo():
                self._keeping.obey(message)
            case stream.Flush():
                self._flushes.append(message)
                return Flush()
            case stream.Stop(drain_s=drain_s):
                self._leave_by_s = time.monotonic() + drain_s
                self.stop_reason = "the server is stopping"
                self.told_to_stop = True
        return None

    def _submission(self, message: stream.Submit) -> Submission | None:
        if message.epoch != self.epoch or self._leave_by_s is not None:
            what = f"{self.replica} is leaving" if message.epoch == self.epoch else f"this is {self.replica} {self.epoch}"
            self._ties.tell_front(message.front, _requeue(message.request_id, what))
            return None
        try:
            payload = _payload_decoder.decode(message.payload)
        except msgspec.DecodeError as fault:
            self._open[message.request_id] = _Open(message.front, message.request)
            self.fail(message.request_id, "bad_request", f"the request's payload cannot be read: {fault}")
            return None
        opened = self._open[message.request_id] = _Open(message.front, message.request, len(payload.input_ids))
        if self._spans is not None:
            opened.began_s = time.monotonic()
        return Submission(message.request_id, payload)

    def _finish(self, request_id: str, outcome: Outcome) -> None:
        request = self._open.pop(request_id, None)
        if request is None:
            return
        if self._spans is not None and request.request is not None and request.request.trace:
            self._spans.request(
                request.request.trace,
                self.replica.model,
                request.began_s,
                request.first_token_s,
                time.monotonic(),
                prompt_tokens=request.prompt_tokens,
                cached_tokens=request.cached_tokens,
                output_tokens=request.output_tokens,
                outcome=str(outcome),
            )
        self._ties.tell_agent(
            RequestFinished(
                request_id=request_id,
                replica=self.replica,
                epoch=self.epoch,
                outcome=outcome,
                output_tokens=request.output_tokens,
                cached_tokens=request.cached_tokens,
            )
        )

    def _hand_back_rest(self) -> None:
        for request_id, request in list(self._open.items()):
            self._ties.tell_front(request.front, _requeue(request_id, f"{self.replica} left: {self.stop_reason}"))
            self._finish(request_id, Outcome.REQUEUED)

    def _patience_s(self, wait_s: float | None) -> float | None:
        """How long `receive` may wait: as asked, or while it is paused; never past the time to leave."""
        until_s = math.inf if wait_s is None else time.monotonic() + wait_s
        if self._paused_until_s is not None:
            until_s = self._paused_until_s
        if self._leave_by_s is not None:
            until_s = min(until_s, self._leave_by_s)
        return None if math.isinf(until_s) else max(0.0, until_s - time.monotonic())

    def _report_lease(self, *, falling_idle: bool) -> None:
        now = time.monotonic()
        if self._lease is None or not (falling_idle or self._lease.is_due(now)):
            return
        holding = self._engine.holding()
        assert holding is not None, "an engine activated with a ceiling holds elastic memory"
        for news in self._lease.report(holding, now):
            self._ties.tell_agent(news)

    def _heartbeat(self, *, falling_idle: bool) -> None:
        now = time.monotonic()
        if not falling_idle and now - self._told_s < HEARTBEAT_S:
            return
        if (seen := self._watch.told(now)) is not None:
            self._ties.tell_agent(seen)
        stats = self._engine.stats()
        self._told_s = now
        if stats == self._told:
            return
        self._told = stats
        self._ties.tell_agent(
            stream.Heartbeat(
                replica=self.replica,
                epoch=self.epoch,
                running=stats.running,
                queued=stats.queued,
                kv_tokens=stats.kv_tokens,
                kv_used_tokens=stats.kv_used_tokens,
                lost_cached_tokens=stats.lost_cached_tokens,
            )
        )


def _requeue(request_id: str, message: str, code: str = "requeue") -> stream.Failed:
    return stream.Failed(request_id=request_id, code=code, message=message, requeue=True)
