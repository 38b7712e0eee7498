"""One replica's engine on paper: continuous batching with chunked prefill, its cache in stripes, its weights over the link.

Prefills go before decodes, as in SGLang. Decodes are taken in leaps: until the next sequence ends, or until the step in which
a newcomer is noticed. A sequence is let in once the cache it may need at the most can be had, so nothing is ever thrown out
half-way. Work is counted in seconds of a GPU of one's own; neighbours stretch it.
"""

from __future__ import annotations

import enum
from collections import deque
from functools import partial
from heapq import heappop, heappush
from typing import Protocol

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import Epoch
from chimera.core.request import Request
from chimera.sched.cost import CostTable, EngineCost
from chimera.sim.clock import Clock
from chimera.sim.gpu import SimGpu


class Listener(Protocol):
    """Who hears from an engine."""

    def engine_ready(self, engine: SimEngine) -> None: ...

    def engine_empty(self, engine: SimEngine) -> None: ...

    def first_token(self, request: Request) -> None: ...

    def sequence_ended(self, engine: SimEngine, sequence: Sequence) -> None: ...

    def sequence_left(self, engine: SimEngine, sequence: Sequence, *, aborted: bool, preempted: bool = False) -> None: ...


class Sequence:
    """One request inside an engine."""

    __slots__ = ("last_step", "prefilled", "request", "started")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.prefilled = 0
        self.last_step = -1
        """The engine's step that makes its last token; -1 until its prefill is through."""
        self.started = False


class Doing(enum.Enum):
    NOTHING = 0
    PREFILL = 1
    DECODE = 2


NOTHING, PREFILL, DECODE = Doing
"""By names of their own: an enum's attribute takes as long as a call."""


