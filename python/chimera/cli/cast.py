"""Who is started for a service, with which words, and what is written down for them in the run directory."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from chimera.cli.children import Child
from chimera.cli.service import Service
from chimera.control.charge import Charge


def write_down(service: Service, folder: Path) -> None:
    """What the processes read at their start, and again after a death."""
    charge = Charge(
        models=service.models,
        wanted=service.wanted,
        policy=service.policy,
        local=service.local,
        costs=service.costs,
        warm=service.warm,
    )
    charge.write(folder / "deployment.json")
    access = msgspec.structs.replace(service.access, share=1 / service.fronts)
    (folder / "access.json").write_bytes(msgspec.json.encode(access))
    (folder / "gpus.json").write_bytes(msgspec.json.encode(service.gpus))
    (folder / "costs.json").write_bytes(msgspec.json.encode(service.costs))
    (folder / "prepare.json").write_bytes(msgspec.json.encode(service.prepare))


def cast(service: Service, folder: Path, port: int) -> list[Child]:
    """Everyone, in the order in which they are started; they find each other by their sockets, whoever comes first."""
    told = str(folder)
    decisions = service.log_dir or folder
    level = [*service.keeping.words_for_all, "--log-level", service.log_level]
    parent = ["chimera.worker.parent", "--socket", str(folder / "parent.sock"), "--engine", service.engine]
    control = ["chimera.control", "--run-dir", told, "--deployment", str(folder / "deployment.json")]
    agent = ["chimera.agent", "--run-dir", told, "--name", "local", "--gpus", str(folder / "gpus.json")]
    agent += ["--costs", str(folder / "costs.json"), "--spare-workers", str(service.spare_workers)]
    agent += ["--prepare", str(folder / "prepare.json"), "--prepare-at-once", str(service.prepare_at_once)]
    agent += ["--silent-s", str(service.silent_s)]
    if service.elastic:
        agent.append("--elastic")
    if service.images is not None:
        parent += ["--images", str(service.images.folder)]
        if service.images.budget_bytes is not None:
            parent += ["--images-bytes", str(service.images.budget_bytes)]
    parent += ["--parked-models", str(service.parked_models)]
    if service.parked_bytes is not None:
        parent += ["--parked-bytes", str(service.parked_bytes)]
    parent += ["--host-kv-bytes", str(service.host_kv_bytes)]
    front = ["chimera.server", "--run-dir", told, "--host", service.host, "--port", str(port)]
    front += ["--access", str(folder / "access.json")]
    control += service.keeping.words_for_control(folder)
    front += service.keeping.words_for_front(folder)
    drain = ["--drain-s", str(service.drain_s)]
    return [
        _child("parent", *parent, *level),
        _child("control", *control, "--decisions", str(decisions / "control.decisions.jsonl"), *level),
        _child("agent-local", *agent, "--decisions", str(decisions / "agent-local.decisions.jsonl"), *drain, *level),
        *(_child(f"front-{i}", *front, "--name", f"front-{i}", *drain, *level) for i in range(service.fronts)),
    ]


def _child(name: str, module: str, *arguments: str) -> Child:
    return Child(name, [sys.executable, "-m", module, *arguments])
