"""The placement file as the operator writes it: Prism's list of models, with more keys. These types are the schema.

Knows spelling and bounds of each key; what keys mean together is `rules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from chimera.config.conform import conform
from chimera.config.document import read_document
from chimera.config.faults import Faults

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^\S+$")]
# A path's bound is the kernel's.
PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
GpuId = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=86_400_000)]
Dtype = Literal["auto", "float16", "half", "bfloat16", "float32", "float"]
Policy = Literal["flexible", "static", "time-sharing", "space-sharing", "simple-global", "kvpr"]
Local = Literal["fcfs", "slack", "moore-hodgson", "goodput", "by-policy"]


class SloEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latencies promised to the model's users."""

    ttft_ms: Annotated[Milliseconds | None, msgspec.Meta(description="Time to first token.")] = None
    tpot_ms: Annotated[Milliseconds | None, msgspec.Meta(description="Time per output token after the first.")] = None
    late: Annotated[
        Literal["best-effort", "reject"],
        msgspec.Meta(description="A request that cannot be in time: served when no other can be, or turned away at once."),
    ] = "best-effort"


class WarmEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models that nobody asks for are kept, whoever decides."""

    order: Annotated[Literal["lru", "lfu"], msgspec.Meta(description="Who leaves first: longest idle, or least asked for.")] = (
        "lru"
    )
    max_models: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None, msgspec.Meta(description="So many may be warm at once.")
    ] = None
    max_memory: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=1_000_000)] | None,
        msgspec.Meta(description="Gigabytes (10^9 bytes) that weights and engines of all of them may hold on all GPUs."),
    ] = None


class PlacementEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replica: where it stands, or may be asked to stand."""

    gpu_ids: Annotated[tuple[GpuId, ...], msgspec.Meta(description="One GPU per tensor-parallel rank.")]
    on: Annotated[bool, msgspec.Meta(description="Whether it is started with the server.")] = True
    max_memory_pool_size: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=1_000_000)] | None,
        msgspec.Meta(description="KV gigabytes (10^9 bytes) per GPU: reserved when static, a ceiling when elastic."),
    ] = None


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model that the server knows, running or not."""

    model_name: Annotated[Name, msgspec.Meta(description="What requests call it.")]
    model_path: Annotated[
        PathText, msgspec.Meta(description="A folder, relative to this file or the working directory; or a hub id.")
    ]
    tokenizer_path: Annotated[PathText | None, msgspec.Meta(description="As model_path, which is the default.")] = None
    tp_size: Annotated[Annotated[int, msgspec.Meta(ge=1, le=1024)], msgspec.Meta(description="GPUs that share each layer.")] = 1
    init_placements: Annotated[
        tuple[PlacementEntry, ...], msgspec.Meta(description="Without any, the policy chooses when requests come.")
    ] = ()
    aliases: Annotated[tuple[Name, ...], msgspec.Meta(description="Other names that requests may use.")] = ()
    slo: SloEntry = SloEntry()
    priority: Annotated[
        Annotated[int, msgspec.Meta(ge=-1000, le=1000)], msgspec.Meta(description="Higher goes first when not all can.")
    ] = 0
    pin: Annotated[bool, msgspec.Meta(description="Never leaves once it runs.")] = False
    keep_alive: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=32)] | float | None,
        msgspec.Meta(description="Idle time before it may leave: seconds, or 5m; 0 at once, -1 never; null: the policy's."),
    ] = None
    preload: Annotated[bool, msgspec.Meta(description="Started with the server, wherever the policy puts it.")] = False
    engine: Annotated[Literal["sglang", "simulated"], msgspec.Meta(description="What runs it.")] = "sglang"
    engine_args: Annotated[dict[str, Any], msgspec.Meta(description="SGLang's own options, by their names in ServerArgs.")] = {}
    tool_call_parser: Annotated[
        Name | None, msgspec.Meta(description="How it writes calls of tools, in SGLang's words; auto: its template tells.")
    ] = None
    reasoning_parser: Annotated[
        Name | None, msgspec.Meta(description="How it sets its thoughts apart, likewise; null: they are part of the text.")
    ] = None
    dtype: Annotated[Dtype, msgspec.Meta(description="Type of weights and activations.")] = "auto"
    quantization: Annotated[
        Name | None, msgspec.Meta(description="As the checkpoint is stored; or fp8, which is also made at load.")
    ] = None
    context_length: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None, msgspec.Meta(description="At most the model's own.")
    ] = None
    drain_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=86_400)],
        msgspec.Meta(description="How long running requests may go on when it is asked to leave."),
    ] = 30.0


class PlacementFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A placement file with settings beside its models."""

    models: tuple[ModelEntry, ...]
    policy: Annotated[Policy | None, msgspec.Meta(description="Who decides what runs where; a flag goes first.")] = None
    local: Annotated[
        Local | None, msgspec.Meta(description="In which order requests go; by default ours; a flag goes first.")
    ] = None
    warm: WarmEntry = WarmEntry()
    gpus: Annotated[
        Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] | None,
        msgspec.Meta(description="Virtual GPUs for a machine without any: 8x2GiB."),
    ] = None
    schema: Annotated[str | None, msgspec.Meta(description="For editors.")] = msgspec.field(default=None, name="$schema")


def read_placement_file(path: Path, environment: Mapping[str, str], faults: Faults) -> tuple[PlacementFile, str]:
    """The file, and the place in it where its models are listed: the document itself, or its `models`."""
    document = read_document(path, environment, faults)
    if isinstance(document, dict):
        return conform(document, PlacementFile, "", faults), "models"
    if not isinstance(document, list):
        faults.add("", 'expected a list of models, or an object with "models"')
        document = []
    return PlacementFile(models=conform(document, tuple[ModelEntry, ...], "", faults)), ""


def json_schema() -> dict[str, Any]:
    """What editors check a placement file with; both spellings of the top level."""
    schema = msgspec.json.schema(tuple[ModelEntry, ...] | PlacementFile)
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "chimera placement file"}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dialect | schema))
    return plain
