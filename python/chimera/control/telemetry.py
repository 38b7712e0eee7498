"""The newest counters of every replica and ledgers of every agent, laid over the scheduler's snapshot for its readers.

Keeps what workers and agents say of themselves (what runs, who holds what memory) and nothing else; a counter of another
life of the replica than the present one is not shown.
"""

from __future__ import annotations

import msgspec

from chimera.core.ledger_view import LedgerView
from chimera.core.replica import ReplicaId
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.msg.stream import Heartbeat


class Telemetry:
    def __init__(self) -> None:
        self._newest: dict[ReplicaId, Heartbeat] = {}
        self._ledgers: dict[str, LedgerView] = {}

    def note(self, heartbeat: Heartbeat) -> None:
        self._newest[heartbeat.replica] = heartbeat

    def note_ledgers(self, agent: str, view: LedgerView) -> None:
        self._ledgers[agent] = view

    def forget_agent(self, agent: str) -> None:
        self._ledgers.pop(agent, None)

    def overlay(self, snapshot: Snapshot) -> Snapshot:
        present = {view.replica for view in snapshot.replicas}
        self._newest = {replica: beat for replica, beat in self._newest.items() if replica in present}
        ledgers = (ledger for view in self._ledgers.values() for ledger in view.gpus)
        return msgspec.structs.replace(
            snapshot,
            replicas=tuple(self._view(view) for view in snapshot.replicas),
            ledgers=tuple(sorted(ledgers, key=lambda ledger: ledger.gpu.gpu_id)),
        )

    def _view(self, view: ReplicaView) -> ReplicaView:
        beat = self._newest.get(view.replica)
        if beat is None or beat.epoch != view.epoch:
            return view
        return msgspec.structs.replace(
            view,
            running=beat.running,
            queued=view.queued + beat.queued,
            kv_tokens=beat.kv_tokens,
            kv_used_tokens=beat.kv_used_tokens,
        )
