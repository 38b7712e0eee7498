"""Models on paper: what a simulation has to know of a model, without a checkpoint. Reads the file; knows no simulation.

A list of objects in the words of the placement file, with `weight_bytes` and `kv_bytes_per_token` (per tensor-parallel rank)
where that has a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from chimera.config.placement_file import Name, SloEntry
from chimera.core.model import ModelSpec, Slo
from chimera.errors import ConfigError
from chimera.units import ceil_div

Count = Annotated[int, msgspec.Meta(ge=1)]


class PaperModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model_name: Name
    model_path: str = ""
    """The checkpoint, where there is one; a simulation needs none, and a placement file does."""
    weight_bytes: Count
    kv_bytes_per_token: Count
    context_length: Count = 131072
    tp_size: Count = 1
    slo: SloEntry = SloEntry()
    reject_late: bool = False
    priority: int = 0
    pin: bool = False
    preload: bool = False
    keep_alive_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0


def is_on_paper(path: Path) -> bool:
    """Whether the file lists models on paper; if not, it is a placement file."""
    try:
        return path.suffix == ".json" and b'"weight_bytes"' in path.read_bytes()
    except OSError as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault.strerror or fault}") from None


def read_paper_models(path: Path) -> tuple[ModelSpec, ...]:
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=tuple[PaperModel, ...])
    except msgspec.DecodeError as fault:
        raise ConfigError.single(str(path), str(fault)) from None
    names = [entry.model_name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not entries:
        raise ConfigError.single(str(path), f"lists {twice!r} twice" if twice else "lists no model")
    return tuple(_spec(entry) for entry in entries)


def paper_splits(model: ModelSpec, sizes: Sequence[int]) -> tuple[ModelSpec, ...]:
    """The model over each of so many GPUs, each with an equal part of weights and cache."""
    weights, token = model.weight_bytes * model.tp_size, model.kv_bytes_per_token * model.tp_size
    return tuple(
        msgspec.structs.replace(
            model, tp_size=size, weight_bytes=ceil_div(weights, size), kv_bytes_per_token=ceil_div(token, size)
        )
        for size in sizes
    )


def _spec(entry: PaperModel) -> ModelSpec:
    return ModelSpec(
        name=entry.model_name,
        path=entry.model_path,
        tokenizer_path=entry.model_path,
        architecture="paper",
        weight_bytes=entry.weight_bytes,
        kv_bytes_per_token=entry.kv_bytes_per_token,
        context_length=entry.context_length,
        tp_size=entry.tp_size,
        slo=Slo(ttft_s=_seconds(entry.slo.ttft_ms), tpot_s=_seconds(entry.slo.tpot_ms), reject_late=entry.reject_late),
        priority=entry.priority,
        pin=entry.pin,
        preload=entry.preload,
        keep_alive_s=entry.keep_alive_s,
        drain_s=entry.drain_s,
        engine="simulated",
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
