"""`chimera check FILE`: every fault of a placement file, one a line; or what it asks for, in a table. Starts nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from chimera.config.deployment import Survey, survey_placement
from chimera.config.placement_file import ModelEntry, json_schema
from chimera.config.rules import kv_dtype, pool_bytes
from chimera.config.virtual_gpus import parse_virtual_gpus
from chimera.errors import ConfigError
from chimera.units import format_bytes

UNKNOWN = "?"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="a placement file, .json or .yaml")
    parser.add_argument("--gpus", metavar="8x80GB", help="the GPUs to hold it against (default: those the file names itself)")
    parser.add_argument("--static", action="store_true", help="pools are reserved, so their sums have to fit")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of placement files and stop")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    if arguments.file is None:
        arguments.usage_error("FILE is missing")
    try:
        gpus = parse_virtual_gpus(arguments.gpus) if arguments.gpus else None
        survey = survey_placement(arguments.file, gpus, elastic=not arguments.static)
    except ConfigError as error:
        if not arguments.json:
            raise
        print(json.dumps({"file": error.source, "ok": False, "faults": msgspec.to_builtins(error.faults)}, indent=2))
        return 1
    print(json.dumps(_report(survey), indent=2) if arguments.json else _page(survey))
    return 0


def _report(survey: Survey) -> dict[str, Any]:
    return {
        "file": survey.source,
        "ok": True,
        "faults": [],
        "elastic": survey.elastic,
        "models": [_measures(survey, index, entry) for index, entry in enumerate(survey.file.models)],
        "gpus": _loads(survey),
        "not_on_this_machine": list(survey.absent),
    }


def _measures(survey: Survey, index: int, entry: ModelEntry) -> dict[str, Any]:
    """One model; what its folder would tell is null where there is no folder yet."""
    checkpoint = survey.checkpoints.get(index)
    shape = checkpoint.shape if checkpoint else None
    return {
        "name": entry.model_name,
        "path": entry.model_path,
        "architecture": shape.architecture if shape else None,
        "tp_size": entry.tp_size,
        "weight_bytes": shape.weight_bytes(entry.tp_size, entry.dtype, entry.quantization) if shape else None,
        "kv_bytes_per_token": shape.kv_bytes_per_token(entry.tp_size, kv_dtype(entry), entry.dtype) if shape else None,
        "context_length": entry.context_length or (shape.context_length if shape else None),
        "placements": [
            {"gpu_ids": placement.gpu_ids, "on": placement.on, "kv_limit_bytes": pool_bytes(placement)}
            for placement in entry.init_placements
        ],
    }


def _loads(survey: Survey) -> list[dict[str, Any]]:
    """Each GPU with what is on from the start. Weights that are not known count as nothing."""
    models = [_measures(survey, index, entry) for index, entry in enumerate(survey.file.models)]
    loads = []
    for gpu in survey.gpus:
        here = [
            (model, seat) for model in models for seat in model["placements"] if seat["on"] and gpu.gpu_id in seat["gpu_ids"]
        ]
        loads.append(
            {
                "gpu_id": gpu.gpu_id,
                "capacity_bytes": gpu.capacity_bytes,
                "models": [model["name"] for model, _ in here],
                "weight_bytes": sum(model["weight_bytes"] or 0 for model, _ in here),
                "kv_limit_bytes": _sum_of_limits(seat["kv_limit_bytes"] for _, seat in here),
            }
        )
    return loads


def _sum_of_limits(limits: Iterable[int | None]) -> int | None:
    """None as soon as one pool may take whatever is free."""
    total = 0
    for limit in limits:
        if limit is None:
            return None
        total += limit
    return total


def _page(survey: Survey) -> str:
    models, mode = _report(survey)["models"], "elastic" if survey.elastic else "static"
    pools = "KV ceiling" if survey.elastic else "KV reserved"
    pages = [f"{survey.source}: no faults; {len(models)} models, {mode}"]
    header = ["model", "architecture", "tp", "weights/rank", "KV/token", "context", "GPUs (+ on)", pools]
    pages.append(_table([header, *(_model_row(model) for model in models)]))
    if survey.gpus:
        header = ["GPU", "memory", "weights on", pools, "models on"]
        pages.append(_table([header, *(_gpu_row(load) for load in _loads(survey))]))
    else:
        pages.append("GPUs are not known, so nothing was held against their memory: name them with --gpus 8x80GB")
    if survey.absent:
        pages.append("not on this machine, so their weights were not counted: " + ", ".join(survey.absent))
    return "\n\n".join(pages)


def _model_row(model: dict[str, Any]) -> list[str]:
    seats = [("+" if seat["on"] else "") + ",".join(map(str, seat["gpu_ids"])) for seat in model["placements"]]
    limits = {_size(seat["kv_limit_bytes"], "free") for seat in model["placements"]}
    context = UNKNOWN if model["context_length"] is None else str(model["context_length"])
    return [
        model["name"],
        model["architecture"] or UNKNOWN,
        str(model["tp_size"]),
        _size(model["weight_bytes"]),
        _size(model["kv_bytes_per_token"]),
        context,
        " ".join(seats) or "any",
        ", ".join(sorted(limits)) or "free",
    ]


def _gpu_row(load: dict[str, Any]) -> list[str]:
    sizes = [_size(load[key], "free") for key in ("capacity_bytes", "weight_bytes", "kv_limit_bytes")]
    return [str(load["gpu_id"]), *sizes, ", ".join(load["models"]) or "-"]


def _size(nbytes: int | None, unknown: str = UNKNOWN) -> str:
    return unknown if nbytes is None else format_bytes(nbytes)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
