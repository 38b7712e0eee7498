"""The verbs of other servers for what the operator's own do: llama-swap's, Ollama's, vLLM's, Triton's and SGLang's.

For scripts and dashboards that were written for those; each answers in their words, and does what ours does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from aiohttp import web

import chimera
from chimera.core.model import ModelSpec
from chimera.core.replica import ReplicaState
from chimera.core.snapshot import ReplicaView
from chimera.errors import RequestError
from chimera.server.blinds import seen
from chimera.server.bodies import json_response
from chimera.server.catalogue import Catalogue
from chimera.server.gate import GUEST
from chimera.server.operator import Operator
from chimera.server.orders import LoadOrder, UnloadOrder
from chimera.server.relay import Relay
from chimera.server.routes import ABOUT_A_MODEL, Route

_SLOW = (404, 429, 502, 504)
_LLAMA_SWAPS = {ReplicaState.LOADING: "starting", ReplicaState.SERVING: "ready", ReplicaState.DRAINING: "stopping"}


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    state: str


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """llama-swap's."""

    running: list[RunningModel]


class ProcessDetails(msgspec.Struct, frozen=True, kw_only=True):
    format: str = "safetensors"
    family: str
    quantization_level: str


class Process(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    model: str
    size: int
    """Weights and KV memory, in bytes, on all its GPUs."""
    size_vram: int
    context_length: int
    details: ProcessDetails


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """Ollama's."""

    models: list[Process]


class Sleeping(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's."""

    is_sleeping: bool


class RepositoryModel(msgspec.Struct, frozen=True, kw_only=True):
    """Triton's."""

    name: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's."""

    model_path: str
    tokenizer_path: str
    is_generation: bool
    max_model_len: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    policy: str
    local: str
    models: list[str]
    gpus: int


class Done(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Peers:
    def __init__(self, catalogue: Catalogue, relay: Relay, operator: Operator) -> None:
        self._catalogue = catalogue
        self._relay = relay
        self._operator = operator

    def routes(self) -> list[Route]:
        return [
            Route("GET /running", "The models that are up, as llama-swap's", self._running, gives=Running, fails=(504,)),
            self._order("GET /unload", "Let all models go, as llama-swap's", self._unload_all),
            Route("GET /api/ps", "The models that are up, as Ollama's", self._processes, gives=Processes, fails=(504,)),
            self._order("POST /sleep", "Let a model go, as vLLM's; `?model=` where there are several", self._sleep),
            self._order("POST /wake_up", "Bring a model up, as vLLM's; likewise", self._wake_up),
            Route(
                "GET /is_sleeping",
                "Whether a model is down, as vLLM's; likewise",
                self._is_sleeping,
                gives=Sleeping,
                fails=(404, 504),
            ),
            self._order("POST /v2/repository/models/{name}/load", "Bring a model up, as Triton's", self._load_named),
            self._order("POST /v2/repository/models/{name}/unload", "Let a model go, as Triton's", self._unload_named),
            Route(
                "POST /v2/repository/index",
                "Every model and its state, as Triton's",
                self._index,
                gives=list[RepositoryModel],
                fails=(504,),
            ),
            Route("GET /liveness", "Whether this front-end answers", self._alive, gives=Ready, open=True),
            *(
                Route(f"GET {path}", "Whether a model is up", self._ready, gives=Ready, fails=(504,), open=True)
                for path in ("/readiness", "/ready")
            ),
            Route(
                "GET /model_info",
                "A model's files, as SGLang's; `?model=` where there are several",
                self._model_info,
                gives=ModelInfo,
                fails=ABOUT_A_MODEL,
            ),
            Route("GET /server_info", "What this server is, as SGLang's", self._server_info, gives=ServerInfo, fails=(504,)),
        ]

    @staticmethod
    def _order(at: str, what: str, handler: Callable[[web.Request], Awaitable[web.Response]]) -> Route:
        return Route(at, what, handler, gives=Done, fails=_SLOW, admin=True)

    # llama-swap's and Ollama's.

    async def _running(self, http: web.Request) -> web.Response:
        views = [view for view in await self._views(http) if view.state in _LLAMA_SWAPS]
        told = [RunningModel(model=view.replica.model, state=_LLAMA_SWAPS[view.state]) for view in views]
        return json_response(Running(running=told))

    async def _unload_all(self, http: web.Request) -> web.Response:
        for model in sorted({view.replica.model for view in await self._views(http) if view.state is not ReplicaState.STOPPED}):
            await self._operator.unload(UnloadOrder(model=model))
        return json_response(Done())

    async def _processes(self, http: web.Request) -> web.Response:
        specs = {spec.name: spec for spec, _ in self._catalogue.models}
        up = [view for view in await self._views(http) if view.state is ReplicaState.SERVING and view.replica.model in specs]
        return json_response(Processes(models=[_process(specs[view.replica.model], view) for view in up]))

    # vLLM's and Triton's.

    async def _sleep(self, http: web.Request) -> web.Response:
        await self._operator.unload(UnloadOrder(model=self._asked(http).name))
        return json_response(Done())

    async def _wake_up(self, http: web.Request) -> web.Response:
        await self._operator.load(LoadOrder(model=self._asked(http).name))
        return json_response(Done())

    async def _is_sleeping(self, http: web.Request) -> web.Response:
        name = self._asked(http).name
        up = any(view.replica.model == name and view.state is ReplicaState.SERVING for view in await self._views(http))
        return json_response(Sleeping(is_sleeping=not up))

    async def _load_named(self, http: web.Request) -> web.Response:
        await self._operator.load(LoadOrder(model=http.match_info["name"]))
        return json_response(Done())

    async def _unload_named(self, http: web.Request) -> web.Response:
        await self._operator.unload(UnloadOrder(model=http.match_info["name"]))
        return json_response(Done())

    async def _index(self, http: web.Request) -> web.Response:
        words: dict[ReplicaState, Literal["READY", "LOADING", "UNLOADING"]] = {
            ReplicaState.DRAINING: "UNLOADING",
            ReplicaState.LOADING: "LOADING",
            ReplicaState.SERVING: "READY",
        }
        views = await self._views(http)
        told = []
        for spec, _ in self._catalogue.models:
            if not http[GUEST].key.allows(spec.name):
                continue
            states = [view.state for view in views if view.replica.model == spec.name]
            best = next((word for state, word in reversed(words.items()) if state in states), None)
            told.append(RepositoryModel(name=spec.name, state=best or "UNAVAILABLE"))
        return json_response(told)

    # Gateways' and SGLang's.

    async def _alive(self, http: web.Request) -> web.Response:
        return json_response(Ready())

    async def _ready(self, http: web.Request) -> web.Response:
        if not any(view.state is ReplicaState.SERVING for view in await self._views(http)):
            raise RequestError("service_unavailable", "no model is up", retry_after_s=1)
        return json_response(Ready())

    async def _model_info(self, http: web.Request) -> web.Response:
        spec = self._asked(http)
        return json_response(
            ModelInfo(
                model_path=spec.path,
                tokenizer_path=spec.tokenizer_path,
                is_generation=not spec.embedding,
                max_model_len=spec.context_length,
            )
        )

    async def _server_info(self, http: web.Request) -> web.Response:
        snapshot = seen(http, await self._relay.snapshot())
        return json_response(
            ServerInfo(
                version=chimera.__version__,
                policy=snapshot.policy,
                local=snapshot.local,
                models=[spec.name for spec in snapshot.models],
                gpus=len(snapshot.gpus),
            )
        )

    def _asked(self, http: web.Request) -> ModelSpec:
        spec = self._catalogue.resolve(http.query.get("model"), http[GUEST].key)
        http[GUEST].require(spec.name)
        return spec

    async def _views(self, http: web.Request) -> tuple[ReplicaView, ...]:
        return seen(http, await self._relay.snapshot()).replicas


def _process(spec: ModelSpec, view: ReplicaView) -> Process:
    size = spec.weight_bytes * spec.tp_size + spec.kv_bytes(view.kv_tokens) * spec.tp_size
    details = ProcessDetails(family=spec.architecture, quantization_level=spec.quantization or spec.dtype)
    return Process(
        name=spec.name, model=spec.name, size=size, size_vram=size, context_length=spec.context_length, details=details
    )
