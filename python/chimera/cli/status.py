"""`chimera status`: what a running server holds and does, as a table or as JSON. Reads the snapshot; keeps nothing."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from chimera.cli.server_url import DEFAULT_URL, ServerError, request
from chimera.core.gpu import Gpu
from chimera.core.replica import ReplicaState
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.units import format_bytes

_ANSWER_WITHIN_S = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the snapshot as it is")


def run(arguments: argparse.Namespace) -> int:
    with request(arguments.url, "GET", "/snapshot", within_s=_ANSWER_WITHIN_S) as response:
        document = response.read()
    if arguments.json:
        print(document.decode())
        return 0
    try:
        snapshot = msgspec.json.decode(document, type=Snapshot)
    except msgspec.DecodeError as fault:
        raise ServerError(f"{arguments.url} sent a snapshot of another release: {fault}") from None
    print(render(snapshot))
    return 0


def render(snapshot: Snapshot) -> str:
    """For people, on 80 columns where names allow it."""
    serving = sum(view.state is ReplicaState.SERVING for view in snapshot.replicas)
    gpus, models = _count(len(snapshot.gpus), "GPU"), _count(len(snapshot.models), "model")
    head = f"policy {snapshot.policy}, requests by {snapshot.local} · {gpus} · {models}, {serving} up"
    return "\n\n".join([head, _models(snapshot), _gpus(snapshot), *unwell(snapshot)])


def unwell(snapshot: Snapshot) -> list[str]:
    """What went wrong with replicas that are not well, a line each."""
    lines = []
    for view in snapshot.replicas:
        if view.quarantine_s is not None:
            rest = f"left alone for {view.quarantine_s:.0f} s more after {view.failures} failures in a row"
            lines.append(f"{view.replica}: {rest}, the last: {view.why}")
        elif view.why:
            lines.append(f"{view.replica}: {view.why}")
    return ["\n".join(lines)] if lines else []


def _models(snapshot: Snapshot) -> str:
    """Every model: its replicas, a line each, or a line that says it is down."""
    views = defaultdict(list)
    for replica in snapshot.replicas:
        views[replica.replica.model].append(replica)
    rows = []
    for spec in snapshot.models:
        waiting = snapshot.waiting.get(spec.name, 0)
        ours: Sequence[ReplicaView | None] = views[spec.name] or [None]
        for view in ours:
            rows.append(_row(spec.name, view, waiting))
            waiting = 0  # they wait for the model, not for one replica
    return table(("MODEL", "STATE", "GPU", "RUNNING", "QUEUED", "WAITING", "KV TOKENS"), rows)


def _row(model: str, view: ReplicaView | None, waiting: int) -> tuple[str, ...]:
    if view is None:
        return (model, "down", "", "", "", str(waiting or ""), "")
    name = str(view.replica) if view.replica.index else model
    gpus = ",".join(map(str, view.gpu_ids))
    kv = f"{view.kv_used_tokens:,} of {view.kv_tokens:,}" if view.kv_tokens else ""
    return (name, state_of(view), gpus, str(view.running), str(view.queued), str(waiting or ""), kv)


def state_of(view: ReplicaView) -> str:
    return view.state.value if view.quarantine_s is None else "quarantined"


def _gpus(snapshot: Snapshot) -> str:
    rows = [
        (str(gpu.gpu_id), gpu.node, gpu.name, format_bytes(gpu.capacity_bytes), _on(gpu, snapshot)) for gpu in snapshot.gpus
    ]
    return table(("GPU", "NODE", "NAME", "MEMORY", "MODELS"), rows)


def _on(gpu: Gpu, snapshot: Snapshot) -> str:
    return " ".join(view.replica.model for view in snapshot.replicas if gpu.gpu_id in view.gpu_ids) or "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
