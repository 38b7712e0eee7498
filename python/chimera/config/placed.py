"""Writes a placement file: the operator's entries with the places, splits and promises that a plan gives them.

What the file said otherwise stays as it was written. The new file is read back by the server's own reader before it has its
name, so nothing is left behind that `serve` would refuse.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from chimera.config.deployment import survey_placement
from chimera.config.document import read_document
from chimera.config.faults import Faults
from chimera.config.placement_file import Policy
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.errors import ConfigError
from chimera.units import GB

SERVED_POLICIES: tuple[str, ...] = get_args(Policy)


def write_placed(
    path: Path,
    *,
    source: Path,
    models: Sequence[ModelSpec],
    placement: Placement,
    gpus: Sequence[Gpu],
    policy: str,
    local: str,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """`source` is the file that the models came from."""
    faults = Faults(str(source))
    document = read_document(source, environment, faults)
    faults.require_none()
    listed = document["models"] if isinstance(document, dict) else document
    written = {entry["model_name"]: entry for entry in listed}
    entries = [_entry(written, model, placement, source, path) for model in models]
    whole = {**(document if isinstance(document, dict) else {}), "models": entries, "policy": policy, "local": local}
    whole.pop("gpus", None)
    draft = path.with_name(f".{path.stem}.draft.json")
    try:
        draft.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        survey_placement(draft, gpus, environment=environment)
        os.replace(draft, path)
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be written: {fault.strerror or fault}") from None
    finally:
        draft.unlink(missing_ok=True)


_ON_PAPER = ("weight_bytes", "kv_bytes_per_token", "reject_late", "keep_alive_s")


def _entry(
    written: Mapping[str, dict[str, Any]], model: ModelSpec, placement: Placement, source: Path, path: Path
) -> dict[str, Any]:
    entry = dict(written[model.name])
    if not entry.get("model_path"):
        hint = "name its checkpoint there; a simulation needs none, a server does"
        raise ConfigError.single(str(source), f"{model.name} has no model_path", hint=hint)
    if "weight_bytes" in entry:
        entry = _served(entry)
    for key in ("model_path", "tokenizer_path"):
        folder = source.parent / os.path.expanduser(entry.get(key) or "")
        if entry.get(key) and folder.is_dir():
            entry[key] = os.path.relpath(folder, path.parent)
    return {
        **entry,
        "model_name": model.name,
        "tp_size": model.tp_size,
        "slo": {**entry.get("slo", {}), **_promises(model)},
        "init_placements": [_place(seat) for seat in placement.seats if seat.replica.model == model.name],
    }


def _served(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry on paper, in the words of the placement file."""
    kept = {key: value for key, value in entry.items() if key not in _ON_PAPER}
    if "keep_alive_s" in entry:
        kept["keep_alive"] = entry["keep_alive_s"]
    if entry.get("reject_late"):
        kept["slo"] = {**entry.get("slo", {}), "late": "reject"}
    return kept


def _promises(model: ModelSpec) -> dict[str, float]:
    told = {"ttft_ms": model.slo.ttft_s, "tpot_ms": model.slo.tpot_s}
    return {key: round(1000 * seconds, 3) for key, seconds in told.items() if seconds is not None}


def _place(seat: Seat) -> dict[str, Any]:
    place: dict[str, Any] = {"gpu_ids": list(seat.gpu_ids), "on": True}
    if seat.kv_limit_bytes is not None:
        place["max_memory_pool_size"] = seat.kv_limit_bytes // 10**6 / (GB // 10**6)
    return place
