"""The operator's verbs: models loaded, unloaded, pinned, removed, and watched; in our words and in Prism's.

An order goes to control, which decides; what becomes of it is read from the news of replicas. Knows no prompt and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from chimera.core.replica import ReplicaId, ReplicaState
from chimera.core.snapshot import LOCAL_NAMES, POLICY_NAMES, ReplicaView, Snapshot
from chimera.errors import RequestError
from chimera.msg.actions import Reject
from chimera.msg.events import LoadWanted, ModelRegistered, ModelRemoved, PolicyChosen, ResizeWanted, UnloadWanted
from chimera.msg.stream import EntryFiled, Flush, Flushed, Refiled, ReloadWanted, ReplicaNews
from chimera.server import intake
from chimera.server.blinds import Blinds, seen
from chimera.server.bodies import json_response, read_body
from chimera.server.catalogue import Catalogue
from chimera.server.gate import GUEST
from chimera.server.orders import (
    Activation,
    CachesFlushed,
    Deactivation,
    EntryOrder,
    LoadOrder,
    ModelNames,
    Pinned,
    PinOrder,
    PolicyOrder,
    PolicyTold,
    PoolSize,
    Registered,
    Reloaded,
    Removed,
    ReplicaTold,
    Resized,
    Resizing,
    Unloaded,
    UnloadOrder,
)
from chimera.server.readers import STREAM_HEADERS
from chimera.server.relay import Relay, Watch
from chimera.server.routes import Route, taking

_LOAD_WITHIN_S = 1800.0
_LEAVE_WITHIN_S = 60.0
"""Beside the drain."""
_READ_WITHIN_S = 60.0
_FLUSH_WITHIN_S = 30.0
_SIGN_OF_LIFE_S = 15.0
_GIGABYTE = 10**9
"""Of a pool, as in a placement file."""

T = TypeVar("T")

_entry_decoder = msgspec.json.Decoder(EntryOrder)


class Operator:
    def __init__(self, catalogue: Catalogue, relay: Relay) -> None:
        self._catalogue = catalogue
        self._relay = relay

    def routes(self) -> list[Route]:
        return [
            self._order("/models/load", "Bring a model up", LoadOrder, self.load, ReplicaTold, slow=True),
            self._order("/models/unload", "Let a model go", UnloadOrder, self.unload, Unloaded, slow=True),
            self._order("/models/pin", "Keep a model, or no longer", PinOrder, self._pin, Pinned),
            self._order("/activate", "Bring a model up, in Prism's words", Activation, self._activate, ReplicaTold, slow=True),
            self._order("/deactivate", "Let a model go, in Prism's words", Deactivation, self._deactivate, Unloaded, slow=True),
            self._order("/resize_mem_pool", "Bound a model's KV memory, in Prism's words", Resizing, self._resize, Resized),
            *(
                Route(
                    f"{method} /flush_cache",
                    "Empty the prefix caches of all models",
                    self._flush,
                    gives=CachesFlushed,
                    fails=(504,),
                    admin=True,
                )
                for method in ("GET", "POST")
            ),
            Route(
                "POST /reload",
                "Read the placement file again, and do what is different in it",
                self._reload,
                gives=Reloaded,
                fails=(504,),
                admin=True,
            ),
            Route(
                "POST /models",
                "Register a model: an entry as in a placement file",
                self._register,
                takes=EntryOrder,
                gives=Registered,
                fails=(504,),
                admin=True,
            ),
            Route("DELETE /models/{name}", "Forget a model", self._remove, gives=Removed, fails=(404, 504), admin=True),
            *(
                Route(
                    f"GET {path}", "What becomes of every replica, from now on", self._events, streams=ReplicaTold, fails=(504,)
                )
                for path in ("/models/events", "/models/sse")
            ),
            Route("GET /policy", "Who decides what runs where", self._policy, gives=PolicyTold, fails=(504,)),
            Route(
                "PUT /policy",
                "Let another policy decide",
                taking(PolicyOrder, self._choose_policy),
                takes=PolicyOrder,
                gives=PolicyTold,
                fails=(504,),
                admin=True,
            ),
            Route("GET /get_model_names", "The models there are, in Prism's words", self._names, gives=ModelNames),
            Route(
                "GET /get_memory_pool_size",
                "The KV memory of every replica, in Prism's words",
                self._pool_sizes,
                gives=list[PoolSize],
                fails=(504,),
            ),
        ]

    @staticmethod
    def _order(
        path: str, what: str, takes: type[T], work: Callable[[T], Awaitable[web.Response]], gives: Any, *, slow: bool = False
    ) -> Route:
        """An operator's POST about a model; a slow one waits for what becomes of it."""
        return Route(
            f"POST {path}",
            what,
            taking(takes, work),
            takes=takes,
            gives=gives,
            fails=(404, 429, 502, 504) if slow else (404, 503, 504),
            admin=True,
        )

    # Our words.

    async def load(self, order: LoadOrder) -> web.Response:
        replica = ReplicaId(self._catalogue.resolve(order.model).name, order.index)
        with self._relay.watch(uuid.uuid4().hex) as watch:
            view = next((view for view in await self._views() if view.replica == replica), None)
            moves = bool(order.gpu_ids) and view is not None and view.gpu_ids != order.gpu_ids
            if view is not None and view.state is ReplicaState.SERVING and not moves:
                return json_response(_state(replica, ReplicaState.SERVING, "it was up already"))
            pool = order.max_memory_pool_size
            self._relay.order(
                LoadWanted(
                    order=watch.order,
                    front=self._relay.name,
                    replica=replica,
                    gpu_ids=order.gpu_ids,
                    kv_limit_bytes=None if pool is None else round(pool * _GIGABYTE),
                )
            )
            news = await _heard(watch, lambda news: news.replica == replica and _settled(news), _LOAD_WITHIN_S)
        if news.failed:
            raise RequestError("model_unavailable", f"{replica} did not come up: {news.reason}")
        return json_response(_state(replica, news.state, news.reason))

    async def unload(self, order: UnloadOrder) -> web.Response:
        spec = self._catalogue.resolve(order.model)
        with self._relay.watch(uuid.uuid4().hex) as watch:
            up = {
                view.replica
                for view in await self._views()
                if view.replica.model == spec.name
                and order.index in (None, view.replica.index)
                and view.state is not ReplicaState.STOPPED
            }
            self._relay.order(
                UnloadWanted(
                    order=watch.order, front=self._relay.name, model=spec.name, index=order.index, drain_s=order.drain_s
                )
            )
            drain_s = spec.drain_s if order.drain_s is None else order.drain_s
            down = set(up)
            while up:
                news = await _heard(
                    watch, lambda news: news.replica in up and news.state is ReplicaState.STOPPED, drain_s + _LEAVE_WITHIN_S
                )
                up.discard(news.replica)
        return json_response(Unloaded(model=spec.name, state=ReplicaState.STOPPED, stopped=sorted(r.index for r in down)))

    async def _pin(self, order: PinOrder) -> web.Response:
        spec = msgspec.structs.replace(self._catalogue.resolve(order.model), pin=order.pin)
        await self._relay.snapshot(after=ModelRegistered(model=spec))
        return json_response(Pinned(model=spec.name, pin=spec.pin))

    async def _policy(self, http: web.Request) -> web.Response:
        snapshot = await self._relay.snapshot()
        return json_response(_order(snapshot, policies=POLICY_NAMES, locals=LOCAL_NAMES))

    async def _choose_policy(self, order: PolicyOrder) -> web.Response:
        """From now on; what runs goes on meanwhile. The answer is what control says it goes by."""
        for field, name, known in (("policy", order.policy, POLICY_NAMES), ("local", order.local, LOCAL_NAMES)):
            if name is not None and name not in known:
                told = f"there is no {field} {name!r}; there are {', '.join(known)}"
                raise RequestError("bad_request", told, param=field)
        if order.policy is None and order.local is None:
            raise RequestError("bad_request", "name a policy, a local order, or both", param="policy")
        snapshot = await self._relay.snapshot(after=PolicyChosen(policy=order.policy, local=order.local))
        if order.policy not in (None, snapshot.policy):
            raise RequestError("bad_request", f"the server was started without the cost table that {order.policy} needs")
        return json_response(_order(snapshot))

    async def _reload(self, http: web.Request) -> web.Response:
        with self._relay.watch(uuid.uuid4().hex) as watch:
            self._relay.order(ReloadWanted(order=watch.order, front=self._relay.name))
            told = await _refiled(watch)
        if told.faults:
            raise RequestError("bad_request", f"what was in force stays in force: {'; '.join(told.faults)}")
        return json_response(Reloaded(changes=told.changes))

    async def _register(self, http: web.Request) -> web.Response:
        """The entry is read by whoever reads the placement file, and in the same way."""
        body = await read_body(http)
        name = intake.decode(body, _entry_decoder).model_name
        if self._catalogue.knows(name):
            raise RequestError("bad_request", f"{name!r} is the name of a model here", param="model_name")
        with self._relay.watch(uuid.uuid4().hex) as watch:
            self._relay.order(EntryFiled(order=watch.order, front=self._relay.name, entry=body))
            told = await _refiled(watch)
        if told.faults:
            raise RequestError("bad_request", "; ".join(told.faults))
        return json_response(Registered(model=name, changes=told.changes))

    async def _remove(self, http: web.Request) -> web.Response:
        """The model is known no longer; what runs of it drains."""
        spec = self._catalogue.resolve(http.match_info["name"])
        await self._relay.snapshot(after=ModelRemoved(model=spec.name))
        return json_response(Removed(model=spec.name, deleted=True))

    async def _events(self, http: web.Request) -> web.StreamResponse:
        """How every replica is now, and from then on all that becomes of them."""
        key = http[GUEST].key
        with self._relay.watch() as watch:
            views = seen(http, await self._relay.snapshot()).replicas
            response = web.StreamResponse(headers=STREAM_HEADERS)
            await response.prepare(http)
            for view in views:
                await response.write(_event(_state(view.replica, view.state, "as it is now", gpu_ids=view.gpu_ids)))
            while True:
                try:
                    async with asyncio.timeout(_SIGN_OF_LIFE_S):
                        news = await watch.news.get()
                except TimeoutError:
                    await response.write(b": still here\n\n")
                    continue
                if news is None or watch.news.full():  # control went away, or too much was missed: the client asks anew
                    return response
                if isinstance(news, ReplicaNews) and key.allows(news.replica.model):
                    blinds = Blinds(key, [spec for spec, _ in self._catalogue.models])
                    await response.write(_event(_told(news, blinds.text(news.reason))))

    # Prism's.

    async def _activate(self, order: Activation) -> web.Response:
        gpu_ids = () if order.gpu_id is None else (order.gpu_id,) if isinstance(order.gpu_id, int) else tuple(order.gpu_id)
        return await self.load(
            LoadOrder(
                model=order.model_name,
                index=order.instance_idx,
                gpu_ids=gpu_ids,
                max_memory_pool_size=order.memory_pool_size,
            )
        )

    async def _deactivate(self, order: Deactivation) -> web.Response:
        drain_s = 0.0 if order.preempt else None
        return await self.unload(UnloadOrder(model=order.model_name, index=order.instance_idx, drain_s=drain_s))

    async def _resize(self, order: Resizing) -> web.Response:
        model, limit = self._catalogue.resolve(order.model_name).name, round(order.memory_pool_size * _GIGABYTE)
        with self._relay.watch(uuid.uuid4().hex) as watch:
            wanted = ResizeWanted(
                order=watch.order, front=self._relay.name, model=model, index=order.instance_idx, kv_limit_bytes=limit
            )
            views = (await self._relay.snapshot(after=wanted)).replicas
            while not watch.news.empty():
                await _next(watch)  # raises what control refuses, which it says before it shows its state
        copies = [view.replica.index for view in views if view.replica.model == model and view.kv_limit_bytes == limit]
        return json_response(Resized(model=model, memory_pool_size=order.memory_pool_size, replicas=copies))

    async def _flush(self, http: web.Request) -> web.Response:
        with self._relay.watch(uuid.uuid4().hex) as watch:
            up = {view.replica for view in await self._views() if view.state is ReplicaState.SERVING}
            self._relay.order(Flush(order=watch.order, front=self._relay.name, replicas=tuple(sorted(up))))
            left, flushed = set(up), []
            async with _within(_FLUSH_WITHIN_S):
                while left:
                    match await _next(watch):
                        case Flushed(replica=replica):
                            flushed.append(str(replica))
                            left.discard(replica)
                        case ReplicaNews(replica=replica, state=ReplicaState.STOPPED):
                            left.discard(replica)  # and its cache with it
        return json_response(CachesFlushed(flushed=sorted(flushed)))

    async def _names(self, http: web.Request) -> web.Response:
        allows = http[GUEST].key.allows
        return json_response(ModelNames(model_names=[spec.name for spec, _ in self._catalogue.models if allows(spec.name)]))

    async def _pool_sizes(self, http: web.Request) -> web.Response:
        sizes = []
        for view in seen(http, await self._relay.snapshot()).replicas:
            if view.state is ReplicaState.SERVING:
                spec = self._catalogue.resolve(view.replica.model)
                sizes.append(
                    PoolSize(
                        model_name=spec.name,
                        instance_idx=view.replica.index,
                        gpu_ids=view.gpu_ids,
                        memory_pool_size=spec.kv_bytes(view.kv_tokens) / _GIGABYTE,
                        memory_in_use=spec.kv_bytes(view.kv_used_tokens) / _GIGABYTE,
                        max_memory_pool_size=None if view.kv_limit_bytes is None else view.kv_limit_bytes / _GIGABYTE,
                    )
                )
        return json_response(sizes)

    async def _views(self) -> tuple[ReplicaView, ...]:
        return (await self._relay.snapshot()).replicas


