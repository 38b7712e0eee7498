"""Makes what viewers see, a sight a second, and remembers the last minutes of memory for those who come later.

Reads snapshot, ledgers and counts, which others keep. Decides nothing, and is asked only while somebody watches; the past is
noted always, which costs next to nothing: who looks in at night wants to see how it came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from chimera.core.gpu import Gpu
from chimera.core.lease import LeaseClass
from chimera.core.ledger_view import GpuLedgerView
from chimera.core.measures import Measures
from chimera.core.model import ModelSpec
from chimera.core.record import Entry
from chimera.core.sight import (
    NOBODYS,
    WINDOW_S,
    Cast,
    Device,
    News,
    Part,
    Past,
    Pool,
    Pulse,
    Shelf,
    Sight,
    Standing,
    Stretch,
)
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.units import MIB

_RATE_OVER: Final = 5
"""Seconds: front-ends tell their counts once a second, not at the same moment."""
_MOST_NUMBERS: Final = 20_000
"""What a viewer who has just come is told of the past; more would be long on its way."""
_COARSEST: Final = 32
"""Seconds between two moments of the past, for a house so large and busy that it has most to tell."""
_ENGINES: Final = (LeaseClass.CONTEXT, LeaseClass.GRAPH, LeaseClass.WORKSPACE)
_OTHERS: Final = (LeaseClass.MARGIN, LeaseClass.STRANGERS)

Holdings = dict[str, list[int]]
"""By model: weights, KV, and the used part of that, in MiB."""


class _Moment:
    """One second of the past; by the names of models, whose places in the cast change."""

    __slots__ = ("at_s", "counts", "memory")

    def __init__(self, at_s: float, memory: dict[int, tuple[Holdings, list[int]]], counts: dict[str, tuple[int, int, int]]):
        self.at_s = at_s
        self.memory = memory
        self.counts = counts
        """By model: tokens made, requests ended, requests that kept both promises; since the server began."""


class Lookout:
    """`wall_s` is what the snapshot's clock lacks to be the wall's."""

    def __init__(self, wall_s: float) -> None:
        self._wall_s = wall_s
        self._cast = Cast()
        self._known: tuple[tuple[ModelSpec, ...], tuple[Gpu, ...]] = ((), ())
        self._places: dict[str, int] = {}
        self._moments: deque[_Moment] = deque(maxlen=WINDOW_S)

    def note(self, snapshot: Snapshot, measures: Measures) -> None:
        """Once a second."""
        counts = {name: (0, m.sent, m.kept_both) for name, m in measures.models.items()}
        for name, steps in measures.tally.steps.items():
            _, sent, kept = counts.get(name, (0, 0, 0))
            counts[name] = (steps.tokens, sent, kept)
        self._moments.append(_Moment(snapshot.now_s + self._wall_s, _memory(snapshot), counts))

    def sight(self, snapshot: Snapshot, news: Iterable[tuple[int, Entry]], *, cast: int, fault: str = "") -> Sight:
        """The newest moment, for one who has the cast of that number."""
        now = self._recast(snapshot)
        memory = self._moments[-1].memory if self._moments else _memory(snapshot)
        return Sight(
            at_s=round(snapshot.now_s + self._wall_s, 3),
            policy=snapshot.policy,
            local=snapshot.local,
            cast=now.number,
            changed=now if now.number != cast else None,
            shelves=tuple(self._shelf(memory.get(gpu.gpu_id)) for gpu in now.gpus),
            replicas=tuple(self._standing(view, snapshot.now_s) for view in snapshot.replicas),
            pulses=tuple(self._pulses(snapshot)),
            news=tuple(News(number, entry) for number, entry in news),
            fault=fault,
        )

    def past(self, snapshot: Snapshot, news: Iterable[tuple[int, Entry]]) -> Past:
        cast = self._recast(snapshot)
        every = _COARSEST
        while True:  # from coarse to fine, because nobody here waits for what would be thrown away
            moments = list(self._moments)[::-every][::-1]
            gpus = tuple(tuple(self._stretches(gpu.gpu_id, moments)) for gpu in cast.gpus)
            if every == 1 or 2 * sum(len(stretch.runs) for stretches in gpus for stretch in stretches) > _MOST_NUMBERS:
                break
            every //= 2
        return Past(
            cast=cast,
            moments=tuple(round(moment.at_s, 1) for moment in moments),
            gpus=gpus,
            news=tuple(News(number, entry) for number, entry in news),
        )

    def _recast(self, snapshot: Snapshot) -> Cast:
        gpus = tuple(sorted(snapshot.gpus, key=lambda gpu: gpu.gpu_id))
        if self._known != (snapshot.models, gpus):
            self._known = (snapshot.models, gpus)
            self._places = {spec.name: place for place, spec in enumerate(snapshot.models)}
            self._cast = Cast(
                number=max(self._cast.number + 1, round((snapshot.now_s + self._wall_s) * 1000)),
                models=tuple(map(_part, snapshot.models)),
                gpus=tuple(_device(gpu) for gpu in gpus),
            )
        return self._cast

    def _place(self, model: str) -> int:
        return self._places.get(model, NOBODYS)

    def _shelf(self, memory: tuple[Holdings, list[int]] | None) -> Shelf:
        if memory is None:
            return Shelf()
        holdings, (engines, adapters, others) = memory
        places = sorted((self._place(model), figures) for model, figures in holdings.items() if any(figures))
        return Shelf(tuple(Pool(place, *figures) for place, figures in places), engines, adapters, others)

    def _standing(self, view: ReplicaView, now: float) -> Standing:
        return Standing(
            self._place(view.replica.model),
            view.replica.index,
            view.state,
            view.gpu_ids,
            view.running,
            view.queued,
            view.kv_tokens,
            view.kv_used_tokens,
            round(max(0.0, now - view.since_s), 1),
            view.failures,
            None if view.quarantine_s is None else round(view.quarantine_s, 1),
            view.why,
        )

    def _pulses(self, snapshot: Snapshot) -> Iterable[Pulse]:
        if not self._moments:
            return
        newest, oldest = self._moments[-1], self._moments[0]
        before = self._moments[max(0, len(self._moments) - 1 - _RATE_OVER)]
        span_s = max(1.0, newest.at_s - before.at_s)
        none = (0, 0, 0)
        for model in newest.counts.keys() | snapshot.demands.keys() | snapshot.waiting.keys():
            tokens, sent, kept = newest.counts.get(model, none)
            _, sent_before, kept_before = oldest.counts.get(model, none)
            demand = snapshot.demands.get(model)
            pulse = Pulse(
                self._place(model),
                snapshot.waiting.get(model, 0),
                0.0 if demand is None else round(demand.requests_per_s, 2),
                round(max(0, tokens - before.counts.get(model, none)[0]) / span_s, 1),
                sent - sent_before,
                kept - kept_before,
            )
            if pulse.model != NOBODYS and pulse != Pulse(pulse.model):
                yield pulse

    def _stretches(self, gpu_id: int, moments: Sequence[_Moment]) -> Iterable[Stretch]:
        memories = [moment.memory.get(gpu_id) for moment in moments]
        names = sorted({name for memory in memories if memory is not None for name in memory[0]})
        nothing = [0, 0, 0]
        for name in names:
            for place, kind in enumerate(("weights", "kv", "used")):
                figures = (0 if memory is None else memory[0].get(name, nothing)[place] for memory in memories)
                yield Stretch(self._place(name), kind, _runs(figures))
        for place, kind in enumerate(("engines", "adapters", "others")):
            yield Stretch(NOBODYS, kind, _runs(0 if memory is None else memory[1][place] for memory in memories))


def _memory(snapshot: Snapshot) -> dict[int, tuple[Holdings, list[int]]]:
    replicas = {str(view.replica): view for view in snapshot.replicas}
    token_bytes = {spec.name: spec.kv_bytes_per_token for spec in snapshot.models}
    memory = {ledger.gpu.gpu_id: _held(ledger, replicas) for ledger in snapshot.ledgers}
    for view in snapshot.replicas:
        used_bytes = view.kv_used_tokens * token_bytes.get(view.replica.model, 0)
        for gpu_id in view.gpu_ids:
            if gpu_id in memory and (figures := memory[gpu_id][0].get(view.replica.model)) is not None:
                figures[2] = min(figures[1], figures[2] + round(used_bytes / MIB))
    return memory


def _held(ledger: GpuLedgerView, replicas: dict[str, ReplicaView]) -> tuple[Holdings, list[int]]:
    holdings: Holdings = {}
    rest = [0, 0, 0]
    for entry in ledger.entries:
        lease = entry.lease
        mib = round(lease.charged * ledger.gpu.page_bytes / MIB)
        view = replicas.get(lease.holder)
        if lease.lease_class in (LeaseClass.WEIGHTS, LeaseClass.KV):
            model = lease.holder.rpartition("/")[0] if view is None else view.replica.model
            holdings.setdefault(model, [0, 0, 0])[lease.lease_class is LeaseClass.KV] += mib
        else:
            rest[0 if lease.lease_class in _ENGINES else 2 if lease.lease_class in _OTHERS else 1] += mib
    return holdings, rest


def _runs(figures: Iterable[int]) -> tuple[int, ...]:
    return tuple(number for value, run in groupby(figures) for number in (value, sum(1 for _ in run)))


def _part(spec: ModelSpec) -> Part:
    return Part(
        name=spec.name,
        aliases=spec.aliases,
        weight_mib=round(spec.weight_bytes / MIB),
        kv_bytes=spec.kv_bytes_per_token,
        tp_size=spec.tp_size,
        ttft_slo_s=spec.slo.ttft_s,
        tpot_slo_s=spec.slo.tpot_s,
        pin=spec.pin,
        embedding=spec.embedding,
    )


def _device(gpu: Gpu) -> Device:
    return Device(gpu_id=gpu.gpu_id, node=gpu.node, name=gpu.name, mib=gpu.capacity_bytes // MIB)
