"""An engine without a model: tokens by a seeded rule, time by a cost table, the same protocol as a real one.

For tests, for load tests of everything above an engine, and for machines with nothing to run. Continuous batching is
kept: a step serves every running request, prefills join as slots come free, and KV use is counted.
"""

from __future__ import annotations

import math
import struct
import time
import zlib
from collections import deque
from collections.abc import Sequence

import msgspec

from chimera.core.model import ModelSpec
from chimera.engine.api import CannotServe, Flush, Holding, Limit, Order, Post, Remains, Stats, Submission, Vitals, Withdrawal
from chimera.msg.actions import Place
from chimera.msg.events import Outcome
from chimera.msg.stream import TokenDelta, TokenLogprobs

_LOOK_AGAIN_S = 0.002


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of each part of the work; given as `engine_args` in a placement file."""

    load_s: float = 0.0
    step_s: float = 0.0
    """One decode step, whatever the batch."""
    per_request_s: float = 0.0
    """Added to a step for each request in it."""
    prefill_s_per_token: float = 0.0
    vocabulary: int = 256
    kv_tokens: int = 65536
    """Slots of the pool when no limit is given."""
    max_running: int = 256
    kept_bytes: int = 0
    """What stays of it when it has left; nothing if it is not to be parked."""


class _Running:
    """One request in the batch."""

    __slots__ = ("made", "submission", "tokens_left")

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.made = 0
        self.tokens_left = submission.payload.sampling.max_new_tokens

    @property
    def final_tokens(self) -> int:
        return len(self.submission.payload.input_ids) + self.submission.payload.sampling.max_new_tokens


def token_after(model: str, prompt: Sequence[int], made: int, vocabulary: int) -> int:
    """The rule: what `model` says after `prompt` and `made` tokens of answer. Printable ASCII for small vocabularies."""
    seed = zlib.crc32(f"{model}:{len(prompt) + made}:{prompt[0] if prompt else 0}".encode())
    return 97 + seed % 26 if vocabulary <= 256 else seed % vocabulary


def embedding_of(model: str, prompt: Sequence[int]) -> bytes:
    """The rule for prompts that are to be embedded: four numbers that follow from them."""
    seed = zlib.crc32(f"{model}:{prompt}".encode())
    return struct.pack("<4f", *(((seed >> shift) & 0xFF) / 255 for shift in (0, 8, 16, 24)))


class SimulatedEngine:
    def __init__(self) -> None:
        self._costs = Costs()
        self._model = ""
        self._kept: dict[str, int] = {}
        self._kv_tokens = 0
        self._token_bytes = 1
        self._elastic = False
        self._retract_at_s = math.inf
        self._waiting: deque[Submission] = deque()
        self._running: dict[str, _Running] = {}

    def prepare(self, model: ModelSpec, *, gpu_ids: tuple[int, ...]) -> int:
        return 0

    def activate(
        self,
        model: ModelSpec,
        *,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None = None,
        place: Place | None = None,
    ) -> Vitals:
        try:
            self._costs = msgspec.convert(model.engine_args, Costs)
        except msgspec.ValidationError as fault:
            raise CannotServe(f"engine_args of a simulated model: {fault}", permanent=True) from fault
        time.sleep(self._costs.load_s)
        self._model = model.name
        self._token_bytes = max(1, model.kv_bytes_per_token)
        self._kv_tokens = self._costs.kv_tokens if kv_bytes is None else kv_bytes // self._token_bytes
        self._elastic = ceiling_bytes is not None
        self._retract_at_s = math.inf
        return Vitals(credits=self._costs.max_running, kv_tokens=self._kv_tokens, context_length=model.context_length)

    def serve(self, post: Post) -> None:
        costs = self._costs
        while True:
            wait_s = 0.0 if self._running else _LOOK_AGAIN_S if self._waiting else None
            for order in post.collect(wait_s):
                self._take(order, post)
            self._yield_memory(post)
            admitted = self._fill_batch()
            if not self._running:
                continue
            step_s = costs.step_s + costs.per_request_s * len(self._running) + costs.prefill_s_per_token * admitted
            if step_s > 0:
                # A step cannot be interrupted on a real engine either; orders wait for its end.
                time.sleep(step_s)
            post.deliver([self._step(running) for running in list(self._running.values())])

    def stats(self) -> Stats:
        used = sum(len(r.submission.payload.input_ids) + r.made for r in self._running.values())
        return Stats(running=len(self._running), queued=len(self._waiting), kv_tokens=self._kv_tokens, kv_used_tokens=used)

    def remains(self, gpu_id: int) -> Remains:
        return Remains(tuple(name for name in self._kept if name != self._model), sum(self._kept.values()))

    def let_go(self, gpu_id: int, most_bytes: int, reason: str) -> None:
        """The one that came first goes first."""
        for name in [name for name in self._kept if name != self._model]:
            if sum(self._kept.values()) > most_bytes:
                del self._kept[name]

    def holding(self) -> Holding | None:
        """It has what its requests may come to need; the rest of its level is free to go at once."""
        if not self._elastic:
            return None
        waiting = sum(_Running(submission).final_tokens for submission in self._waiting)
        return Holding(
            held_bytes=self._reserved_tokens * self._token_bytes,
            wanted_bytes=(self._reserved_tokens + waiting) * self._token_bytes,
        )

    def deactivate(self) -> None:
        self._waiting.clear()
        self._running.clear()
        if self._model and self._costs.kept_bytes:
            self._kept[self._model] = self._costs.kept_bytes
        self._model = ""

    def _take(self, order: Order, post: Post) -> None:
        match order:
            case Submission(request_id, payload) if payload.sampling.grammar is not None:
                post.fail(request_id, "unsupported_parameter", "the simulated engine holds no answer to a form")
            case Submission():
                self._waiting.append(order)
            case Withdrawal(request_id):
                self._running.pop(request_id, None)
                self._waiting = deque(s for s in self._waiting if s.request_id != request_id)
            case Flush():
                post.flushed()  # it caches nothing
            case Limit(kv_bytes, retract_by_s):
                self._kv_tokens = kv_bytes // self._token_bytes
                self._retract_at_s = math.inf if retract_by_s is None else retract_by_s

    def _yield_memory(self, post: Post) -> None:
        """Past the deadline of a limit, give back the youngest requests until the others fit into it to their ends."""
        if time.monotonic() < self._retract_at_s:
            return
        self._retract_at_s = math.inf
        reserved = self._reserved_tokens
        for request_id, running in reversed(list(self._running.items())):
            if reserved > self._kv_tokens:
                reserved -= running.final_tokens
                del self._running[request_id]
                post.give_back(request_id, "its KV memory was recalled")

    @property
    def _reserved_tokens(self) -> int:
        return sum(running.final_tokens for running in self._running.values())

    def _fill_batch(self) -> int:
        """Move waiting requests into the batch while their final need fits; returns the prompt tokens to prefill."""
        reserved = self._reserved_tokens
        admitted = 0
        while self._waiting and len(self._running) < self._costs.max_running:
            running = _Running(self._waiting[0])
            if (self._running or self._elastic) and reserved + running.final_tokens > self._kv_tokens:
                break
            self._waiting.popleft()
            self._running[running.submission.request_id] = running
            reserved += running.final_tokens
            admitted += len(running.submission.payload.input_ids)
        return admitted

    def _step(self, running: _Running) -> TokenDelta:
        payload = running.submission.payload
        if payload.embeds:
            del self._running[running.submission.request_id]
            embedding = embedding_of(self._model, payload.input_ids)
            return TokenDelta(running.submission.request_id, [], Outcome.STOP, embedding=embedding)
        token = token_after(self._model, payload.input_ids, running.made, self._costs.vocabulary)
        running.made += 1
        running.tokens_left -= 1
        outcome = None
        if running.tokens_left <= 0:
            outcome = Outcome.LENGTH
            del self._running[running.submission.request_id]
        logprobs = None if payload.logprobs is None else [_certain(token, payload.logprobs)]
        return TokenDelta(running.submission.request_id, [token], outcome, logprobs=logprobs)


def _certain(token: int, alternatives: int) -> TokenLogprobs:
    """The rule leaves no doubt: what it says has probability one."""
    return TokenLogprobs(token, 0.0, ((token, 0.0),) if alternatives else ())
