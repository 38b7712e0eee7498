"""The routes: a client's request from its body to its answer. Knows HTTP and every dialect; no socket but the client's."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from chimera.core.ledger_view import LedgerView
from chimera.core.model import ModelSpec
from chimera.core.replica import ReplicaState
from chimera.errors import RequestError
from chimera.msg.stream import Sampling
from chimera.server import intake
from chimera.server.answer import Answer, Terms
from chimera.server.anthropic import CountRequest, MessagesRequest
from chimera.server.bodies import MAX_BODY_BYTES, json_response, read_body
from chimera.server.catalogue import Catalogue
from chimera.server.desk import Desk
from chimera.server.errors import error_response, refusal_response
from chimera.server.gate import GUEST, Gate
from chimera.server.intake import CompletionWish
from chimera.server.native import GenerateRequest
from chimera.server.openai import ChatRequest, CompletionRequest
from chimera.server.operator import Operator
from chimera.server.readers import EventStream, FirstToken, WholeBody
from chimera.server.relay import Relay
from chimera.server.responses import ResponsesRequest

_PROBE_WITHIN_S = 20.0
_ASIDE_BYTES = 4096
"""Bodies longer than this are tokenised in a thread; shorter ones cost less than the way there and back."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str


_count_decoder = msgspec.json.Decoder(CountRequest)
_embedding_decoder = msgspec.json.Decoder(EmbeddingRequest)


