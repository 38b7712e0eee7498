"""`chimera ps`: the models that are up or on their way, a line each. Reads the snapshot; keeps nothing."""

from __future__ import annotations

import argparse

import msgspec

from chimera.cli.server_url import DEFAULT_URL, ServerError, request
from chimera.cli.status import state_of, table, unwell
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.units import format_bytes

_ANSWER_WITHIN_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the replicas as the snapshot has them")


def run(arguments: argparse.Namespace) -> int:
    with request(arguments.url, "GET", "/snapshot", within_s=_ANSWER_WITHIN_S) as response:
        document = response.read()
    try:
        snapshot = msgspec.json.decode(document, type=Snapshot)
    except msgspec.DecodeError as fault:
        raise ServerError(f"{arguments.url} sent a snapshot of another release: {fault}") from None
    print(msgspec.json.encode(snapshot.replicas).decode() if arguments.json else render(snapshot))
    return 0


def render(snapshot: Snapshot) -> str:
    rows = [_row(view, snapshot) for view in sorted(snapshot.replicas, key=lambda view: view.replica)]
    return "\n\n".join([table(("MODEL", "STATE", "FOR", "GPU", "KV", "REQUESTS", "PINNED"), rows), *unwell(snapshot)])


def _row(view: ReplicaView, snapshot: Snapshot) -> tuple[str, ...]:
    spec = next((spec for spec in snapshot.models if spec.name == view.replica.model), None)
    name = str(view.replica) if view.replica.index else view.replica.model
    held = "" if spec is None or not view.kv_tokens else format_bytes(spec.kv_bytes(view.kv_tokens))
    requests = f"{view.running + view.queued}" if view.running or view.queued else ""
    pinned = "yes" if spec is not None and spec.pin else ""
    return (
        name,
        state_of(view),
        _span(snapshot.now_s - view.since_s),
        ",".join(map(str, view.gpu_ids)),
        held,
        requests,
        pinned,
    )


def _span(seconds: float) -> str:
    for size, letter in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{letter}"
    return f"{max(0.0, seconds):.0f}s"
