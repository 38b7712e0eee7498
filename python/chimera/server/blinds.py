"""What one key is shown of the house: the models that it is for by name, of all others no more than the memory they take.

Sums of GPUs stay whole. Names of other models are kept out of reasons as well, which are sentences and may speak of anybody.
Reads and leaves out; asks nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, repeat
from typing import Final, Protocol

import msgspec
from aiohttp import web

from chimera.core.access import ApiKey
from chimera.core.ledger_view import Entry as LedgerEntry
from chimera.core.measures import Measures, Tally
from chimera.core.record import Alternative, Entry
from chimera.core.sight import NOBODYS, Cast, News, Past, Pool, Shelf, Sight, Stretch
from chimera.core.snapshot import Snapshot
from chimera.records.questions import Account, Happening, RequestAccount, Try
from chimera.server.gate import GUEST

OTHER: Final = "other"
_ANOTHER: Final = "another model"
_NOTHING: Final = re.compile(r"(?!)")


def seen(http: web.Request, snapshot: Snapshot) -> Snapshot:
    """By whoever asks."""
    return Blinds(http[GUEST].key, snapshot.models).snapshot(snapshot)


class Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


class Blinds:
    """`models`: all that there are, as far as is known."""

    def __init__(self, key: ApiKey, models: Iterable[Named], gone: Iterable[str] = ()) -> None:
        """`gone` may have names of models that were removed."""
        self._all = key.models is None
        self._allows = key.allows
        self._names = _NOTHING
        self._hidden: frozenset[str] = frozenset()
        if not self._all:
            shown = {name: key.allows(one.name) for one in models for name in (*one.aliases, one.name)}
            shown |= {name: key.allows(name) for name in gone if name not in shown}
            self._hidden = frozenset(name for name, allowed in shown.items() if not allowed)
            # Own names as well, and long ones first: what is a part of an own name is not another's.
            words = "|".join(re.escape(name) for name in sorted(filter(None, shown), key=len, reverse=True))
            self._names = re.compile(rf"(?<!\w)(?:{words})(?!\w)") if words else _NOTHING

    def text(self, text: str) -> str:
        return self._names.sub(lambda found: _ANOTHER if found[0] in self._hidden else found[0], text)

    # What control tells.

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        if self._all:
            return snapshot
        allows = self._allows
        return msgspec.structs.replace(
            snapshot,
            models=tuple(spec for spec in snapshot.models if allows(spec.name)),
            replicas=tuple(
                msgspec.structs.replace(view, why=self.text(view.why))
                for view in snapshot.replicas
                if allows(view.replica.model)
            ),
            ledgers=tuple(
                msgspec.structs.replace(ledger, entries=tuple(map(self._ledger_entry, ledger.entries)))
                for ledger in snapshot.ledgers
            ),
            waiting={model: count for model, count in snapshot.waiting.items() if allows(model)},
            demands={model: demand for model, demand in snapshot.demands.items() if allows(model)},
        )

    def measures(self, measures: Measures) -> Measures:
        if self._all:
            return measures
        allows = self._allows
        steps = {model: steps for model, steps in measures.tally.steps.items() if allows(model)}
        return msgspec.structs.replace(
            measures,
            models={model: counts for model, counts in measures.models.items() if allows(model)},
            tally=Tally(steps=steps, answers=measures.tally.answers),
        )

    def _ledger_entry(self, entry: LedgerEntry) -> LedgerEntry:
        model = entry.lease.holder.rpartition("/")[0]
        if not model or self._allows(model):  # a worker, the margin, strangers: nobody's name
            return entry
        return msgspec.structs.replace(entry, lease=msgspec.structs.replace(entry.lease, holder=OTHER))

    # What viewers see.

    def sight(self, sight: Sight, cast: Cast) -> Sight:
        """`cast` is what it was told in, all of it."""
        if self._all:
            return sight
        places = self._places(cast)
        return msgspec.structs.replace(
            sight,
            changed=None if sight.changed is None else self._cast(cast),
            shelves=tuple(_shelf(shelf, places) for shelf in sight.shelves),
            replicas=tuple(
                msgspec.structs.replace(one, model=places[one.model], why=self.text(one.why))
                for one in sight.replicas
                if one.model in places
            ),
            pulses=tuple(msgspec.structs.replace(one, model=places[one.model]) for one in sight.pulses if one.model in places),
            news=self._news(sight.news),
            fault=self.text(sight.fault),
        )

    def past(self, past: Past) -> Past:
        if self._all:
            return past
        places = self._places(past.cast)
        return msgspec.structs.replace(
            past,
            cast=self._cast(past.cast),
            gpus=tuple(tuple(_stretches(stretches, places)) for stretches in past.gpus),
            news=self._news(past.news),
        )

    def _places(self, cast: Cast) -> dict[int, int]:
        """Where the models that are shown have their places now; whoever is not here is nobody."""
        shown = (place for place, part in enumerate(cast.models) if self._allows(part.name))
        return {before: now for now, before in enumerate(shown)}

    def _cast(self, cast: Cast) -> Cast:
        return msgspec.structs.replace(cast, models=tuple(part for part in cast.models if self._allows(part.name)))

    def _news(self, news: Iterable[News]) -> tuple[News, ...]:
        return tuple(News(one.number, self._entry(one.entry)) for one in news if self._tells(one.entry.model))

    def _entry(self, entry: Entry) -> Entry:
        return msgspec.structs.replace(
            entry, reason=self.text(entry.reason), alternatives=self._alternatives(entry.alternatives)
        )

    # What the records say.

    def account(self, account: Account) -> Account:
        if self._all:
            return account
        return msgspec.structs.replace(
            account,
            statistics=tuple(one for one in account.statistics if self._allows(one.model)),
            happenings=self._happenings(account.happenings),
        )

    def request(self, account: RequestAccount) -> RequestAccount:
        if self._all:
            return account
        return msgspec.structs.replace(
            account,
            detail=self.text(account.detail),
            tries=tuple(map(self._try, account.tries)),
            happenings=self._happenings(account.happenings),
        )

    def _happenings(self, happenings: Iterable[Happening]) -> tuple[Happening, ...]:
        return tuple(
            msgspec.structs.replace(
                one, why=self.text(one.why), cost=self.text(one.cost), alternatives=self._alternatives(one.alternatives)
            )
            for one in happenings
            if self._tells(one.model)
        )

    def _try(self, one: Try) -> Try:
        return msgspec.structs.replace(one, why=self.text(one.why))

    def _alternatives(self, alternatives: Iterable[Alternative]) -> tuple[Alternative, ...]:
        return tuple(msgspec.structs.replace(one, what=self.text(one.what)) for one in alternatives)

    def _tells(self, model: str) -> bool:
        """What was done with no model in particular is everybody's."""
        return not model or self._allows(model)


