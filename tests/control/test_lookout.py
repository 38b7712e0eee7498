"""What viewers see: the newest second, the last minutes, and that neither is long on its way, however large the house."""

from __future__ import annotations

import msgspec
from chimera.control.lookout import Lookout
from chimera.core.gpu import Gpu
from chimera.core.lease import Lease, LeaseClass
from chimera.core.ledger_view import Entry, GpuLedgerView
from chimera.core.measures import Measures, ModelMeasures, Steps, Tally
from chimera.core.model import ModelSpec
from chimera.core.record import Entry as Line
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.sight import NOBODYS, Pool, Pulse, Stretch
from chimera.core.snapshot import Demand, ReplicaView, Snapshot
from chimera.units import KIB, MIB

from tests.sched.builders import model

WALL_S = 1000.0
GPU = Gpu(gpu_id=0, capacity_bytes=64 * MIB, page_bytes=2 * MIB)


def small(name: str) -> ModelSpec:
    return msgspec.structs.replace(model(name), kv_bytes_per_token=64 * KIB)


def lease(holder: str, lease_class: LeaseClass, pages: int, gpu_id: int = 0) -> Entry:
    return Entry(
        lease=Lease(holder=holder, gpu_id=gpu_id, lease_class=lease_class, revision=1, level=pages, held=0), worker="w"
    )


def house(now_s: float, *names: str, kv_pages: int = 5, used_tokens: int = 32) -> Snapshot:
    """Each model with a replica on the one GPU."""
    entries = [lease("w", LeaseClass.CONTEXT, 1), lease("", LeaseClass.MARGIN, 2)]
    for name in names:
        entries += [lease(f"{name}/0", LeaseClass.WEIGHTS, 3), lease(f"{name}/0", LeaseClass.KV, kv_pages)]
    return Snapshot(
        now_s=now_s,
        policy="static",
        gpus=(GPU,),
        models=tuple(map(small, names)),
        replicas=tuple(
            ReplicaView(
                replica=ReplicaId(name),
                epoch=Epoch(1, 1),
                state=ReplicaState.SERVING,
                gpu_ids=(0,),
                kv_used_tokens=used_tokens,
            )
            for name in names
        ),
        ledgers=(GpuLedgerView(gpu=GPU, entries=tuple(entries)),),
    )


def counted(tokens: int = 0, sent: int = 0, kept: int = 0) -> Measures:
    measures = Measures(tally=Tally(steps={"a": Steps(tokens=tokens)}))
    measures.models["a"] = ModelMeasures(outcomes={"stop": sent}, kept_both=kept)
    return measures


def test_memory_is_told_by_model_and_class_in_mib() -> None:
    lookout = Lookout(WALL_S)
    lookout.note(house(1.0, "a", "b"), Measures())
    sight = lookout.sight(house(1.0, "a", "b"), [], cast=0)
    (shelf,) = sight.shelves
    assert shelf.pools == (Pool(0, 6, 10, 2), Pool(1, 6, 10, 2))
    assert (shelf.engines, shelf.adapters, shelf.others) == (2, 0, 4)
    assert sight.at_s == WALL_S + 1.0


def test_used_memory_is_never_more_than_what_is_leased() -> None:
    lookout = Lookout(WALL_S)
    shrunk = house(1.0, "a", kv_pages=1, used_tokens=10_000)  # the counter is older than the ledger
    lookout.note(shrunk, Measures())
    assert lookout.sight(shrunk, [], cast=0).shelves[0].pools == (Pool(0, 6, 2, 2),)


def test_the_cast_is_told_when_it_is_not_known_and_when_it_changes() -> None:
    lookout = Lookout(WALL_S)
    first = lookout.sight(house(1.0, "a"), [], cast=0).changed
    assert first is not None and [part.name for part in first.models] == ["a"]
    assert lookout.sight(house(2.0, "a"), [], cast=first.number).changed is None
    second = lookout.sight(house(3.0, "a", "b"), [], cast=first.number).changed
    assert second is not None and second.number > first.number
    again = lookout.sight(house(4.0, "a", "b"), [], cast=second.number)
    assert (again.cast, again.changed) == (second.number, None)


def test_a_later_controls_cast_has_a_larger_number() -> None:
    earlier = Lookout(WALL_S).sight(house(1.0, "a"), [], cast=0).cast
    later = Lookout(WALL_S).sight(house(2.0, "a"), [], cast=0).cast
    assert later > earlier


