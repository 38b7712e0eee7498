"""What a simulation starts from when nobody wrote it: GPUs, a first placement, and promises worth keeping.

The first placement is what an operator without knowledge of the load would write. Promises follow the field's custom: the
latency on a dedicated GPU, times a scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapreplace

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.metrics import percentile
from chimera.core.model import ModelSpec, Slo
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable
from chimera.trace.trace import Trace

DEDICATED_BATCH = 4
"""Sequences decoded together on a dedicated GPU under light load."""


def gpus_of(count: int, capacity_bytes: int, *, per_node: int = 8) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(gpu_id=number, node=f"node-{number // per_node:03d}", capacity_bytes=capacity_bytes, name="paper", virtual=True)
        for number in range(count)
    )


def evenly(models: Iterable[ModelSpec], gpus: Sequence[Gpu], costs: CostTable, *, reserved: bool) -> Placement:
    """Each model once, the largest first, on the GPUs with the most room; `reserved` shares the rest out in equal parts.

    A model that finds no room has no seat.
    """
    free = {gpu.gpu_id: gpu.capacity_bytes for gpu in gpus}
    places: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    seats: list[Seat] = []
    for model in sorted(models, key=lambda m: (-m.weight_bytes * m.tp_size, m.name)):
        if model.tp_size not in places:
            places[model.tp_size] = sorted((-_room(gang, free), gang) for gang in gangs(gpus, model.tp_size))
        chosen = _roomiest(places[model.tp_size], free)
        needed = costs.resident_bytes(model) + costs.stripe_bytes
        if not chosen or any(free[gpu_id] < needed for gpu_id in chosen):
            continue
        for gpu_id in chosen:
            free[gpu_id] -= costs.resident_bytes(model)
        seats.append(Seat(replica=ReplicaId(model.name), gpu_ids=chosen))
    return reserve(seats, free) if reserved else Placement(tuple(seats))


def _room(gang: tuple[int, ...], free: Mapping[int, int]) -> int:
    return min([free[gpu_id] for gpu_id in gang])


def _roomiest(places: list[tuple[int, tuple[int, ...]]], free: Mapping[int, int]) -> tuple[int, ...]:
    """Of a heap by room, as it was when last looked at: what is on top and has as much as then has the most of all."""
    while places:
        known, gang = places[0]
        room = -_room(gang, free)
        if room == known:
            return gang
        heapreplace(places, (room, gang))
    return ()


def gangs(gpus: Sequence[Gpu], size: int) -> list[tuple[int, ...]]:
    """So many GPUs of one node; a single one may be any, gangs are aligned neighbours."""
    by_node: dict[str, list[int]] = {}
    for gpu in gpus:
        by_node.setdefault(gpu.node, []).append(gpu.gpu_id)
    return [tuple(ids[at : at + size]) for ids in by_node.values() for at in range(0, len(ids) - size + 1, size)]


def reserve(seats: Sequence[Seat], free: Mapping[int, int]) -> Placement:
    """What is free of each GPU, in equal parts, as the caches of the seats on it."""
    shares = {gpu_id: sum(gpu_id in seat.gpu_ids for seat in seats) for gpu_id in free}
    parts = (min(free[g] // shares[g] for g in seat.gpu_ids) for seat in seats)
    return Placement(tuple(msgspec.structs.replace(seat, kv_limit_bytes=part) for seat, part in zip(seats, parts, strict=True)))


def require_fitting(models: Sequence[ModelSpec], gpus: Sequence[Gpu], costs: CostTable) -> None:
    """ConfigError for a model that no GPU could hold alone, for no GPUs, and for promises that nobody can keep."""
    if not gpus:
        raise ConfigError.single("gpus", "there are none")
    sizes = Counter(gpu.capacity_bytes for gpu in gpus)
    for model in models:
        needed = costs.resident_bytes(model) + costs.stripe_bytes
        big_enough = sum(count for size, count in sizes.items() if size >= needed)
        if big_enough < model.tp_size:
            raise ConfigError.single("models", f"{model.name} fits on none of the {len(gpus)} GPUs, even alone")
        for name, seconds in (("ttft", model.slo.ttft_s), ("tpot", model.slo.tpot_s)):
            if seconds is not None and seconds <= 0:
                raise ConfigError.single("models", f"the {name} SLO of {model.name} is {seconds:g} s; it has to be above zero")


def promises(models: Sequence[ModelSpec], trace: Trace, costs: CostTable, scale: float) -> tuple[ModelSpec, ...]:
    """Every model with an SLO: its own, or what it takes on a dedicated GPU with this trace's lengths; times the scale."""
    if scale <= 0:
        raise ConfigError.single("slo-scale", f"it is {scale:g}; it has to be above zero")
    prompts: dict[str, list[int]] = {}
    answers: dict[str, list[int]] = {}
    for row in trace.rows:
        prompts.setdefault(row.model, []).append(row.prompt_tokens)
        answers.setdefault(row.model, []).append(row.output_tokens)
    return tuple(_promising(m, prompts.get(m.name, [512]), answers.get(m.name, [128]), costs, scale) for m in models)


def _promising(model: ModelSpec, prompts: list[int], answers: list[int], costs: CostTable, scale: float) -> ModelSpec:
    cost = costs.of(model)
    context = sum(prompts) / len(prompts) + sum(answers) / len(answers) / 2
    long_prompt = int(percentile(sorted(prompts), 95))
    ttft_s = model.slo.ttft_s or costs.request_s + cost.prompt_s(long_prompt)
    tpot_s = model.slo.tpot_s or cost.decode_s(DEDICATED_BATCH, round(DEDICATED_BATCH * context))
    slo = Slo(ttft_s=ttft_s * scale, tpot_s=tpot_s * scale, reject_late=model.slo.reject_late)
    return msgspec.structs.replace(model, slo=slo)