def _shelf(shelf: Shelf, places: dict[int, int]) -> Shelf:
    """The pools of others become one."""
    own = sorted(
        (msgspec.structs.replace(pool, model=places[pool.model]) for pool in shelf.pools if pool.model in places),
        key=lambda pool: pool.model,
    )
    rest = [pool for pool in shelf.pools if pool.model not in places]
    if not rest:
        return msgspec.structs.replace(shelf, pools=tuple(own))
    others = Pool(NOBODYS, *(sum(getattr(pool, figure) for pool in rest) for figure in ("weights", "kv", "used")))
    return msgspec.structs.replace(shelf, pools=(others, *own))


def _stretches(stretches: Iterable[Stretch], places: dict[int, int]) -> Iterable[Stretch]:
    others: dict[str, list[Stretch]] = {}
    for stretch in stretches:
        if stretch.model in places:
            yield msgspec.structs.replace(stretch, model=places[stretch.model])
        else:
            others.setdefault(stretch.kind, []).append(stretch)
    for kind, same in others.items():
        yield Stretch(NOBODYS, kind, _sum([stretch.runs for stretch in same]))


def _sum(all_runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Of figures that are told in runs of `(value, times)`."""
    unrolled = [chain.from_iterable(map(repeat, runs[::2], runs[1::2])) for runs in all_runs]
    sums = (sum(figures) for figures in zip(*unrolled, strict=True))
    return tuple(number for value, run in groupby(sums) for number in (value, sum(1 for _ in run)))
