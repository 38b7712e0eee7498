"""Control's spans: of each request, how long it waited here and where it went; of each order about a replica, from the
decision until it was carried out. Told every step, as the witness is; the reasons are the actions' own.
"""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.trace import Span

from chimera.core.replica import ReplicaId
from chimera.core.request import Request
from chimera.msg import actions, events
from chimera.msg.actions import Action
from chimera.spans.spans import Spans, context_of


class DecisionSpans:
    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._waiting: dict[str, tuple[Request, float]] = {}
        """Requests that tell of themselves, and since when they are here."""
        self._coming: dict[ReplicaId, Span] = {}
        self._leaving: dict[ReplicaId, Span] = {}

    def activate(self, action: actions.Activate, now: float) -> str:
        """The context for whoever brings it up."""
        replica = action.seat.replica
        span = self._coming[replica] = self._order("activate", replica, action, now)
        span.set_attribute("chimera.gpus", action.seat.gpu_ids)
        return context_of(span)

    def step(self, event: object, decided: Sequence[Action], now: float) -> None:
        match event:
            case events.RequestArrived(request=request) if request.trace:
                self._waiting.setdefault(request.request_id, (request, now))
            case events.RequestCancelled(request_id=request_id):
                self._leave(request_id, now, "cancelled")
            case events.ReplicaReady(replica=replica):
                self._end(self._coming, replica, now)
            case events.ReplicaStopped(replica=replica, reason=reason):
                self._end(self._coming, replica, now, "stopped", reason)
                self._end(self._leaving, replica, now)
            case events.ActivationFailed(replica=ReplicaId() as replica, reason=reason):
                self._end(self._coming, replica, now, "failed", reason)
            case events.WorkerLost(replica=ReplicaId() as replica, reason=reason):
                self._end(self._coming, replica, now, "lost", reason)
                self._end(self._leaving, replica, now)
        for action in decided:
            match action:
                case actions.Deactivate(replica=replica):
                    self._leaving[replica] = self._order("deactivate", replica, action, now)
                case actions.Route(request=request, replica=replica, reason=reason):
                    self._leave(request.request_id, now, replica=str(replica), reason=reason)
                case actions.Reject(request_id=request_id, code=code, reason=reason):
                    self._leave(request_id, now, str(code), reason=reason)

    def close(self) -> None:
        self._spans.close()

    def _leave(self, request_id: str, now: float, fault: str = "", *, replica: str = "", reason: str = "") -> None:
        request, since_s = self._waiting.pop(request_id, (None, 0.0))
        if request is None:
            return
        span = self._spans.begin(
            f"dispatch {request.model}",
            request.trace,
            since_s,
            gen_ai__request__model=request.model,
            chimera__replica=replica,
            chimera__reason=reason,
        )
        self._spans.end(span, now, fault, reason)

    def _order(self, what: str, replica: ReplicaId, action: actions.Activate | actions.Deactivate, now: float) -> Span:
        span = self._spans.begin(
            f"{what} {replica.model}",
            "",
            now,
            gen_ai__request__model=replica.model,
            chimera__replica=str(replica),
            chimera__reason=action.reason,
        )
        for one in action.alternatives:
            weighed = {"score": one.score, "unit": one.unit, "chosen": one.chosen}
            span.add_event(one.what, weighed, timestamp=self._spans.ns(now))
        return span

    def _end(self, orders: dict[ReplicaId, Span], replica: ReplicaId, now: float, fault: str = "", detail: str = "") -> None:
        span = orders.pop(replica, None)
        if span is not None:
            self._spans.end(span, now, fault, detail)
