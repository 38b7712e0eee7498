"""From a placement file, or a list of models, to what a server starts with: models, GPUs and the first placement.

A survey reads and judges without changing anything; loading may also download. Starts nothing.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chimera.config.checkpoint import Checkpoint, download, locate, missing_tokenizer, read_checkpoint
from chimera.config.conform import conform
from chimera.config.faults import Faults, at_index
from chimera.config.placement_file import ModelEntry, PlacementFile, WarmEntry, read_placement_file
from chimera.config.roots import Roots
from chimera.config.rules import Rules, keep_alive_s, kv_dtype, pool_bytes
from chimera.config.virtual_gpus import default_virtual_gpus, parse_virtual_gpus
from chimera.core.gpu import Gpu
from chimera.core.model import ModelSpec, Slo, Tastes
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.errors import ConfigError
from chimera.units import format_bytes

logger = logging.getLogger(__name__)

ENTRY = "the entry"

MOST_LENT_GPUS = 64
# `chimera serve MODEL` leaves at least this part of a GPU for the cache.
_MOST_WEIGHTS = 0.8


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a server has to be told."""

    models: tuple[ModelSpec, ...]
    placement: Placement
    """The seats that are on."""
    gpus: tuple[Gpu, ...]
    filed_gpus: str | None = None
    """What the file says of them, whoever has settled it."""
    policy: str | None = None
    """The file's wish; a flag goes first. So with the order of requests."""
    local: str | None = None
    warm: WarmEntry = WarmEntry()


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """A placement file, read and judged."""

    source: str
    file: PlacementFile
    elastic: bool
    gpus: tuple[Gpu, ...]
    """Empty when nobody said which there are; then nothing was held against them."""
    checkpoints: dict[int, Checkpoint]
    """By the model's number in the file; a model that is not on this machine is not in here."""
    tokenizers: dict[int, Path]
    absent: dict[str, tuple[str, ...]]
    """Hub ids that are not on this machine, and the places that name them."""


def load_placement(
    path: str | Path,
    gpus: Sequence[Gpu] | None,
    elastic: bool = True,
    *,
    environment: Mapping[str, str] = os.environ,
    weights: bool = True,
) -> Deployment:
    """A placement file made ready, its models downloaded where that is needed. ConfigError lists every fault.

    `gpus=None` stands for a machine without any: the file's virtual ones, or as many as it names. Without `weights` it is ready
    for paper: what is downloaded is what says how large the models are.
    """
    return _deployment(_present(path, gpus, elastic, environment, lend=gpus is None, weights=weights))


def load_splits(
    path: str | Path, sizes: Sequence[int], *, environment: Mapping[str, str] = os.environ
) -> tuple[tuple[ModelSpec, ...], ...]:
    """Each model of a placement file over each of so many GPUs, as far as its heads divide; where the file wants it to stand
    is not looked at. Models are downloaded where that is needed, without their weights."""
    survey = _present(path, (), True, environment, lend=False, weights=False)
    return tuple(
        tuple(_over(survey, index, entry, size) for size in sizes if survey.checkpoints[index].shape.divides(size))
        for index, entry in enumerate(survey.file.models)
    )


def _over(survey: Survey, index: int, entry: ModelEntry, tp_size: int) -> ModelSpec:
    return _spec(msgspec.structs.replace(entry, tp_size=tp_size), survey.checkpoints[index], survey.tokenizers[index])


def _present(
    path: str | Path,
    gpus: Sequence[Gpu] | None,
    elastic: bool,
    environment: Mapping[str, str],
    *,
    lend: bool,
    weights: bool,
) -> Survey:
    """A survey of models that are all on this machine."""
    seen = functools.partial(survey_placement, path, gpus, elastic, environment=environment, lend=lend, weights=weights)
    survey = seen()
    return seen(fetched=_fetch(survey, weights)) if survey.absent else survey


def survey_placement(
    path: str | Path,
    gpus: Sequence[Gpu] | None,
    elastic: bool = True,
    *,
    environment: Mapping[str, str] = os.environ,
    lend: bool = False,
    fetched: Mapping[str, Path] | None = None,
    weights: bool = True,
) -> Survey:
    """Reads and judges; downloads and starts nothing. ConfigError lists every fault."""
    path = Path(path)
    faults = Faults(str(path))
    file, root = read_placement_file(path, environment, faults)
    gpus = _gpus(file, gpus, lend, faults)
    search = _Search([path.parent, Path()], fetched or {}, faults, weights)
    return _judged(str(path), file, root, gpus, search, elastic, faults)