def test_rates_are_of_the_last_seconds_and_attainment_of_the_last_minutes() -> None:
    lookout = Lookout(WALL_S)
    for second in range(400):
        snapshot = house(float(second), "a")
        lookout.note(snapshot, counted(tokens=10 * max(0, second - 350), sent=second, kept=min(second, 250)))
    asked = msgspec.structs.replace(snapshot, waiting={"a": 3}, demands={"a": Demand(requests_per_s=1.234)})
    (pulse,) = lookout.sight(asked, [], cast=0).pulses
    # Of the 299 seconds that are remembered beside the newest, those up to the 250th kept what was promised.
    assert pulse == Pulse(0, waiting=3, requests_per_s=1.23, tokens_per_s=10.0, sent=299, kept=150)


def test_a_model_without_business_is_left_out() -> None:
    lookout = Lookout(WALL_S)
    lookout.note(house(1.0, "a", "b"), Measures())
    assert lookout.sight(house(1.0, "a", "b"), [], cast=0).pulses == ()


def test_the_past_is_told_in_runs() -> None:
    lookout = Lookout(WALL_S)
    for second, pages in enumerate((5, 5, 5, 8)):
        lookout.note(house(float(second), "a", kv_pages=pages), Measures())
    past = lookout.past(house(3.0, "a"), [(7, Line(at_s=1.0, what="activate"))])
    assert past.moments == (1000.0, 1001.0, 1002.0, 1003.0)
    assert Stretch(0, "kv", (10, 3, 16, 1)) in past.gpus[0]
    assert Stretch(0, "weights", (6, 4)) in past.gpus[0]
    assert Stretch(NOBODYS, "engines", (2, 4)) in past.gpus[0]
    assert [one.number for one in past.news] == [7]


def test_the_past_of_a_model_that_is_gone_is_nobodys() -> None:
    lookout = Lookout(WALL_S)
    lookout.note(house(0.0, "a", "b"), Measures())
    past = lookout.past(house(1.0, "b"), [])
    assert {stretch.model for stretch in past.gpus[0] if stretch.kind == "kv"} == {NOBODYS, 0}


def large(second: int) -> Snapshot:
    """64 GPUs and 500 models, every pool another size each second."""
    gpus = tuple(Gpu(gpu_id=number, capacity_bytes=80 * 1024 * MIB, page_bytes=32 * MIB) for number in range(64))
    names = [f"publisher/model-of-some-size-{number:03}" for number in range(500)]
    ledgers = []
    for gpu in gpus:
        entries = [lease(f"w{gpu.gpu_id}", LeaseClass.CONTEXT, 19, gpu.gpu_id)]
        for number in range(gpu.gpu_id, 500, 64):
            entries.append(lease(f"{names[number]}/0", LeaseClass.WEIGHTS, 100, gpu.gpu_id))
            entries.append(lease(f"{names[number]}/0", LeaseClass.KV, 50 + (second * 7 + number) % 97, gpu.gpu_id))
        ledgers.append(GpuLedgerView(gpu=gpu, entries=tuple(entries)))
    views = (
        ReplicaView(
            replica=ReplicaId(name),
            epoch=Epoch(1, 1),
            state=ReplicaState.SERVING,
            gpu_ids=(number % 64,),
            running=3,
            queued=1,
            kv_tokens=30_000,
            kv_used_tokens=10_000 + (second * 31 + number) % 1000,
        )
        for number, name in enumerate(names)
    )
    return Snapshot(
        now_s=float(second),
        policy="flexible",
        gpus=gpus,
        models=tuple(map(small, names)),
        replicas=tuple(views),
        ledgers=tuple(ledgers),
        demands=dict.fromkeys(names, Demand(requests_per_s=1.0)),
    )


def test_a_house_of_64_gpus_and_500_models_is_told_in_little() -> None:
    lookout = Lookout(WALL_S)
    for second in range(300):
        lookout.note(large(second), Measures())
    past = lookout.past(large(299), [])
    assert sum(len(stretch.runs) for gpu in past.gpus for stretch in gpu) <= 20_000
    assert past.moments[-1] == WALL_S + 299 and past.moments[0] < WALL_S + 32
    assert len(msgspec.json.encode(past)) < 180_000
    sight = lookout.sight(large(299), [], cast=past.cast.number)
    assert len(msgspec.json.encode(sight)) < 60_000
