"""The process of one worker: EMPTY until its agent gives it a model, EMPTY again when that has left."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from chimera.engine.api import CannotServe, Engine, Leave
from chimera.msg import actions, events, stream
from chimera.worker.following import Following
from chimera.worker.keeping import Keeping
from chimera.worker.lease import LeaseDesk
from chimera.worker.life import Life
from chimera.worker.ties import AgentGone, Ties

if TYPE_CHECKING:
    from chimera.spans.engine import EngineSpans

log = logging.getLogger(__name__)


def run(worker: str, agent_socket: Path, make_engine: Callable[[], Engine], spans: EngineSpans | None = None) -> int:
    """From birth to exit status. Returns when the agent says stop or is gone."""
    try:
        ties = Ties(worker, agent_socket)
    except OSError as fault:
        log.warning("no agent to work for: %s", fault)
        return 1
    engine = make_engine()
    keeping = Keeping(engine, ties)
    log.info("empty worker=%s pid=%d", worker, os.getpid())
    try:
        while (order := _next_activation(engine, ties, keeping)) is not None:
            if _live(order, engine, ties, keeping, spans):
                return 0
    except AgentGone as end:
        log.info("leaving worker=%s reason=%s", worker, end)
    finally:
        if spans is not None:
            spans.close()
    return 0


def _next_activation(engine: Engine, ties: Ties, keeping: Keeping) -> actions.Activate | None:
    """Waits, EMPTY, for a model; `None` is the order to stop."""
    while True:
        messages = ties.receive(None)
        for number, message in enumerate(messages, 1):
            match message:
                case actions.Activate(epoch=epoch) if epoch is not None:
                    ties.put_back(messages[number:])
                    return message
                case stream.Prepare():
                    _prepare(message, engine, ties)
                case stream.LetGo():
                    keeping.obey(message)
                case stream.Stop():
                    return None
                case stream.Submit(request_id=request_id, front=front):
                    what = "the model has left this worker"
                    failed = stream.Failed(request_id=request_id, code="requeue", message=what, requeue=True)
                    ties.tell_front(front, failed)


def _prepare(order: stream.Prepare, engine: Engine, ties: Ties) -> None:
    name, began_s = order.model.name, time.monotonic()
    try:
        host_bytes = engine.prepare(order.model, gpu_ids=order.gpu_ids)
    except CannotServe as fault:
        log.warning("preparation failed model=%s reason=%s", name, fault)
        ties.tell_agent(stream.Prepared(model=name, fault=str(fault)))
        return
    took_s = time.monotonic() - began_s
    log.info("prepared model=%s host_bytes=%d took_s=%.3f", name, host_bytes, took_s)
    ties.tell_agent(stream.Prepared(model=name, host_bytes=host_bytes, took_s=took_s))


def _live(order: actions.Activate, engine: Engine, ties: Ties, keeping: Keeping, spans: EngineSpans | None) -> bool:
    """One life, from activation to `ReplicaStopped`; whether the process was told to stop in it."""
    replica, epoch = order.seat.replica, order.epoch
    assert epoch is not None
    started = time.monotonic()
    kv_bytes, ceiling_bytes = order.seat.kv_limit_bytes, None
    if order.leases:
        kv_bytes = min(lease.level * lease.page_bytes for lease in order.leases)
        ceiling_bytes = min(lease.ceiling * lease.page_bytes for lease in order.leases)
    try:
        vitals = engine.activate(
            order.model, gpu_ids=order.seat.gpu_ids, kv_bytes=kv_bytes, ceiling_bytes=ceiling_bytes, place=order.place
        )
    except CannotServe as fault:
        log.warning("activation failed replica=%s reason=%s", replica, fault)
        if spans is not None:
            spans.activation(order.trace, replica.model, started, time.monotonic(), fault=str(fault))
        engine.deactivate()
        ties.tell_agent(
            events.ActivationFailed(replica=replica, epoch=epoch, reason=str(fault), permanent=fault.permanent),
        )
        keeping.tell_changes()
        return False
    ready = events.ReplicaReady(
        replica=replica,
        epoch=epoch,
        credits=vitals.credits,
        kv_tokens=vitals.kv_tokens,
        context_length=vitals.context_length,
        load_s=time.monotonic() - started,
    )
    ties.tell_agent(ready)
    if spans is not None:
        spans.activation(order.trace, replica.model, started, time.monotonic())
    if order.place is not None:
        keeping.tell_changes()  # a gang keeps nothing beside it
    life: Life | Following
    if order.place is not None and order.place.rank:
        life = Following(epoch, ties)
    else:
        leases = dict(zip(order.seat.gpu_ids, order.leases, strict=True)) if order.leases else None
        desk = None if leases is None else LeaseDesk(replica, epoch, leases)
        life = Life(replica, epoch, engine, ties, keeping, desk, spans)
        ties.stand_as(partial(life.standing, order, ready))
    log.info("serving replica=%s epoch=%s load_s=%.3f", replica, epoch, time.monotonic() - started)
    with contextlib.suppress(Leave):
        engine.serve(life)
    engine.deactivate()
    ties.stand_as(None)
    alone = len(order.leases) == 1  # what a gang keeps, each of it says for itself
    kept = keeping.told(order.seat.gpu_ids[0], order.leases[0].page_bytes) if alone else None
    ties.tell_agent(events.ReplicaStopped(replica=replica, epoch=epoch, reason=life.stop_reason, kept=kept))
    log.info("empty again replica=%s reason=%s", replica, life.stop_reason)
    return life.told_to_stop
