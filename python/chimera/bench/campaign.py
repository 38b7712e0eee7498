"""Several runs for one question: one after the other on the same requests, or at one rate after the other.

What is asked is the same for everybody who is compared: prompts are written once, records begin anew each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from chimera.bench import paired
from chimera.bench.dialect import Dialect
from chimera.bench.load import Job, Run, Terms
from chimera.bench.outcome import Outcome, document, lists, outcome
from chimera.bench.record import Journal, Record, read_records, write_records
from chimera.bench.session import Known, Load, choose_policy, jobs_of, measured, prompts_of
from chimera.bench.stream import Target
from chimera.bench.watch import fetch
from chimera.core.metrics import percentile
from chimera.errors import ChimeraError

STEP = 1.05
"""A highest rate is known to 5 %."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of those that are compared."""

    name: str
    target: Target
    policy: str | None = None
    """Chosen before its run; `None` leaves the server as it is."""
    elsewhere: Mapping[str, Target] = field(default_factory=dict)
    """Models that other servers have: a fleet of one server per model is one arm."""

    def target_of(self, model: str) -> Target:
        return self.elsewhere.get(model, self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    target: Target
    known: Mapping[str, Known]
    load: Load
    facts: Mapping[str, Any]
    dialect: Dialect
    out: Path
    gpu_price: float | None = None
    details: bool = False
    say: Callable[[str], None] = lambda line: None

    async def run(self, arm: Arm, prompts: Sequence[str] | None = None) -> Outcome:
        return (await self.run_with_records(arm, prompts))[0]

    async def run_with_records(self, arm: Arm, prompts: Sequence[str] | None = None) -> tuple[Outcome, list[Record]]:
        """Its result is written before it is judged."""
        if arm.policy is not None:
            await choose_policy(arm.target, arm.policy)
        if prompts is None:
            prompts = prompts_of(self.load, self.known)
        jobs = jobs_of(self.load, prompts, self.dialect, arm.target_of)
        path = self.out / f"{arm.name}.jsonl"
        with Journal(path) as journal:
            load = replace(self.load, terms=replace(self.load.terms, keep=journal.note))
            found = await measured(load, jobs, self.dialect)
        write_records(path, (record for record in found.records if record.sent_s is not None))
        facts = {**self.facts, "policy": arm.policy} if arm.policy else self.facts
        told = outcome(arm.name, found.records, found.ending, found.sighting, facts, self.gpu_price)
        whole = document(told) | (lists(found.records) if self.details else {})
        (self.out / f"{arm.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")
        m = told.metrics
        self.say(
            f"{arm.name}: {m.answered} of {m.sent} answered, TTFT {m.ttft_attainment:.1%}, TPOT {m.tpot_attainment:.1%}, "
            f"joint {m.joint_attainment:.1%}" + (f"; PARTIAL: {told.ending.partial}" if told.ending.partial else "")
        )
        return told, found.records


# Compared.


async def compare(campaign: Campaign, arms: Sequence[Arm], rounds: int) -> list[tuple[Outcome, list[Record]]]:
    """In turn, there and back: what the machine does besides, and what a server still knows, hits each as much."""
    prompts = prompts_of(campaign.load, campaign.known)
    runs = []
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            name = arm.name if rounds == 1 else f"{arm.name}-{number + 1}"
            runs.append(await campaign.run_with_records(replace(arm, name=name), prompts))
    return runs


def comparison(runs: Sequence[tuple[Outcome, list[Record]]]) -> str:
    """Every run, and what the first was better by than each other one; 95 % intervals."""
    lines = [f"{'RUN':<18} {'TTFT %':>21} {'TPOT %':>21} {'JOINT %':>21} {'GOODPUT/S':>10} {'TTFT P50':>10} {'TTFT P99':>10}"]
    for found, records in runs:
        shares = [_percent(paired.attainment(records, measure)) for measure in paired.MEASURES.values()]
        m = found.metrics
        times = [f"{1000 * (value or 0):.0f} ms" for value in (m.ttft.p50_s, m.ttft.p99_s)]
        lines.append(
            f"{found.name:<18} "
            + " ".join(f"{s:>21}" for s in shares)
            + f" {m.goodput_per_s:>10.2f} {times[0]:>10} {times[1]:>10}"
        )
    _, first = runs[0]
    for found, records in runs[1:]:
        gaps = [_percent(paired.difference(records, first, measure)) for measure in paired.MEASURES.values()]
        label = f"{found.name} − {runs[0][0].name}"
        lines.append(f"{label[:18]:<18} " + " ".join(f"{gap:>21}" for gap in gaps))
    return "\n".join(lines)


def _percent(interval: paired.Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


# Swept.


class Made(Protocol):
    """A load at one rate."""

    @property
    def load(self) -> Load: ...


class Point(msgspec.Struct, frozen=True, kw_only=True):
    scale: float
    rate: float
    """Requests per second that were sent."""
    attainments: tuple[float, float, float]
    """TTFT, TPOT, joint."""
    kept: bool


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    points: tuple[Point, ...]

    @property
    def highest(self) -> Point | None:
        """The highest rate that was kept below the lowest that was not."""
        lost = min((point.scale for point in self.points if not point.kept), default=float("inf"))
        return max((p for p in self.points if p.kept and p.scale < lost), key=lambda p: p.scale, default=None)


async def sweep(
    campaign: Campaign,
    *,
    remade: Callable[[float], Made],
    share: float,
    promise: str,
    scales: Sequence[float] | None,
    most: float,
) -> Sweep:
    points: list[Point] = []

    async def kept(scale: float) -> bool:
        known = next((point for point in points if point.scale == scale), None)
        if known is not None:
            return known.kept
        at = replace(campaign, load=remade(scale).load, facts={**campaign.facts, "rate_scale": scale})
        found = await at.run(Arm(f"rate-{scale:.3f}", campaign.target))
        m = found.metrics
        attained = (m.ttft_attainment, m.tpot_attainment, m.joint_attainment)
        good = found.valid and not found.ending.partial and attained[("ttft", "tpot", "joint").index(promise)] >= share
        points.append(Point(scale=scale, rate=m.sent / max(m.span_s, 1e-9), attainments=attained, kept=good))
        return good

    if scales is not None:
        for scale in scales:
            await kept(scale)
    else:
        await _search(kept, most)
    return Sweep(points=tuple(sorted(points, key=lambda point: point.scale)))


async def _search(kept: Callable[[float], Any], most: float) -> None:
    """Doubling until it breaks, or halving until it holds; then between the two."""
    low = high = 1.0
    if await kept(1.0):
        while high < most:
            low, high = high, min(most, high * 2)
            if not await kept(high):
                break
        else:
            return
    else:
        while low > 1 / most:
            low, high = low / 2, low
            if await kept(low):
                break
        else:
            return
    while high / low > STEP:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if await kept(middle) else (low, middle)


# Switched.


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    load_s: float
    """From the order until it serves."""
    cold_ttft_s: float
    """The first token of a request that finds its model down."""
    warm_ttft_s: float
    """The same when it is up."""


async def switches(target: Target, dialect: Dialect, names: Sequence[str], rounds: int) -> list[Switched]:
    found = []
    for _ in range(rounds):
        for name in names:
            await _order(target, "/models/unload", name)
            began = time.perf_counter()
            await _order(target, "/models/load", name)
            load_s = time.perf_counter() - began
            warm = await _one(target, dialect, name)
            await _order(target, "/models/unload", name)
            cold = await _one(target, dialect, name)
            found.append(Switched(model=name, load_s=load_s, cold_ttft_s=cold, warm_ttft_s=warm))
    return found


async def _order(target: Target, path: str, model: str) -> None:
    if await fetch(target, path, msgspec.json.encode({"model": model}), "POST") is None:
        raise ChimeraError(f"{target.url} refuses POST {path} of {model}")


async def _one(target: Target, dialect: Dialect, model: str) -> float:
    record = Record(request_id="one", model=model, planned_s=0.0, prompt_tokens=1, wanted_tokens=2)
    message = target.message(dialect.path, dialect.body(record, f"A short word at {time.perf_counter_ns()}"))
    await Run([Job(record, target, message)], dialect, Terms(connections=0, timeout_s=120)).open_loop()
    if record.first_token_s is None or record.sent_s is None:
        raise ChimeraError(f"{model} did not answer: {record.refusal} {record.error}")
    return record.first_token_s - record.sent_s


def switch_table(found: Sequence[Switched]) -> str:
    lines = [f"{'MODEL':<20} {'LOAD P50':>10} {'LOAD MAX':>10} {'COLD TTFT':>10} {'WARM TTFT':>10}"]
    for model in dict.fromkeys(switched.model for switched in found):
        ours = [switched for switched in found if switched.model == model]
        loads = sorted(s.load_s for s in ours)
        cold, warm = (percentile(sorted(getattr(s, key) for s in ours), 50) for key in ("cold_ttft_s", "warm_ttft_s"))
        cells = [f"{1000 * value:.0f} ms" for value in (percentile(loads, 50), loads[-1], cold, warm)]
        lines.append(f"{model:<20} " + " ".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


# Kept.


def results_in(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.glob("*.json") if p.with_suffix(".jsonl").exists())
        else:
            yield path


def records_beside(path: Path) -> list[Record]:
    records = path.with_suffix(".jsonl")
    return read_records(records) if records.exists() else []
