"""The stream of a request: from front-end to engine and back, and the greetings between processes.

A request's payload (its prompt tokens and sampling settings) is encoded once by the front-end and decoded once by the
engine; dispatcher and agents carry it as opaque bytes beside the `Request` they decide on.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from chimera.core.ledger_view import LedgerView
from chimera.core.measures import Measures, Tally
from chimera.core.model import ModelSpec
from chimera.core.record import Entry, RequestRecord
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.request import Request
from chimera.core.sight import Past, Sight
from chimera.core.snapshot import Snapshot
from chimera.msg.actions import Activate, Route
from chimera.msg.events import Outcome, ReplicaReady


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """The form that an answer must have; an engine lets no other token through."""

    kind: Literal["json_schema", "regex", "ebnf", "structural_tag"]
    text: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick tokens; the words are SGLang's."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    grammar: Grammar | None = None


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs of a request."""

    input_ids: list[int]
    sampling: Sampling
    logprobs: int | None = None
    """How many alternatives to report per token; `None` reports no log-probabilities."""
    resumed_tokens: int = 0
    """How many of the last input tokens are the answer's own, from an earlier try: a grammar has been through them."""
    embeds: bool = False
    """Wants the prompt's embedding, and no token."""


class Stream(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The root of all stream messages."""


class Hello(Stream, frozen=True, kw_only=True):
    """The first message on every connection: who speaks."""

    role: str
    """`front`, `control`, `agent`, `worker` or `cli`."""
    name: str
    pid: int


class Enqueue(Stream, frozen=True, kw_only=True):
    """A request with its payload, from front-end to dispatcher to agent."""

    request: Request
    payload: bytes


class Delivery(Stream, frozen=True, kw_only=True):
    """A routed request with its payload, from dispatcher to agent."""

    route: Route
    payload: bytes


class Cancel(Stream, frozen=True, kw_only=True):
    request_id: str


class FrontLost(Stream, frozen=True, kw_only=True):
    """The front-end's process has exited, and with it the clients of all its requests; from control to the agents."""

    front: str


class Submit(Stream, frozen=True, kw_only=True):
    """An admitted request, from agent to worker."""

    request_id: str
    epoch: Epoch
    front: str
    payload: bytes
    request: Request | None = None
    """Its measure, which the worker keeps for an agent that comes after this one."""


class Standing(Stream, frozen=True, kw_only=True):
    """What a worker is, to an agent that comes after the one it lost; `PagesHeld` follows where memory is elastic."""

    activation: Activate | None = None
    """Empty while it is EMPTY."""
    ready: ReplicaReady | None = None
    running: tuple[Request, ...] = ()
    leaving: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step made for one request. `outcome` is set on its last delta.

    Hundreds are made in every step and none can be part of a cycle, so the collector need not look at them.
    """

    request_id: str
    token_ids: list[int]
    outcome: Outcome | None = None
    cached_tokens: int = 0
    matched_stop: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    embedding: bytes | None = None
    """Of the whole prompt: float32, lowest byte first."""


class Tokens(Stream, frozen=True, kw_only=True):
    """One engine step for every request of one front-end: one message per worker, step and front-end."""

    replica: ReplicaId
    epoch: Epoch
    deltas: list[TokenDelta]


class Failed(Stream, frozen=True, kw_only=True):
    """The request ends in one error, or, if `requeue`, comes back to its front-end to be tried again.

    One that comes back with the code `preempted` has made way for another.
    """

    request_id: str
    code: str
    message: str
    requeue: bool = False
    retry_after_s: float | None = None


class Heartbeat(Stream, frozen=True, kw_only=True):
    """A worker's counters, sent on change and at most every so often; empty lists of news are not sent."""

    replica: ReplicaId
    epoch: Epoch
    running: int
    queued: int
    kv_tokens: int
    kv_used_tokens: int
    lost_cached_tokens: int = 0
    """Cached prefixes that went because memory was recalled, in this life."""


class Ping(Stream, frozen=True, kw_only=True):
    """Asks a worker that has a model, and has said nothing for long, whether it still takes steps; from its agent."""


class Pong(Stream, frozen=True, kw_only=True):
    """It does, or has nothing to do: said between two steps."""


class Fork(Stream, frozen=True, kw_only=True):
    """Asks the preloaded parent for one more worker, which greets `agent_socket`."""

    worker: str
    agent_socket: str


class Forked(Stream, frozen=True, kw_only=True):
    worker: str
    pid: int


class Prepare(Stream, frozen=True, kw_only=True):
    """Asks an EMPTY worker to do beforehand what makes later activations of the model fast; it stays EMPTY.

    For a model that comes later, from whoever has started the server, through control, to the agents.
    """

    model: ModelSpec
    gpu_ids: tuple[int, ...] = (0,)


class LetGo(Stream, frozen=True, kw_only=True):
    """Asks a worker to keep no more than so many pages of models that have left; `PagesKept` is the answer."""

    gpu_id: int
    pages: int
    page_bytes: int
    reason: str


class Prepared(Stream, frozen=True, kw_only=True):
    model: str
    host_bytes: int = 0
    """What is kept in the host's memory for it."""
    took_s: float = 0.0
    fault: str = ""
    """Why it cannot be; an activation would fail as well."""


class LedgerTold(Stream, frozen=True, kw_only=True):
    """An agent's ledgers, on change and at most every so often."""

    view: LedgerView


class ReplicaNews(Stream, frozen=True, kw_only=True):
    """What has become of a replica, and why; from control to every front-end, for those who watch."""

    replica: ReplicaId
    state: ReplicaState
    reason: str
    gpu_ids: tuple[int, ...] = ()
    at_s: float
    """On control's monotonic clock."""
    load_s: float | None = None
    failed: bool = False
    """It has stopped because it could not be brought up, or was lost."""


class StandingWanted(Stream, frozen=True, kw_only=True):
    """How far a request has come that nobody has begun to answer; from its front-end to control."""

    request_id: str


class StandingTold(Stream, frozen=True, kw_only=True):
    """It waits for its model: behind so many others, for about so long, and why."""

    request_id: str
    position: int
    """One is next."""
    wait_s: float
    why: str


class ReloadWanted(Stream, frozen=True, kw_only=True):
    """Read the placement file again: from a front-end, through control, to whoever has started the server."""

    order: str
    front: str


class EntryFiled(Stream, frozen=True, kw_only=True):
    """One more model, on the same way."""

    order: str
    front: str
    entry: bytes
    """As in a placement file, in JSON."""


class Flush(Stream, frozen=True, kw_only=True):
    """Let go of the cached prefixes of these replicas: from a front-end through control and agents to workers."""

    order: str
    front: str
    replicas: tuple[ReplicaId, ...]


class Flushed(Stream, frozen=True, kw_only=True):
    """One of them has, on the way back."""

    order: str
    front: str
    replica: ReplicaId


class Refiled(Stream, frozen=True, kw_only=True):
    """What came of either, back to the front-end: what has changed; or every fault, and nothing has."""

    order: str
    front: str
    changes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


class RequestTold(Stream, frozen=True, kw_only=True):
    """How a client's request went, from its front-end to control, once it has ended."""

    record: RequestRecord


class TallyTold(Stream, frozen=True, kw_only=True):
    """What a front-end has counted since it began: levels, never differences. On change and at most every so often."""

    tally: Tally


class EntriesTold(Stream, frozen=True, kw_only=True):
    """What an agent has done by itself, for control's log of actions."""

    entries: tuple[Entry, ...]


class MeasuresWanted(Stream, frozen=True, kw_only=True):
    """Ask control for all that has been counted; the newest `TallyTold` of the one who asks came before this."""


class MeasuresTaken(Stream, frozen=True, kw_only=True):
    measures: Measures
    snapshot: Snapshot


class SnapshotWanted(Stream, frozen=True, kw_only=True):
    """Ask control for the state of the whole system."""


class SnapshotTaken(Stream, frozen=True, kw_only=True):
    snapshot: Snapshot


class SightWanted(Stream, frozen=True, kw_only=True):
    """Ask control for the newest second, as viewers see it."""

    cast: int = 0
    """The number of the cast that is known."""
    after: int = 0
    """The number of the newest entry that is known."""


class SightTaken(Stream, frozen=True, kw_only=True):
    sight: Sight


class PastWanted(Stream, frozen=True, kw_only=True):
    """Ask control for the last minutes, for a viewer who has just come."""


class PastTaken(Stream, frozen=True, kw_only=True):
    past: Past


class Stop(Stream, frozen=True, kw_only=True):
    """End the process in order: drain for up to `drain_s`, then leave."""

    drain_s: float = 0.0