class App:
    """What every route needs."""

    def __init__(self, catalogue: Catalogue, desk: Desk, relay: Relay, gate: Gate) -> None:
        self._gate = gate
        self._catalogue = catalogue
        self._desk = desk
        self._relay = relay

    def build(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_in_one_shape, self._gate.middleware])
        app.on_response_prepare.append(self._gate.on_prepare)
        app.add_routes(
            [
                web.post("/v1/chat/completions", partial(self._complete, msgspec.json.Decoder(ChatRequest))),
                web.post("/v1/completions", partial(self._complete, msgspec.json.Decoder(CompletionRequest))),
                web.post("/v1/responses", partial(self._complete, msgspec.json.Decoder(ResponsesRequest))),
                web.post("/v1/messages", partial(self._complete, msgspec.json.Decoder(MessagesRequest))),
                web.post("/v1/messages/count_tokens", self._count_tokens),
                web.post("/v1/embeddings", self._embeddings),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.post("/generate", partial(self._complete, msgspec.json.Decoder(GenerateRequest))),
                web.get("/health", self._health),
                web.get("/health_generate", self._health_generate),
                web.get("/snapshot", self._snapshot),
                web.get("/ledger", self._ledger),
            ]
        )
        app.add_routes(Operator(self._catalogue, self._relay).routes())
        return app

    async def _complete(self, decoder: msgspec.json.Decoder[CompletionWish], http: web.Request) -> web.StreamResponse:
        arrived_s = time.monotonic()
        guest = http[GUEST]
        guest.admit()
        body = await read_body(http)
        wish = intake.decode(body, decoder)
        wish.check()
        stops = intake.stop_strings(wish.stop)
        spec = self._catalogue.resolve(wish.model)
        guest.require(spec.name)
        tokenizer = await self._catalogue.tokenizer(spec)
        prompts = await _aside(len(body), partial(wish.prompts, tokenizer))
        terms = intake.terms(spec, wish, prompts)
        guest.charge(sum(map(len, prompts)))
        request_id = uuid.uuid4().hex
        dialect = wish.dialect(request_id, tokenizer)
        reader = EventStream(dialect, len(terms)) if wish.stream else WholeBody(dialect, len(terms))
        answers = []
        for index, one in enumerate(terms):
            prompt_ids = prompts[index // wish.choices]
            answers.append(
                Answer(
                    request_id=f"{request_id}-{index}" if index else request_id,
                    model=spec.name,
                    prompt_ids=prompt_ids,
                    terms=one,
                    detokenizer=tokenizer.detokenizer(prompt_ids),
                    stops=stops,
                    reader=reader,
                    arrived_s=arrived_s,
                    index=index,
                )
            )
        try:
            return await self._wait_for(answers, reader.respond(http, {"x-request-id": request_id}))
        finally:
            guest.charge(sum(len(answer.emitted) for answer in answers))

    async def _count_tokens(self, http: web.Request) -> web.Response:
        body = await read_body(http)
        request = intake.decode(body, _count_decoder)
        request.check()
        spec = self._catalogue.resolve(request.model)
        http[GUEST].require(spec.name)
        tokenizer = await self._catalogue.tokenizer(spec)
        [prompt_ids] = await _aside(len(body), partial(request.prompts, tokenizer))
        return json_response({"input_tokens": len(prompt_ids)})

    async def _embeddings(self, http: web.Request) -> web.Response:
        """No engine here makes any; the answer says so of the model that was asked."""
        request = intake.decode(await read_body(http), _embedding_decoder)
        spec = self._catalogue.resolve(request.model)
        raise RequestError("unsupported_parameter", f"{spec.name} generates text; it makes no embeddings", param="model")

    async def _wait_for(self, answers: Sequence[Answer], response: Awaitable[T]) -> T:
        """As long as the client does: aiohttp cancels this when it leaves, and then the answers are withdrawn."""
        for answer in answers:
            self._desk.submit(answer)
        try:
            return await response
        finally:
            for answer in answers:
                self._desk.withdraw(answer)

    # What there is, and how it does.

    async def _models(self, http: web.Request) -> web.Response:
        allows = http[GUEST].key.allows
        return json_response(
            {"object": "list", "data": [_card(spec, since_s) for spec, since_s in self._catalogue.models if allows(spec.name)]}
        )

    async def _model(self, http: web.Request) -> web.Response:
        spec = self._catalogue.resolve(http.match_info["name"])
        http[GUEST].require(spec.name)
        since_s = next(since_s for known, since_s in self._catalogue.models if known is spec)
        return json_response(_card(spec, since_s))

    async def _health(self, http: web.Request) -> web.Response:
        """Whether requests can be taken; not whether a model is up."""
        if not self._relay.in_touch:
            raise RequestError("service_unavailable", "the server's control process is not there", retry_after_s=1)
        return json_response({"status": "ok"})

    async def _health_generate(self, http: web.Request) -> web.Response:
        """One real token from a model that is up."""
        snapshot = await self._relay.snapshot()
        serving = next((view.replica for view in snapshot.replicas if view.state is ReplicaState.SERVING), None)
        if serving is None:
            raise RequestError("service_unavailable", "no model is up", retry_after_s=1)
        spec = self._catalogue.resolve(serving.model)
        tokenizer = await self._catalogue.tokenizer(spec)
        token = FirstToken()
        prompt_ids = tokenizer.encode("a")
        answer = Answer(
            request_id=uuid.uuid4().hex,
            model=spec.name,
            prompt_ids=prompt_ids,
            terms=Terms(sampling=Sampling(max_new_tokens=1, temperature=0.0)),
            detokenizer=tokenizer.detokenizer(prompt_ids),
            stops=(),
            reader=token,
            arrived_s=time.monotonic(),
        )
        try:
            async with asyncio.timeout(_PROBE_WITHIN_S):
                await self._wait_for([answer], token.came)
        except TimeoutError:
            raise RequestError("gateway_timeout", f"{spec.name} made no token within {_PROBE_WITHIN_S:g} s") from None
        return json_response({"status": "ok", "model": spec.name, "seconds": answer.age_s})

    async def _snapshot(self, http: web.Request) -> web.Response:
        return json_response(await self._relay.snapshot())

    async def _ledger(self, http: web.Request) -> web.Response:
        snapshot = await self._relay.snapshot()
        return json_response(LedgerView(now_s=snapshot.now_s, gpus=snapshot.ledgers))


async def _aside(size: int, work: Callable[[], T]) -> T:
    """Long work in a thread: the streams of others do not wait for it."""
    return await asyncio.to_thread(work) if size > _ASIDE_BYTES else work()


def _card(spec: ModelSpec, since_s: int) -> dict[str, object]:
    return {
        "id": spec.name,
        "object": "model",
        "created": since_s,
        "owned_by": "chimera",
        "root": spec.path,
        "parent": None,
        "max_model_len": spec.context_length,
    }


@web.middleware
async def _in_one_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error, request.path)
    except web.HTTPException as refusal:
        return refusal_response(refusal, request.path)
    except ConnectionError:  # the client left while we wrote; nobody is there to be answered
        raise
    except Exception:  # noqa: BLE001 - the outermost frame of one request; the others, and the process, go on
        _log.exception("fault while answering %s %s", request.method, request.path)
        mistake = RequestError("internal_error", "the server made a mistake; its log has the details")
        return error_response(mistake, request.path)
