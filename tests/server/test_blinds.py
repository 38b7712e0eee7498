"""A key that is for some models sees no other's name, wherever it looks, and the sums of GPUs as they are."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from chimera.control.lookout import Lookout
from chimera.core.access import Access, ApiKey, hash_of
from chimera.core.measures import Measures, ModelMeasures, Steps, Tally
from chimera.core.record import Alternative, Attempt, Entry, RequestRecord
from chimera.core.sight import NOBODYS, Pool, Stretch
from chimera.core.snapshot import Demand, Snapshot
from chimera.msg.stream import ReplicaNews
from chimera.records.keeper import Keeper
from chimera.server import dashboard
from chimera.server.app import App
from chimera.server.blinds import Blinds
from chimera.server.catalogue import Catalogue
from chimera.server.gate import Gate

from tests.control.test_lookout import house
from tests.server.conftest import Stage, set_up, until
from tests.server.rehearsal import model, model_folder
from tests.server.test_dashboard import bearer

SECRET, ALIAS, GONE = "secret-7b", "hush", "retired-3b"
REASON = f"{SECRET} needs its room, {ALIAS} too; m goes"
KEYS = (
    ApiKey(name="root", hash=hash_of("sk-root"), admin=True),
    ApiKey(name="bert", hash=hash_of("sk-bert"), models=("m",)),
)
MINE = KEYS[1]


def test_names_of_others_are_no_part_of_any_text_and_own_ones_stay_whole() -> None:
    models = [model(SECRET, Path("x"), aliases=(ALIAS,)), model("m", Path("x")), model("secret-7b-mine", Path("x"))]
    key = ApiKey(name="k", hash="", models=("m", "secret-7b-mine"))
    blinds = Blinds(key, models, gone=[GONE])
    told = blinds.text(f"{SECRET}/0 and {ALIAS} and {GONE}, not secret-7b-mine, m or hushed")
    assert told == "another model/0 and another model and another model, not secret-7b-mine, m or hushed"
    assert Blinds(KEYS[0], models).text(REASON) == REASON


def test_the_memory_of_others_is_there_without_their_names() -> None:
    past = Lookout(0.0)
    past.note(house(1.0, "a", "m", "z", used_tokens=32), Measures())
    past.note(house(2.0, "a", "m", "z", used_tokens=64), Measures())
    whole = past.sight(house(2.0, "a", "m", "z"), [], cast=0)
    assert whole.changed is not None
    blinds = Blinds(MINE, whole.changed.models)
    sight = blinds.sight(whole, whole.changed)
    assert sight.changed is not None and [part.name for part in sight.changed.models] == ["m"]
    assert sight.shelves[0].pools == (Pool(NOBODYS, 12, 20, 8), Pool(0, 6, 10, 4))
    assert [(one.model, one.index) for one in sight.replicas] == [(0, 0)]
    told = blinds.past(past.past(house(2.0, "a", "m", "z"), []))
    assert Stretch(0, "used", (2, 1, 4, 1)) in told.gpus[0]
    assert Stretch(NOBODYS, "weights", (12, 2)) in told.gpus[0] and Stretch(NOBODYS, "used", (4, 1, 8, 1)) in told.gpus[0]


def test_the_ledger_adds_up_as_before() -> None:
    whole = house(1.0, "m", SECRET)
    seen = Blinds(MINE, whole.models).snapshot(whole)
    assert [ledger.by_class() for ledger in seen.ledgers] == [ledger.by_class() for ledger in whole.ledgers]
    assert [view.replica.model for view in seen.replicas] == ["m"]
    assert {entry.lease.holder for entry in seen.ledgers[0].entries} == {"w", "", "m/0", "other"}


def busy(now_s: float) -> Snapshot:
    """Two models at work, of which everything that can be told is told."""
    plain = house(now_s, "m", SECRET)
    return msgspec.structs.replace(
        plain,
        models=(plain.models[0], msgspec.structs.replace(plain.models[1], aliases=(ALIAS,))),
        replicas=tuple(msgspec.structs.replace(view, why=REASON, failures=1) for view in plain.replicas),
        waiting={"m": 1, SECRET: 2},
        demands={"m": Demand(requests_per_s=1.0), SECRET: Demand(requests_per_s=2.0)},
    )


def records(path: Path) -> Path:
    keeper = Keeper(path, wall=lambda: 1000.0)
    weighed = (Alternative(what=REASON, score=1.0, chosen=True),)
    for name in ("m", SECRET, GONE):
        keeper.keep(Entry(at_s=10.0, what="activate", model=name, replica=f"{name}/0", reason=REASON, alternatives=weighed))
        record = RequestRecord(
            request_id=f"of-{len(name)}",
            model=name,
            arrived_s=9.0,
            ended_s=11.0,
            prompt_tokens=1,
            outcome="lost",
            detail=REASON,
        )
        keeper.keep(record)
        attempt = Attempt(
            request_id=f"of-{len(name)}", model=name, replica=f"{name}/0", arrived_s=9.0, routed_s=9.5, ended_s=11.0,
            outcome="lost", reason=REASON,
        )  # fmt: skip
        keeper.keep(attempt)
    keeper.keep(Entry(at_s=10.0, what="policy", reason=f"after {GONE} and {SECRET}"))
    keeper.close()
    return path


STREAMS = ("/sight", "/models/events", "/models/sse")
NAMED = (
    "/explain?request=of-9",
    "/explain?request=of-1",
    "/explain?at=10",
    "/explain?since=99999d",
    "/explain?model=m&since=99999d",
    "/v1/models/secre",
)

PLAIN = (
    *("/snapshot", "/ledger", "/metrics", "/sight/past", "/requests", "/v1/models", "/server_info"),
    *("/get_model_names", "/get_memory_pool_size", "/running", "/api/ps", "/v2/repository/index"),
)


async def test_no_route_tells_a_name_that_a_key_is_not_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every route that a client may read, so that a new one is not forgotten; to the other key they do tell it."""
    monkeypatch.setattr(dashboard, "_EVERY_S", 0.01)
    async with set_up(Access(keys=KEYS), records=records(tmp_path / "records")) as stage:
        rehearsal = stage.rehearsal
        rehearsal.register(model(SECRET, model_folder(stage.run_dir / "s"), aliases=(ALIAS,)))
        await until(lambda: len(stage.front.catalogue.models) == 2)
        rehearsal.snapshot = lambda: busy(1.0)  # type: ignore[method-assign]
        rehearsal.measures = Measures(
            models={name: ModelMeasures(outcomes={"stop": 1}) for name in ("m", SECRET)},
            tally=Tally(steps={name: Steps(tokens=1) for name in ("m", SECRET)}),
        )
        weighed = (Alternative(what=REASON, score=1.0),)
        for number, name in enumerate(("m", SECRET), 1):
            rehearsal.news.append((number, Entry(at_s=1.0, what="ready", model=name, reason=REASON, alternatives=weighed)))
        mine, all_told = await everything(stage, "sk-bert"), await everything(stage, "sk-root")
    for path, text in mine.items():
        assert not any(name in text for name in (SECRET, ALIAS, GONE)), (path, text)
    telling = {path for path, text in all_told.items() if SECRET in text}
    assert telling == {*STREAMS, *NAMED, *PLAIN}
    for path in telling - {"/explain?request=of-9", "/v1/models/secre"}:
        assert "m" in re.split(r"\W", mine[path]), (path, mine[path])


async def everything(stage: Stage, key: str) -> dict[str, str]:
    """What each route says to that key, by path; of streams, as much as was told until then."""
    routes = App(Catalogue(), stage.front.desk, None, Gate(Access())).routes()  # type: ignore[arg-type]
    paths = [
        route.path for route in routes if route.method == "GET" and not (route.admin or route.open) and "{" not in route.path
    ]
    told = {}
    for path in (*(path for path in paths if path not in STREAMS), *NAMED, "/v2/repository/index"):
        method = "POST" if path == "/v2/repository/index" else "GET"
        async with stage.client.request(method, stage.url + path, headers=bearer(key)) as response:
            told[path] = await response.text()
    for path in STREAMS:
        async with stage.client.get(stage.url + path, headers=bearer(key)) as response:
            read = [await response.content.readuntil(b"\n\n") for _ in range(2)]
            for view in reversed(busy(1.0).replicas):
                stage.rehearsal._tell(
                    ReplicaNews(replica=view.replica, state=view.state, reason=f"at last: {REASON}", at_s=1.0)
                )
            while path != "/sight" and (b"at last" not in read[-1] or b'"m"' not in read[-1]):
                read.append(await response.content.readuntil(b"\n\n"))
            told[path] = b"".join(read).decode()
    return told
