"""The newest counters of every replica, laid over the scheduler's snapshot for its readers.

Keeps what workers say of themselves (what runs, what KV memory is used) and nothing else; a counter of another life of the
replica than the present one is not shown.
"""

from __future__ import annotations

import msgspec

from chimera.core.replica import ReplicaId
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.msg.stream import Heartbeat


class Telemetry:
    def __init__(self) -> None:
        self._newest: dict[ReplicaId, Heartbeat] = {}

    def note(self, heartbeat: Heartbeat) -> None:
        self._newest[heartbeat.replica] = heartbeat

    def overlay(self, snapshot: Snapshot) -> Snapshot:
        present = {view.replica for view in snapshot.replicas}
        self._newest = {replica: beat for replica, beat in self._newest.items() if replica in present}
        return msgspec.structs.replace(snapshot, replicas=tuple(self._view(view) for view in snapshot.replicas))

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
