"""Every open answer of this front-end, and what becomes of it when something on its way is lost.

Tokens come straight from workers; verdicts (a requeue, a rejection) from workers or control. Knows messages and who sent
them, no socket and no HTTP. Every answer ends exactly once: whole, in one error, or withdrawn because its client left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from chimera.core.measures import GAP_S, Steps
from chimera.errors import RequestError
from chimera.msg.actions import Reject, Requeue
from chimera.msg.events import ANSWERED, Outcome
from chimera.msg.stream import Cancel, Failed, StandingTold, TokenDelta, Tokens
from chimera.server.answer import Answer
from chimera.wire.codec import Message

_log = logging.getLogger(__name__)


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and how often, before an answer is given up."""

    control_s: float = 10.0
    """Without control: requests that no worker has begun to answer."""
    worker_s: float = 1.0
    """After a worker is gone: for control to say what becomes of its requests."""
    tries: int = 3
    """How often a request is sent again after something broke, or after a worker gave it back without a token more."""
    moves: int = 64
    """How often it is sent again at all: those that are moved about by plan go on where they were."""


class Desk:
    def __init__(self, name: str, patience: Patience, count: Callable[[str], Steps] | None = None) -> None:
        """`count` gives what a model's tokens are counted in; without it nobody counts."""
        self._name = name
        self._count = count
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, Answer] = {}
        """By the name of the current try."""
        self._send: Callable[[Message], None] | None = None
        self._owed: list[Cancel] = []
        """What control must hear when it is back."""
        self._idle: asyncio.Event | None = None
        """Somebody waits for the last answer to end."""
        self._alone_since_s = self._loop.time()
        self._giving_up = self._loop.call_later(patience.control_s, self._give_up)

    @property
    def open_answers(self) -> int:
        return len(self._open)

    def submit(self, answer: Answer) -> None:
        """Ask for the answer; it tells its reader from now on."""
        if self._send is None and self._alone_s > self._patience.control_s:
            answer.fail(self._without_control())
            return
        self._open[answer.attempt_id] = answer
        if self._send is not None:
            self._send(answer.enqueue(self._name))

    def withdraw(self, answer: Answer) -> None:
        """Nobody waits for it any more. Harmless for an answer that has ended."""
        if self._open.get(answer.attempt_id) is answer:
            self._remove(answer)
            self._cancel(answer)

    def fail_all(self, error: RequestError) -> None:
        """The front-end is leaving."""
        for answer in list(self._open.values()):
            self.withdraw(answer)
            answer.fail(error)

    async def wait_until_idle(self) -> None:
        """Until no answer is open."""
        self._idle = asyncio.Event()
        if self._open:
            await self._idle.wait()

    # Control comes and goes.

    def control_is_there(self, send: Callable[[Message], None]) -> None:
        """Requests that nobody has begun to answer are sent again: this control may never have heard of them."""
        self._giving_up.cancel()
        self._send = send
        for cancel in self._owed:
            send(cancel)
        self._owed.clear()
        for answer in self._open.values():
            if answer.source is None:
                send(answer.enqueue(self._name))

    def control_is_lost(self) -> None:
        """Answers under way go on: their tokens do not pass through control."""
        self._send = None
        self._alone_since_s = self._loop.time()
        self._giving_up.cancel()
        self._giving_up = self._loop.call_later(self._patience.control_s, self._give_up)

    def close(self) -> None:
        self._giving_up.cancel()

    def on_control(self, message: Reject | Requeue) -> None:
        answer = self._open.get(message.request_id)
        if answer is None:
            return
        if isinstance(message, Requeue):
            answer.losses += message.lost
            self._send_again(answer, message.reason, fault=message.fault)
        else:
            wait_s, position = message.retry_after_s, message.queue_position
            self._fail(answer, RequestError(message.code, message.reason, retry_after_s=wait_s, queue_position=position))

    def on_standing(self, told: StandingTold) -> None:
        answer = self._open.get(told.request_id)
        if answer is not None and answer.source is None:
            answer.show_standing(told)

    # Workers.

    def on_worker(self, worker: object, message: Message) -> None:
        """What the worker at the other end of the connection `worker` says."""
        if isinstance(message, Tokens):
            find = self._open.get
            count = None if self._count is None else self._count(message.replica.model)
            now = time.monotonic()
            before_s, alike, made = 0.0, 0, 0  # most of a step's requests had their last token in one step as well
            for delta in message.deltas:
                answer = find(delta.request_id)
                if answer is None:
                    continue
                if answer.source is not worker:
                    if answer.source is not None:
                        continue
                    answer.source = worker
                if count is not None:
                    made += len(delta.token_ids)
                    newest_s, answer.newest_token_s = answer.newest_token_s, now
                    if newest_s == before_s:
                        alike += 1
                    elif newest_s is None:
                        answer.first_token_s = now
                    else:
                        if alike:
                            count.gaps.see(now - before_s, GAP_S, alike)
                        before_s, alike = newest_s, 1
                if delta.outcome is not None:
                    self._end(answer, delta, delta.outcome)
                elif answer.take(delta):  # a stop string, of which the engine knows nothing
                    self._remove(answer)
                    self._cancel(answer)
            if count is not None:
                count.tokens += made
                if alike:
                    count.gaps.see(now - before_s, GAP_S, alike)
        elif isinstance(message, Failed):
            answer = self._open.get(message.request_id)
            if answer is None or answer.source not in (None, worker):
                return
            if message.requeue:
                preempted = message.code == "preempted"
                answer.preempted += preempted
                self._send_again(answer, message.message, fault=answer.source is None and not preempted)
            else:
                self._fail(answer, RequestError(message.code, message.message, retry_after_s=message.retry_after_s))

    def worker_is_gone(self, worker: object) -> None:
        """Control will say what becomes of its requests; if not, they end here."""
        if any(answer.source is worker for answer in self._open.values()):
            self._loop.call_later(self._patience.worker_s, self._end_orphans, worker)

    def _end(self, answer: Answer, delta: TokenDelta, outcome: Outcome) -> None:
        if outcome in ANSWERED:
            self._remove(answer)
            answer.take_last(delta, outcome)
        else:
            self._fail(answer, RequestError("internal_error", f"the engine ended the request: {outcome}"))

    def _end_orphans(self, worker: object) -> None:
        for answer in [answer for answer in self._open.values() if answer.source is worker]:
            self._fail(answer, RequestError("worker_lost", "the engine that was answering this request was lost"))

    def _send_again(self, answer: Answer, reason: str, *, fault: bool) -> None:
        """With what was shown as part of the prompt: the answer goes on where it was."""
        self._remove(answer)
        if answer.remaining_tokens <= 0:
            answer.end(Outcome.LENGTH)
        elif answer.tries >= self._patience.moves or (fault and answer.faults >= self._patience.tries):
            told = f"given up after {answer.tries + 1} tries; the last one ended because: {reason}"
            answer.fail(RequestError("service_unavailable", told, retry_after_s=answer.age_s))
        else:
            answer.tries += 1
            answer.faults += fault
            answer.source = None
            _log.info("requeue request=%s tokens=%d reason=%r", answer.attempt_id, len(answer.emitted), reason)
            self.submit(answer)

    def _fail(self, answer: Answer, error: RequestError) -> None:
        self._remove(answer)
        answer.fail(error)

    def _remove(self, answer: Answer) -> None:
        del self._open[answer.attempt_id]
        if self._idle is not None and not self._open:
            self._idle.set()

    def _cancel(self, answer: Answer) -> None:
        cancel = Cancel(request_id=answer.attempt_id)
        if self._send is not None:
            self._send(cancel)
        else:
            self._owed.append(cancel)

    def _give_up(self) -> None:
        for answer in [answer for answer in self._open.values() if answer.source is None]:
            self._owed.append(Cancel(request_id=answer.attempt_id))
            self._fail(answer, self._without_control())

    def _without_control(self) -> RequestError:
        """How long an outage has lasted is the best guess of how long it will."""
        return RequestError("service_unavailable", "the server's control process is away", retry_after_s=self._alone_s)

    @property
    def _alone_s(self) -> float:
        return self._loop.time() - self._alone_since_s
