"""Over how many GPUs each model is split, and a placement that knows the load: what a simulation of the plan starts from.

A GPU has two things to give, memory and time, and a model takes a share of each. Models are laid out by the larger of their
shares, the largest first, each where the larger of the GPU's shares stays least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.metrics import percentile
from chimera.core.model import ModelSpec, Slo
from chimera.core.placement import Placement, Seat
from chimera.core.replica import ReplicaId
from chimera.errors import ConfigError
from chimera.sched.cost import CostTable
from chimera.sim.placing import DEDICATED_BATCH, gangs, promises, reserve
from chimera.trace.trace import Row, Trace

FULL = 0.6
"""A replica is given so much of a GPU's time; more is another replica's."""

SPARE = 0.2
"""A model gets another replica where this part of a GPU is left to caches; its first needs no more than to fit."""
CUSTOM = 5.0
"""A model without a promise gets so many times what it takes alone, as is the custom of the field."""

Splits = tuple[ModelSpec, ...]
"""One model over more and more GPUs."""


def chosen(found: Sequence[Splits], trace: Trace, costs: CostTable, slo_scale: float) -> tuple[ModelSpec, ...]:
    """Each model over the fewest GPUs that will do, with its promises."""
    rows: dict[str, list[Row]] = {}
    for row in trace.rows:
        rows.setdefault(row.model, []).append(row)
    models = [_narrowest(splits, rows.get(splits[0].name, []), costs, slo_scale) for splits in found]
    alone = promises(models, trace, costs, slo_scale)
    return tuple(_promising(model, promised.slo) for model, promised in zip(models, alone, strict=True))


def _promising(model: ModelSpec, slo: Slo) -> ModelSpec:
    """Nobody promises what a model takes alone: any two requests at once would break it."""
    ttft_s = slo.ttft_s if model.slo.ttft_s is not None or slo.ttft_s is None else CUSTOM * slo.ttft_s
    tpot_s = slo.tpot_s if model.slo.tpot_s is not None or slo.tpot_s is None else CUSTOM * slo.tpot_s
    return msgspec.structs.replace(model, slo=msgspec.structs.replace(slo, ttft_s=ttft_s, tpot_s=tpot_s))


def _narrowest(splits: Splits, rows: Sequence[Row], costs: CostTable, slo_scale: float) -> ModelSpec:
    """The fewest GPUs on which the model has room for its longest request, and alone keeps the promises of its own. Where no
    split keeps them, the fewest that have the room: the plan will say what breaks."""
    fitting = [model for model in splits if _fits(model, rows, costs)]
    if not fitting:
        raise ConfigError.single(
            "models",
            f"{splits[0].name} fits on no GPU of {costs.gpu_bytes / 1e9:.0f} GB, even over {splits[-1].tp_size} of them",
        )
    return next((model for model in fitting if _keeps_alone(model, rows, costs, slo_scale)), fitting[0])


def _fits(model: ModelSpec, rows: Sequence[Row], costs: CostTable) -> bool:
    longest = max((min(row.prompt_tokens + row.output_tokens, model.context_length) for row in rows), default=1)
    return costs.resident_bytes(model) + max(model.kv_bytes(longest), costs.stripe_bytes) <= costs.gpu_bytes


def _keeps_alone(model: ModelSpec, rows: Sequence[Row], costs: CostTable, slo_scale: float) -> bool:
    if not rows:
        return True
    cost = costs.of(model)
    prompt = int(percentile(sorted(row.prompt_tokens for row in rows), 95))
    context = sum(row.prompt_tokens + row.output_tokens / 2 for row in rows) / len(rows)
    ttft_s = costs.request_s + cost.prompt_s(prompt)
    tpot_s = cost.decode_s(DEDICATED_BATCH, round(DEDICATED_BATCH * context))
    slo = model.slo
    return not (
        (slo.ttft_s is not None and ttft_s > slo.ttft_s * slo_scale)
        or (slo.tpot_s is not None and tpot_s > slo.tpot_s * slo_scale)
    )


def work_of(models: Sequence[ModelSpec], trace: Trace, costs: CostTable, batch: float) -> dict[str, float]:
    """GPU-seconds on each GPU of a replica for all that the trace asks of each model, decoding so many at once."""
    price = {model.name: costs.of(model) for model in models}
    work = dict.fromkeys(price, 0.0)
    for row in trace.rows:
        work[row.model] += price[row.model].request_s(row.prompt_tokens, row.output_tokens, batch)
    return work


def lay_out(
    models: Sequence[ModelSpec],
    work: Mapping[str, float],
    span_s: float,
    gpus: Sequence[Gpu],
    costs: CostTable,
    *,
    reserved: bool,
    most_replicas: int = 1024,
) -> Placement:
    """`work` is in GPU-seconds over the span; a model that finds no room has no seat. `reserved` shares the rest out."""
    busy = {model.name: work[model.name] / max(span_s, 1.0) for model in models}
    replicas = {model.name: min(most_replicas, max(1, math.ceil(busy[model.name] / FULL))) for model in models}
    paper = _Paper(gpus, costs)
    for model in sorted(models, key=lambda m: (-paper.share(m, busy[m.name] / replicas[m.name]), m.name)):
        paper.seat(model, busy[model.name] / replicas[model.name])
    for model in models:
        for _ in range(1, replicas[model.name]):
            paper.seat(model, busy[model.name] / replicas[model.name], spare=SPARE)
    return reserve(paper.seats, paper.free) if reserved else Placement(tuple(paper.seats))


class _Paper:
    """GPUs while models are laid out on them."""

    def __init__(self, gpus: Sequence[Gpu], costs: CostTable) -> None:
        self.seats: list[Seat] = []
        self.free = {gpu.gpu_id: gpu.capacity_bytes for gpu in gpus}
        self._gpus = gpus
        self._capacity = max(gpu.capacity_bytes for gpu in gpus)
        self._busy = dict.fromkeys(self.free, 0.0)
        self._costs = costs

    def share(self, model: ModelSpec, busy: float) -> float:
        return model.tp_size * max(self._costs.resident_bytes(model) / self._capacity, busy)

    def seat(self, model: ModelSpec, busy: float, *, spare: float = 0.0) -> None:
        """One more replica, if that leaves a stripe and this part of a GPU to caches."""
        needed = self._costs.resident_bytes(model)
        least = needed + max(self._costs.stripe_bytes, spare * self._capacity)
        index = sum(seat.replica.model == model.name for seat in self.seats)
        taken = {gpu_id for seat in self.seats if seat.replica.model == model.name for gpu_id in seat.gpu_ids}
        open_gangs = [
            gang
            for gang in gangs(self._gpus, model.tp_size)
            if not taken & set(gang) and all(self.free[g] >= least for g in gang)
        ]
        if not open_gangs:
            return
        chosen = min(open_gangs, key=lambda gang: (max(self._filled(g, needed, busy) for g in gang), gang))
        for gpu_id in chosen:
            self.free[gpu_id] -= needed
            self._busy[gpu_id] += busy
        self.seats.append(Seat(replica=ReplicaId(model.name, index), gpu_ids=chosen))

    def _filled(self, gpu_id: int, more_bytes: int, more_busy: float) -> tuple[float, float]:
        """The larger share, and the other, which decides between equals."""
        held = (self._capacity - self.free[gpu_id] + more_bytes) / self._capacity
        busy = self._busy[gpu_id] + more_busy
        return max(held, busy), min(held, busy)
