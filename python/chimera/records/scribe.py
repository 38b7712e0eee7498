"""Writes down what control hears and decides: rows for whoever keeps them, counts for `/metrics`.

Told the same events and actions as everybody, live or in the simulator, so that a replay on paper is explained by the same
rows. Remembers open attempts and standing replicas only to say how long each took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from chimera.core.measures import LOAD_S, TTFT_S, Histogram, Measures
from chimera.core.model import ModelSpec
from chimera.core.record import Attempt, Entry, RequestRecord
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.msg import actions, events
from chimera.msg.actions import Action

Row = RequestRecord | Attempt | Entry
MOST_OPEN = 1 << 18
"""Attempts whose end never came are forgotten beyond so many."""


class _Open:
    __slots__ = ("reason", "replica", "request", "routed_s")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.replica: ReplicaId | None = None
        self.routed_s = 0.0
        self.reason = ""


class _Standing:
    """A replica from the order to bring it up until it is gone."""

    __slots__ = ("gpus", "leaving_s", "move", "served")

    def __init__(self, gpus: tuple[int, ...], move: bool) -> None:
        self.gpus = gpus
        self.move = move
        self.served: Epoch | None = None
        self.leaving_s: float | None = None


class Scribe:
    """`wall_s` is what the schedulers' clock lacks to be the wall's; on paper there is no other clock."""

    def __init__(self, keep: Callable[[Row], object], measures: Measures | None = None, *, wall_s: float = 0.0) -> None:
        self.measures = measures or Measures()
        self._keep = keep
        self._wall_s = wall_s
        self._open: dict[str, _Open] = {}
        self._standing: dict[ReplicaId, _Standing] = {}
        self._served: set[tuple[str, tuple[int, ...]]] = set()
        """Which models have served where before."""
        self._models: dict[str, ModelSpec] = {}
        self._hears: dict[type, Callable[[Any, float], None]] = {
            events.RequestArrived: self._arrived,
            events.RequestFinished: self._finished,
            events.RequestCancelled: self._cancelled,
            events.ReplicaReady: self._ready,
            events.ReplicaStopped: self._stopped,
            events.ActivationFailed: self._failed,
            events.WorkerLost: self._lost,
            events.AgentJoined: self._joined,
            events.AgentLost: self._away,
            events.PolicyChosen: self._policy,
            events.ModelRegistered: self._registered,
        }
        self._sees: dict[type, Callable[[Any, float], None]] = {
            actions.Route: self._route,
            actions.Activate: self._activate,
            actions.Deactivate: self._deactivate,
            actions.Reject: self._reject,
            actions.Requeue: self._requeue,
            actions.Pause: self._turn,
            actions.Resume: self._turn,
        }

    def step(self, event: object, decided: Sequence[Action], now: float) -> None:
        """One event and what it led to."""
        hear = self._hears.get(type(event))
        if hear is not None:
            hear(event, now)
        for action in decided:
            see = self._sees.get(type(action))
            if see is not None:
                see(action, now)

    def told(self, record: RequestRecord) -> None:
        """A front-end's account of a request that has ended."""
        self.measures.of(record.model).note(record)
        first = record.first_token_s
        self._keep(
            msgspec.structs.replace(
                record,
                arrived_s=record.arrived_s + self._wall_s,
                first_token_s=None if first is None else first + self._wall_s,
                ended_s=record.ended_s + self._wall_s,
            )
        )

    def log(self, entries: Iterable[Entry]) -> None:
        """What an agent has done by itself."""
        for entry in entries:
            self.measures.count(entry.what)
            self._keep(msgspec.structs.replace(entry, at_s=entry.at_s + self._wall_s))

    def _note(self, what: str, now: float, **more: Any) -> None:
        self.measures.count(what)
        self._keep(Entry(at_s=now + self._wall_s, what=what, **more))

    # Requests.

    def _arrived(self, event: events.RequestArrived, now: float) -> None:
        self._open.setdefault(event.request.request_id, _Open(event.request))
        if len(self._open) > MOST_OPEN:
            del self._open[next(iter(self._open))]

    def _route(self, action: actions.Route, now: float) -> None:
        known = self._open.get(action.request.request_id)
        if known is not None:
            known.replica, known.routed_s, known.reason = action.replica, now, action.reason

    def _finished(self, event: events.RequestFinished, now: float) -> None:
        known = self._open.pop(event.request_id, None)
        if known is None:
            return
        if event.admitted_s is not None:
            self.measures.of(known.request.model).queue.see(max(0.0, event.admitted_s - known.request.arrived_s), TTFT_S)
        self._attempted(known, now, str(event.outcome), event)

    def _cancelled(self, event: events.RequestCancelled, now: float) -> None:
        known = self._open.get(event.request_id)
        if known is not None and known.replica is None:
            del self._open[event.request_id]

    def _attempted(self, known: _Open, now: float, outcome: str, end: events.RequestFinished | None = None) -> None:
        if known.replica is None:
            return
        wall_s = self._wall_s
        admitted_s = None if end is None or end.admitted_s is None else end.admitted_s + wall_s
        self._keep(
            Attempt(
                request_id=known.request.request_id,
                model=known.request.model,
                replica=str(known.replica),
                arrived_s=known.request.arrived_s + wall_s,
                routed_s=known.routed_s + wall_s,
                admitted_s=admitted_s,
                ended_s=now + wall_s,
                outcome=outcome,
                output_tokens=0 if end is None else end.output_tokens,
                cached_tokens=0 if end is None else end.cached_tokens,
                reason=known.reason,
            )
        )

    def _reject(self, action: actions.Reject, now: float) -> None:
        self._ended(action, now, "reject", action.code, action.retry_after_s)

    def _requeue(self, action: actions.Requeue, now: float) -> None:
        self._ended(action, now, "requeue", "", None)

    def _ended(self, action: actions.Reject | actions.Requeue, now: float, what: str, code: str, seconds: float | None) -> None:
        known = self._open.pop(action.request_id, None)
        if known is not None:
            self._attempted(known, now, code or "requeued")
        model, replica = ("", None) if known is None else (known.request.model, known.replica)
        self._note(
            what,
            now,
            model=model,
            replica="" if replica is None else str(replica),
            request_id=action.request_id,
            code=str(code),
            reason=action.reason,
            seconds=seconds,
        )

    # Replicas.

    def _activate(self, action: actions.Activate, now: float) -> None:
        replica, gpus = action.seat.replica, action.seat.gpu_ids
        move = self._another(replica)
        self._standing[replica] = _Standing(gpus, move)
        self.measures.moves += move
        self._about("activate", replica, now, gpus=gpus, reason=action.reason, move=move, alternatives=action.alternatives)

    def _deactivate(self, action: actions.Deactivate, now: float) -> None:
        standing = self._standing.get(action.replica)
        if standing is not None:
            standing.leaving_s = now
        self._about(
            "deactivate",
            action.replica,
            now,
            reason=action.reason,
            move=self._another(action.replica),
            alternatives=action.alternatives,
        )

    def _turn(self, action: actions.Pause | actions.Resume, now: float) -> None:
        self._about(type(action).__name__.lower(), action.replica, now, reason=action.reason)

    def _another(self, replica: ReplicaId) -> bool:
        return any(other.model == replica.model and other != replica for other in self._standing)

    def _ready(self, event: events.ReplicaReady, now: float) -> None:
        standing = self._standing.setdefault(event.replica, _Standing((), False))
        if standing.served == event.epoch:
            return  # an agent says again what it has
        standing.served = event.epoch
        place = (event.replica.model, standing.gpus)
        kind = "move" if standing.move else "again" if place in self._served else "first"
        self._served.add(place)
        self.measures.activations.setdefault(kind, Histogram.over(LOAD_S)).see(event.load_s, LOAD_S)
        self._about("ready", event.replica, now, seconds=event.load_s, reason=f"it serves, with {event.kv_tokens} KV tokens")

    def _stopped(self, event: events.ReplicaStopped, now: float) -> None:
        self._over("stopped", event.replica, now, event.reason)

    def _failed(self, event: events.ActivationFailed, now: float) -> None:
        self.measures.failures += 1
        self._over("failed", event.replica, now, event.reason)

    def _lost(self, event: events.WorkerLost, now: float) -> None:
        if event.replica is not None:
            self.measures.failures += 1
            self._over("lost", event.replica, now, event.reason)

    def _over(self, what: str, replica: ReplicaId, now: float, reason: str) -> None:
        standing = self._standing.pop(replica, None)
        gpus = () if standing is None else standing.gpus
        seconds = None if standing is None or standing.leaving_s is None else now - standing.leaving_s
        self._about(what, replica, now, reason=reason, gpus=gpus, seconds=seconds)

    def _about(self, what: str, replica: ReplicaId, now: float, *, gpus: tuple[int, ...] = (), **more: Any) -> None:
        standing = self._standing.get(replica)
        gpus = gpus or (() if standing is None else standing.gpus)
        self._note(what, now, model=replica.model, replica=str(replica), gpus=gpus, **more)

    # The rest of the house.

    def _joined(self, event: events.AgentJoined, now: float) -> None:
        gpus = tuple(gpu.gpu_id for gpu in event.gpus)
        self._note("joined", now, gpus=gpus, reason=f"agent {event.agent} is here with {len(gpus)} GPUs")

    def _away(self, event: events.AgentLost, now: float) -> None:
        self._note("away", now, reason=f"agent {event.agent}: {event.reason}")

    def _policy(self, event: events.PolicyChosen, now: float) -> None:
        policy = [] if event.policy is None else [f"the policy {event.policy}"]
        local = [] if event.local is None else [f"requests by {event.local}"]
        chosen = event.policy or event.local or ""
        self._note("policy", now, code=chosen, reason=f"an operator chose {' and '.join(policy + local)}")

    def _registered(self, event: events.ModelRegistered, now: float) -> None:
        known, self._models[event.model.name] = self._models.get(event.model.name), event.model
        if known is not None and known.pin != event.model.pin:
            what = "pin" if event.model.pin else "unpin"
            self._note(what, now, model=event.model.name, reason="an operator wants it so")
