"""A cluster's worth of tenants, made of what ServeGen's clients really did: how many requests, how bursty, how long.

Each tenant is a client of `servegen_activity` from a moment drawn by chance, with the counts of its ten-minute windows; all
counts are thinned alike until the whole comes to the rate that is wanted, and a thinned stream is that much less bursty. What
its requests are like comes from one tenant of `servegen_18tenants_day`, whose prompts and answers are drawn in pairs. The
models are mixed as in Prism's 58: many small, few large, the largest over four GPUs. Random only by the seed; rows are told
one by one, so an hour of a thousand a second needs no more than its arrays.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from chimera.core.model import ModelSpec
from chimera.sched.cost import CostTable
from chimera.sim.placing import promises
from chimera.trace.reader import read_trace
from chimera.trace.trace import Row, Trace

WINDOW_S = 600
WINDOWS_A_DAY = 144
POOL = 500
"""So many pairs of lengths stand for what a tenant's requests are like."""
TOLD_AT_ONCE = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    share: int
    """Of Prism's 58 models."""
    name: str
    weight_bytes: int
    """Per rank, as `kv_bytes_per_token`."""
    kv_bytes_per_token: int
    tp_size: int = 1


MIX = (
    Size(share=22, name="1b", weight_bytes=2_472_000_000, kv_bytes_per_token=32_768),
    Size(share=21, name="3b", weight_bytes=6_426_000_000, kv_bytes_per_token=114_688),
    Size(share=8, name="8b", weight_bytes=16_060_000_000, kv_bytes_per_token=131_072),
    Size(share=3, name="14b", weight_bytes=29_540_000_000, kv_bytes_per_token=163_840),
    Size(share=2, name="32b", weight_bytes=32_760_000_000, kv_bytes_per_token=131_072, tp_size=2),
    Size(share=2, name="70b", weight_bytes=35_280_000_000, kv_bytes_per_token=81_920, tp_size=4),
)
CONTEXT = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenants:
    models: tuple[ModelSpec, ...]
    at_s: numpy.ndarray
    """When, of each request in order; who, and how long, in the others."""
    whose: numpy.ndarray
    prompts: numpy.ndarray
    answers: numpy.ndarray

    def __len__(self) -> int:
        return len(self.at_s)

    def rows(self) -> Iterator[Row]:
        names = [model.name for model in self.models]
        for begin in range(0, len(self), TOLD_AT_ONCE):
            part = slice(begin, begin + TOLD_AT_ONCE)
            columns = (column[part].tolist() for column in (self.at_s, self.whose, self.prompts, self.answers))
            for at_s, tenant, prompt, answer in zip(*columns, strict=True):
                yield Row(at_s, names[tenant], prompt, answer)


def tenants(
    traces: Path, *, models: int, rate: float, seconds: float, costs: CostTable, slo_scale: float, seed: int
) -> Tenants:
    """So many, asking `rate` times a second together, for so long."""
    dice = numpy.random.default_rng(seed)
    clients = _clients(traces / "servegen_activity_days0-6.csv.gz")
    likes = _lengths(traces / "servegen_18tenants_day.csv.gz", dice)
    windows = math.ceil(seconds / WINDOW_S)
    chosen = [clients[number] for number in dice.integers(len(clients), size=models)]
    begins = [int(dice.integers(len(counts))) for counts, _ in chosen]
    looks = [numpy.arange(begin, begin + windows) % len(counts) for begin, (counts, _) in zip(begins, chosen, strict=True)]
    counts = numpy.array([client[0][look] for client, look in zip(chosen, looks, strict=True)])
    cvs = numpy.array([client[1][look] for client, look in zip(chosen, looks, strict=True)])
    kept = rate * windows * WINDOW_S / counts.sum()
    like = dice.integers(len(likes), size=models)
    at_s, whose = _arrivals(counts * kept, numpy.sqrt(kept * cvs**2 + 1 - kept), dice)
    order = numpy.argsort(at_s, kind="stable")
    order = order[: int(numpy.searchsorted(at_s[order], seconds))]
    at_s, whose = at_s[order], whose[order]
    pools = numpy.array(likes)[like]
    drawn = pools[whose, dice.integers(POOL, size=len(whose))]
    specs = _models(models, dice)
    promised = [
        promises((spec,), _sample(spec.name, pool), costs, slo_scale)[0] for spec, pool in zip(specs, pools, strict=True)
    ]
    return Tenants(models=tuple(promised), at_s=at_s, whose=whose, prompts=drawn[:, 0], answers=drawn[:, 1])


def _clients(path: Path) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Of each client, its requests in each window of its days, and how its gaps varied there."""
    days: dict[str, int] = {}
    told: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            family, window = row["source_family"], int(row["window_start_s"]) // WINDOW_S
            days[family] = max(days.get(family, 0), window // WINDOWS_A_DAY + 1)
            asked = (window, float(row["requests"]), float(row["iat_cv"]))
            told.setdefault((family, row["source_client"]), []).append(asked)
    clients = []
    for (family, _), asked_in in sorted(told.items()):
        counts, cvs = numpy.zeros(days[family] * WINDOWS_A_DAY), numpy.ones(days[family] * WINDOWS_A_DAY)
        for window, requests, cv in asked_in:
            counts[window], cvs[window] = requests, cv
        clients.append((counts, cvs))
    return clients


def _lengths(path: Path, dice: numpy.random.Generator) -> list[numpy.ndarray]:
    """For each tenant of a day, a pool of its pairs of prompt and answer."""
    pairs: dict[str, list[tuple[int, int]]] = {}
    for row in read_trace(path).rows:
        pairs.setdefault(row.model, []).append((row.prompt_tokens, row.output_tokens))
    return [numpy.array(of)[dice.integers(len(of), size=POOL)] for _, of in sorted(pairs.items())]


def _arrivals(counts: numpy.ndarray, cvs: numpy.ndarray, dice: numpy.random.Generator) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Moments, and whose they are: gamma gaps in each window, scaled so that the window holds its count."""
    at_s, whose = [numpy.empty(0)], [numpy.empty(0, dtype=int)]
    wholes = numpy.floor(counts + dice.random(counts.shape)).astype(int)
    for (tenant, window), count in numpy.ndenumerate(wholes):
        if count:
            moments = dice.gamma(1 / cvs[tenant, window] ** 2, size=count + 1).cumsum()
            at_s.append((window + moments[:-1] / moments[-1]) * WINDOW_S)
            whose.append(numpy.full(count, tenant))
    return numpy.concatenate(at_s), numpy.concatenate(whose)


def _models(count: int, dice: numpy.random.Generator) -> list[ModelSpec]:
    """The mix, as exactly as the number allows, dealt out by chance."""
    shares = numpy.cumsum([size.share for size in MIX])
    ranks = dice.permutation(count)
    sizes = [MIX[int(numpy.searchsorted(shares, (rank + 0.5) * shares[-1] / count))] for rank in ranks]
    return [
        ModelSpec(
            name=f"m{number:04d}-{size.name}",
            path="",
            tokenizer_path="",
            architecture="paper",
            weight_bytes=size.weight_bytes,
            kv_bytes_per_token=size.kv_bytes_per_token,
            context_length=CONTEXT,
            tp_size=size.tp_size,
            engine="simulated",
        )
        for number, size in enumerate(sizes)
    ]


def _sample(name: str, pool: numpy.ndarray) -> Trace:
    return Trace("lengths", tuple(Row(0.0, name, prompt, answer) for prompt, answer in pool.tolist()))