def _judged(
    source: str, file: PlacementFile, root: str, gpus: tuple[Gpu, ...], search: _Search, elastic: bool, faults: Faults
) -> Survey:
    for index, entry in enumerate(file.models):
        search.find(index, entry, at_index(root, index))
    shapes = {index: checkpoint.shape for index, checkpoint in search.checkpoints.items()}
    Rules(file, root, gpus, shapes, faults).check(elastic=elastic)
    faults.require_none()
    return Survey(
        source=source,
        file=file,
        elastic=elastic,
        gpus=gpus,
        checkpoints=search.checkpoints,
        tokenizers=search.tokenizers,
        absent={hub_id: tuple(places) for hub_id, places in search.absent.items()},
    )


def deployment_of_entry(written: Any, gpus: Sequence[Gpu], *, roots: Roots, elastic: bool = True) -> Deployment:
    """One model that a request names, as a placement file would. Nothing is downloaded for it, and no path of it leads out
    of the roots. ConfigError lists every fault."""
    faults = Faults(ENTRY)
    [entry] = conform([written], tuple[ModelEntry, ...], "", faults)
    roots.hold(entry, at_index("", 0), faults)
    faults.require_none()
    search = _Search([roots.base], {}, faults)
    survey = _judged(ENTRY, PlacementFile(models=(entry,)), "", tuple(gpus), search, elastic, faults)
    for hub_id in survey.absent:
        raise ConfigError.single(ENTRY, f"{hub_id} is not on this machine, and nothing is downloaded for a request")
    return _deployment(survey)


def deployment_of_models(paths: Sequence[str], gpus: Sequence[Gpu] | None = None) -> Deployment:
    """`chimera serve MODEL…`: each on the emptiest GPUs, on as few as it needs; named after its folder."""
    gpus = default_virtual_gpus() if gpus is None else tuple(gpus)
    faults = Faults("models")
    free_bytes = {gpu.gpu_id: gpu.capacity_bytes for gpu in gpus}
    models: list[ModelSpec] = []
    seats: list[Seat] = []
    for written in paths:
        try:
            folder = locate(written, [Path()]) or download(written)
            checkpoint = read_checkpoint(folder)
            if missing := missing_tokenizer(folder):
                raise ConfigError.single("", missing)
        except ConfigError as error:
            faults.adopt(written, error)
            continue
        name = _distinct(os.path.basename(os.path.normpath(written)), {model.name for model in models})
        tp_size = next((size for size in _gang_sizes(checkpoint, len(gpus)) if _fits(checkpoint, size, free_bytes)), None)
        if tp_size is None:
            room = ", ".join(format_bytes(free) for free in free_bytes.values())
            faults.add(written, f"{format_bytes(checkpoint.shape.weight_bytes())} of weights do not fit: free are {room}")
            continue
        model = _spec(ModelEntry(model_name=name, model_path=written, tp_size=tp_size), checkpoint, folder)
        models.append(model)
        seat = Seat(replica=ReplicaId(name), gpu_ids=_emptiest(free_bytes, tp_size))
        seats.append(seat)
        for gpu_id in seat.gpu_ids:
            free_bytes[gpu_id] -= model.weight_bytes
    faults.require_none()
    return Deployment(models=tuple(models), placement=Placement(tuple(seats)), gpus=gpus)


def _gpus(file: PlacementFile, given: Sequence[Gpu] | None, lend: bool, faults: Faults) -> tuple[Gpu, ...]:
    if given is not None:
        return tuple(given)
    if file.gpus is not None:
        try:
            return parse_virtual_gpus(file.gpus)
        except ConfigError as error:
            faults.adopt("gpus", error)
            return ()
    if not lend:
        return ()
    named = max((gpu_id for entry in file.models for seat in entry.init_placements for gpu_id in seat.gpu_ids), default=0)
    return default_virtual_gpus(min(named + 1, MOST_LENT_GPUS))