class SimEngine:
    def __init__(
        self,
        *,
        model: ModelSpec,
        seat: Seat,
        epoch: Epoch,
        gpus: list[SimGpu],
        node_gpus: list[SimGpu],
        costs: CostTable,
        clock: Clock,
        listener: Listener,
    ) -> None:
        """`node_gpus` are those that get their weights from the same host memory."""
        self.model = model
        self.seat = seat
        self.epoch = epoch
        self.gpus = gpus
        self.costs = costs
        self.cost: EngineCost = costs.of(model)
        self.serving = False
        self.draining = False
        self.dead = False
        self.asked_s = clock.now
        """When it was told to come up."""
        self.ready_s = 0.0
        self.tokens_made = 0
        self._paused = False
        self._between = False
        """A step has ended and the next is not chosen: whoever hears of an end may take a sequence out or put one in."""
        self._node_gpus = node_gpus
        self._clock = clock
        self._listener = listener
        self._waiting: deque[Sequence] = deque()
        self._sequences: dict[str, Sequence] = {}
        self._ends: list[tuple[int, int, Sequence]] = []
        """Heap of running sequences by the step of their last token."""
        self._running = 0
        self._context_tokens = 0
        self._final_tokens = 0
        """The most cache that all let in may need."""
        self._kv_bytes = 0
        self._token_bytes = model.kv_bytes_per_token
        self._stripe_bytes = costs.stripe_bytes
        self._entered = 0
        self._step = 0
        self._doing: Doing = NOTHING
        self._batch: list[tuple[Sequence, int]] = []
        self._leap = 0
        self._work_s = 0.0
        """Of what it is doing, on a GPU of its own."""
        self._done_s = 0.0
        self._since_s = 0.0
        self._pace = 1.0
        self._plan = 0
        """Numbers the plans, so that what was arranged for an older one is passed over."""

    # Coming up and leaving.

    def come_up(self) -> None:
        """Holds room for the weights at once; loads when caches have given way."""
        resident = self.costs.resident_bytes(self.model)
        for gpu in self.gpus:
            gpu.held_bytes += resident
            gpu.engines.append(self)
        self._load()

    def _load(self) -> None:
        now = self._clock.now
        for gpu in self.gpus:
            if gpu.free_bytes < 0:
                gpu.starved[self] = None
                return
        start_s = max(now, *(gpu.link_free_s for gpu in self.gpus))
        loading = sum(gpu.link_free_s > start_s for gpu in self._node_gpus) + len(self.gpus)
        bytes_per_s = min(self.costs.link_bytes_per_s, self.costs.node_link_bytes_per_s / loading)
        moved_s = start_s + self.model.weight_bytes / bytes_per_s
        for gpu in self.gpus:
            gpu.link_free_s = moved_s
        self._clock.at(moved_s + self.costs.activation_s, self._loaded)

    def _loaded(self) -> None:
        if self.dead:
            return
        self.serving, self.ready_s = True, self._clock.now
        self._listener.engine_ready(self)

    def leave(self, drain_s: float) -> None:
        self.draining = True
        if not self._sequences:
            self._clock.at(self._clock.now, self._left)
            return
        self._clock.at(self._clock.now + drain_s, self._drained)

    def _drained(self) -> None:
        """Time is up: what still runs goes back with the tokens it has."""
        if self.dead:
            return
        self._settle()
        for sequence in list(self._sequences.values()):
            self._remove(sequence)
            self._listener.sequence_left(self, sequence, aborted=False)
        self._left()

    def _left(self) -> None:
        if not self.dead:
            self.die()
            self._listener.engine_empty(self)

    def die(self) -> None:
        """The process is gone, and all that it held is free."""
        self.dead = True
        self._plan += 1
        self._stand_still()
        resident = self.costs.resident_bytes(self.model)
        for gpu in self.gpus:
            gpu.held_bytes -= resident
            gpu.kv_bytes -= self._kv_bytes
            gpu.engines.remove(self)
            gpu.starved.pop(self, None)
        self._kv_bytes = 0
        for gpu in self.gpus:
            gpu.feed()

    # Sequences.

    @property
    def load(self) -> int:
        return len(self._sequences)

    def submit(self, request: Request) -> None:
        sequence = Sequence(request)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        if self._doing is NOTHING:
            self._next()
        elif self._doing is DECODE and len(self._waiting) == 1 and self._can_enter(sequence):
            self._cut_leap()

    def abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self._settle()
        self._remove(sequence)
        self._listener.sequence_left(self, sequence, aborted=True)
        self._next()

    def give_back(self, request_id: str) -> None:
        """It makes way for another, with the tokens it has."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self._settle()
        self._remove(sequence)
        self._listener.sequence_left(self, sequence, aborted=False, preempted=True)
        self._next()

    def pause(self) -> None:
        """Take no step after the one that is being made."""
        self._paused = True
        if self._doing is DECODE:
            self._cut_leap()

    def resume(self) -> None:
        self._paused = False
        if self._doing is NOTHING and self.serving and not self.dead:
            self._next()

    def made(self) -> dict[str, int]:
        """The tokens made so far, by request."""
        self._settle()
        return {sequence.request.request_id: self.emitted(sequence) for sequence in self._sequences.values()}

    def emitted(self, sequence: Sequence) -> int:
        """Tokens of the answer that it has made so far."""
        if sequence.last_step < 0:
            return 0
        return sequence.request.max_tokens - max(0, sequence.last_step - self._step)

    def _remove(self, sequence: Sequence) -> None:
        request = sequence.request
        del self._sequences[request.request_id]
        if sequence.last_step >= 0:
            self._running -= 1
            self._context_tokens -= request.prompt_tokens + self.emitted(sequence)
            self._ends = [entry for entry in self._ends if entry[2] is not sequence]
            self._ends.sort()
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._batch = [(member, tokens) for member, tokens in self._batch if member is not sequence]
        if sequence.started:
            self._hold(-request.final_tokens)

    def _can_enter(self, sequence: Sequence) -> bool:
        if sequence.started:
            return True
        if self._running + len(self._batch) >= self.costs.running:
            return False
        extra = self._stripes(self._final_tokens + sequence.request.final_tokens) - self._kv_bytes
        limit = self.seat.kv_limit_bytes
        if limit is not None:
            return self._kv_bytes + extra <= limit
        return min([gpu.free_bytes for gpu in self.gpus]) >= extra

    def _stripes(self, tokens: int) -> int:
        stripe = self._stripe_bytes
        return -(-tokens * self._token_bytes // stripe) * stripe

    def _hold(self, tokens: int) -> None:
        """Takes or gives back whole stripes, so that all who were let in have room to the end."""
        self._final_tokens += tokens
        change = self._stripes(self._final_tokens) - self._kv_bytes
        if change:
            self._kv_bytes += change
            for gpu in self.gpus:
                gpu.kv_bytes += change
            if change < 0:
                for gpu in self.gpus:
                    gpu.feed()

    def fits_ever(self, request: Request) -> bool:
        limit = self.seat.kv_limit_bytes
        room = min([gpu.gpu.capacity_bytes - gpu.held_bytes for gpu in self.gpus]) if limit is None else limit
        return self._stripes(request.final_tokens) <= room

    # Steps.

    def look_again(self) -> None:
        """Memory has come free."""
        if self.dead:
            return
        if not self.serving:
            self._load()
        elif self._doing is NOTHING:
            self._next()
        elif self._doing is DECODE and self._waiting and self._can_enter(self._waiting[0]):
            self._cut_leap()

    def change_pace(self) -> None:
        """A neighbour has come or gone: the same work ends at another time."""
        self._count()
        self._pace = max([gpu.slowdown() for gpu in self.gpus])
        self._arrange()

    def _next(self) -> None:
        """What the engine does now. Called between two steps only."""
        if self._between:
            return
        self._plan += 1
        if self._paused:
            self._stand_still()
            return
        batch = self._prefill_batch() if self._waiting else []
        now = self._clock.now
        if batch:
            work_s = self.cost.prefill_step_s
            for sequence, tokens in batch:
                work_s += self.cost.prefill_s(tokens, sequence.prefilled) - self.cost.prefill_step_s
            self._begin(PREFILL, work_s, now)
        elif self._running:
            self._leap = self._ends[0][0] - self._step
            self._begin(DECODE, self.cost.decodes_s(self._running, self._context_tokens, self._leap), now)
        else:
            self._stand_still()

    def _prefill_batch(self) -> list[tuple[Sequence, int]]:
        batch: list[tuple[Sequence, int]] = []
        self._batch = batch
        left = self.costs.chunk_tokens
        while self._waiting and left > 0:
            sequence = self._waiting[0]
            if not self._can_enter(sequence):
                if self.seat.kv_limit_bytes is None:
                    for gpu in self.gpus:
                        gpu.starved.setdefault(self, None)
                break
            if not sequence.started:
                sequence.started = True
                self._hold(sequence.request.final_tokens)
            tokens = min(left, sequence.request.prompt_tokens - sequence.prefilled)
            batch.append((sequence, tokens))
            left -= tokens
            if sequence.prefilled + tokens < sequence.request.prompt_tokens:
                break
            self._waiting.popleft()
        return batch

    def _begin(self, doing: Doing, work_s: float, now: float) -> None:
        was = self._doing
        self._doing, self._work_s, self._done_s, self._since_s = doing, work_s, 0.0, now
        if was is NOTHING:
            for gpu in self.gpus:
                gpu.set_working(self, True, now)
            self._pace = max([gpu.slowdown() for gpu in self.gpus])
        self._arrange()

    def _stand_still(self) -> None:
        if self._doing is not NOTHING:
            self._doing = NOTHING
            for gpu in self.gpus:
                gpu.set_working(self, False, self._clock.now)

    def _arrange(self) -> None:
        self._plan += 1
        end_s = self._clock.now + (self._work_s - self._done_s) * self._pace
        self._clock.at(end_s, partial(self._end, self._plan))

    def _count(self) -> None:
        """Counts what was done since the last look, at the pace of that time."""
        now = self._clock.now
        self._done_s = min(self._work_s, self._done_s + (now - self._since_s) / self._pace)
        self._since_s = now

    def _cut_leap(self) -> None:
        """Ends the leap with the step that is being made."""
        self._count()
        made = self.cost.decodes_within(self._running, self._context_tokens, self._done_s)
        if made + 1 < self._leap:
            self._leap = made + 1
            self._work_s = self.cost.decodes_s(self._running, self._context_tokens, self._leap)
            self._arrange()

    def _settle(self) -> None:
        """Stops in the middle: whole steps that were made count, the rest is lost."""
        if self._between:
            return
        self._count()
        if self._doing is DECODE:
            self._advance(self.cost.decodes_within(self._running, self._context_tokens, self._done_s))
        elif self._doing is PREFILL:
            for sequence, _ in reversed(self._batch):
                if sequence not in self._waiting:
                    self._waiting.appendleft(sequence)
            self._batch = []
        self._plan += 1

    def _advance(self, steps: int) -> None:
        self._step += steps
        self._context_tokens += steps * self._running
        self.tokens_made += steps * self._running

    def _end(self, plan: int) -> None:
        if plan != self._plan or self.dead:
            return
        self._between = True
        if self._doing is PREFILL:
            self._prefill_ended()
        else:
            self._advance(self._leap)
            self._end_sequences()
        self._between = False
        if self.draining and not self._sequences:
            self._left()
            return
        self._next()

    def _prefill_ended(self) -> None:
        batch, self._batch = self._batch, []
        for sequence, tokens in batch:
            sequence.prefilled += tokens
            request = sequence.request
            if sequence.prefilled < request.prompt_tokens:
                continue
            self._listener.first_token(request)
            self.tokens_made += 1
            self._entered += 1
            self._running += 1
            self._context_tokens += request.prompt_tokens + 1
            sequence.last_step = self._step + request.max_tokens - 1
            heappush(self._ends, (sequence.last_step, self._entered, sequence))
        self._end_sequences()

    def _end_sequences(self) -> None:
        while self._ends and self._ends[0][0] <= self._step:
            _, _, sequence = heappop(self._ends)
            request = sequence.request
            self._running -= 1
            self._context_tokens -= request.final_tokens
            del self._sequences[request.request_id]
            self._hold(-request.final_tokens)
            self._listener.sequence_ended(self, sequence)