async def _refiled(watch: Watch) -> Refiled:
    """What came of the order to read something."""
    async with _within(_READ_WITHIN_S):
        while True:
            match await _next(watch):
                case Refiled() as told:
                    return told


async def _heard(watch: Watch, wanted: Callable[[ReplicaNews], bool], within_s: float) -> ReplicaNews:
    """The first news that is wanted. RequestError when the order was refused, or nothing came of it in time."""
    async with _within(within_s):
        while True:
            match await _next(watch):
                case ReplicaNews() as news if wanted(news):
                    return news


async def _next(watch: Watch) -> ReplicaNews | Refiled | Flushed:
    match await watch.news.get():
        case Reject(code=code, reason=reason):
            raise RequestError(code, reason, param="model")
        case None:
            told = "the server's control process went away; the order may be under way"
            raise RequestError("service_unavailable", told, retry_after_s=1)
        case news:
            return news


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RequestError("gateway_timeout", f"nothing came of it within {seconds:g} s; it may be under way") from None


def _settled(news: ReplicaNews) -> bool:
    return news.failed or news.state is ReplicaState.SERVING


def _state(replica: ReplicaId, state: ReplicaState, reason: str, **more: Any) -> ReplicaTold:
    return ReplicaTold(model=replica.model, index=replica.index, state=state, reason=reason, **more)


def _told(news: ReplicaNews, reason: str) -> ReplicaTold:
    more = {"gpu_ids": news.gpu_ids, "at_s": news.at_s, "load_s": news.load_s, "failed": news.failed}
    return _state(news.replica, news.state, reason, **more)


def _order(snapshot: Snapshot, **known: tuple[str, ...]) -> PolicyTold:
    return PolicyTold(policy=snapshot.policy, local=snapshot.local, **known)


def _event(told: ReplicaTold) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(told)