class _Search:
    """Finds each model once, however many entries share it."""

    def __init__(self, roots: Sequence[Path], fetched: Mapping[str, Path], faults: Faults, weights: bool = True) -> None:
        self.checkpoints: dict[int, Checkpoint] = {}
        self.tokenizers: dict[int, Path] = {}
        self.absent: dict[str, list[str]] = {}
        self._roots = roots
        self._fetched = fetched
        self._faults = faults
        self._weights = weights
        self._folders: dict[tuple[str, bool], Path | ConfigError | None] = {}
        self._read: dict[Path, Checkpoint | ConfigError] = {}

    def find(self, index: int, entry: ModelEntry, where: str) -> None:
        folder = self._folder(entry.model_path, f"{where}.model_path", weights=self._weights)
        if folder is not None:
            checkpoint = self._checkpoint(folder)
            if isinstance(checkpoint, ConfigError):
                self._faults.adopt(f"{where}.model_path", checkpoint)
            else:
                self.checkpoints[index] = checkpoint
        at_tokenizer = f"{where}.model_path"
        if entry.tokenizer_path is not None:
            at_tokenizer = f"{where}.tokenizer_path"
            folder = self._folder(entry.tokenizer_path, at_tokenizer, weights=False)
        if folder is not None:
            self.tokenizers[index] = folder
            if missing := missing_tokenizer(folder):
                self._faults.add(at_tokenizer, f"{folder.name}: {missing}")

    def _folder(self, name: str, where: str, *, weights: bool) -> Path | None:
        if self._faults.spoil(where):
            return None
        key = name, weights
        if key not in self._folders:
            try:
                self._folders[key] = self._fetched.get(name) or locate(name, self._roots, weights=weights)
            except ConfigError as error:
                self._folders[key] = error
        found = self._folders[key]
        if isinstance(found, ConfigError):
            self._faults.adopt(where, found)
            return None
        if found is None:
            self.absent.setdefault(name, []).append(where)
        return found

    def _checkpoint(self, folder: Path) -> Checkpoint | ConfigError:
        if folder not in self._read:
            try:
                self._read[folder] = read_checkpoint(folder, weights=self._weights)
            except ConfigError as error:
                self._read[folder] = error
        return self._read[folder]


def _fetch(survey: Survey, weights: bool) -> dict[str, Path]:
    faults = Faults(survey.source)
    fetched = {}
    for hub_id, places in survey.absent.items():
        logger.info("download model=%s", hub_id)
        try:
            fetched[hub_id] = download(hub_id, weights=weights)
        except ConfigError as error:
            faults.adopt(places[0], error)
    faults.require_none()
    return fetched


def _deployment(survey: Survey) -> Deployment:
    models = tuple(
        _spec(entry, survey.checkpoints[index], survey.tokenizers[index]) for index, entry in enumerate(survey.file.models)
    )
    seats = tuple(
        Seat(replica=ReplicaId(entry.model_name, index), gpu_ids=placement.gpu_ids, kv_limit_bytes=pool_bytes(placement))
        for entry in survey.file.models
        for index, placement in enumerate(entry.init_placements)
        if placement.on
    )
    file = survey.file
    return Deployment(
        models=models,
        placement=Placement(seats),
        gpus=survey.gpus,
        filed_gpus=file.gpus,
        policy=file.policy,
        local=file.local,
        warm=file.warm,
    )


def _spec(entry: ModelEntry, checkpoint: Checkpoint, tokenizer: Path) -> ModelSpec:
    shape = checkpoint.shape
    keep = keep_alive_s(entry)
    never_leaves = keep is not None and keep < 0
    return ModelSpec(
        name=entry.model_name,
        path=os.path.abspath(checkpoint.folder),
        tokenizer_path=os.path.abspath(tokenizer),
        architecture=shape.architecture,
        weight_bytes=shape.weight_bytes(entry.tp_size, entry.dtype, entry.quantization),
        kv_bytes_per_token=shape.kv_bytes_per_token(entry.tp_size, kv_dtype(entry), entry.dtype),
        context_length=entry.context_length or shape.context_length,
        tp_size=entry.tp_size,
        dtype=entry.dtype,
        quantization=entry.quantization,
        aliases=entry.aliases,
        slo=Slo(
            ttft_s=_seconds(entry.slo.ttft_ms),
            tpot_s=_seconds(entry.slo.tpot_ms),
            reject_late=entry.slo.late == "reject",
        ),
        priority=entry.priority,
        pin=entry.pin or never_leaves,
        preload=entry.preload,
        keep_alive_s=None if never_leaves else keep,
        drain_s=entry.drain_s,
        tool_call_parser=entry.tool_call_parser,
        reasoning_parser=entry.reasoning_parser,
        tastes=Tastes() if entry.engine_args.get("sampling_defaults") == "openai" else checkpoint.tastes,
        embedding=not shape.generates or entry.engine_args.get("is_embedding") is True,
        engine=entry.engine,
        engine_args=entry.engine_args,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _distinct(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    return f"{name}-{number}"


def _gang_sizes(checkpoint: Checkpoint, gpus: int) -> list[int]:
    """Powers of two that the model's heads allow, smallest first."""
    sizes = (1 << power for power in range(gpus.bit_length()))
    return [size for size in sizes if checkpoint.shape.divides(size)]


def _emptiest(free_bytes: Mapping[int, int], count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(free_bytes, key=lambda gpu_id: (-free_bytes[gpu_id], gpu_id))[:count]))


def _fits(checkpoint: Checkpoint, tp_size: int, free_bytes: Mapping[int, int]) -> bool:
    weight_bytes = checkpoint.shape.weight_bytes(tp_size)
    return all(weight_bytes <= _MOST_WEIGHTS * free_bytes[gpu_id] for gpu_id in _emptiest(free_bytes, tp_size))
