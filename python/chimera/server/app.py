"""The routes: a client's request from its body to its answer. Knows HTTP and every dialect; no socket but the client's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
from aiohttp import web

from chimera.core.ledger_view import LedgerView
from chimera.core.model import ModelSpec
from chimera.core.replica import ReplicaState
from chimera.core.snapshot import Snapshot
from chimera.errors import RequestError
from chimera.msg.stream import Grammar, Sampling, StandingWanted
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server import embeddings, intake, openapi
from chimera.server.account import Account, Caller, client_id
from chimera.server.answer import Answer, Terms, new_request_id
from chimera.server.anthropic import CountRequest, MessagesRequest
from chimera.server.anthropic_told import AnthropicMessage, MessageEvent, TokenCount
from chimera.server.blinds import seen
from chimera.server.bodies import MAX_BODY_BYTES, json_response, read_body
from chimera.server.catalogue import Catalogue
from chimera.server.chat import ChatChunk, ChatCompletion, ChatRequest
from chimera.server.completions import CompletionObject, CompletionRequest
from chimera.server.dashboard import Dashboard
from chimera.server.desk import Desk
from chimera.server.embeddings import EmbeddingRequest, Embeddings, Encoded, EncodeRequest
from chimera.server.errors import error_response, refusal_response
from chimera.server.gate import GUEST, Gate, Guest
from chimera.server.intake import CompletionWish
from chimera.server.native import Generated, GenerateRequest
from chimera.server.observatory import Observatory
from chimera.server.operator import Operator
from chimera.server.peers import Peers
from chimera.server.readers import EventStream, FirstToken, WholeBody
from chimera.server.relay import Relay
from chimera.server.responses import ResponsesRequest
from chimera.server.responses_told import Response, ResponseEvent
from chimera.server.routes import ABOUT_A_MODEL, ANSWERED_BY_AN_ENGINE, Handler, Route

if TYPE_CHECKING:
    from chimera.parsing.sglang_parsers import SglangHearing

_PROBE_WITHIN_S = 20.0
_STANDING_EVERY_S = 0.25
_ASIDE_BYTES = 4096
"""Bodies longer than this are tokenised in a thread; shorter ones cost less than the way there and back."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


_count_decoder = msgspec.json.Decoder(CountRequest)


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chimera"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: Literal["ok"]
    model: str | None = None
    """Which made a token."""
    seconds: float | None = None


class App:
    """What every route needs."""

    def __init__(
        self,
        catalogue: Catalogue,
        desk: Desk,
        relay: Relay,
        gate: Gate,
        account: Account | None = None,
        records: Path | None = None,
    ) -> None:
        self._account = account
        self._gate = gate
        self._catalogue = catalogue
        self._desk = desk
        self._relay = relay
        self._operator = Operator(catalogue, relay)
        self._peers = Peers(catalogue, relay, self._operator)
        self._observatory = Observatory(catalogue, relay, records)
        self.dashboard = Dashboard(relay)
        self._document = b""

    def routes(self) -> list[Route]:
        mine = [
            self._completion("/v1/chat/completions", "A chat, as OpenAI's", ChatRequest, ChatCompletion, ChatChunk),
            self._completion(
                "/v1/completions", "A text to go on with, as OpenAI's", CompletionRequest, CompletionObject, CompletionObject
            ),
            self._completion(
                "/v1/responses", "A chat, as OpenAI's newer API; nothing is stored", ResponsesRequest, Response, ResponseEvent
            ),
            self._completion("/v1/messages", "A chat, as Anthropic's", MessagesRequest, AnthropicMessage, MessageEvent),
            Route(
                "POST /v1/messages/count_tokens",
                "How many tokens a prompt has, as Anthropic's",
                self._count_tokens,
                takes=CountRequest,
                gives=TokenCount,
                fails=ABOUT_A_MODEL,
            ),
            Route(
                "POST /v1/embeddings",
                "Embeddings of texts, as OpenAI's",
                self._embedding(EmbeddingRequest),
                takes=EmbeddingRequest,
                gives=Embeddings,
                fails=ANSWERED_BY_AN_ENGINE,
            ),
            Route(
                "POST /encode",
                "The embedding of a text, as SGLang's",
                self._embedding(EncodeRequest),
                takes=EncodeRequest,
                gives=Encoded,
                fails=ANSWERED_BY_AN_ENGINE,
            ),
            self._completion(
                "/generate",
                "A text to go on with, as SGLang's; `model` is needed where there are several",
                GenerateRequest,
                Generated | list[Generated],
                Generated,
            ),
            Route("GET /v1/models", "The models there are", self._models, gives=ModelList),
            Route("GET /v1/models/{name}", "One model", self._model, gives=ModelCard, fails=ABOUT_A_MODEL),
            # Load balancers have no key.
            Route("GET /health", "Whether requests are taken", self._health, gives=Health, open=True),
            Route(
                "GET /health_generate",
                "Whether a model makes tokens",
                self._health_generate,
                gives=Health,
                fails=ANSWERED_BY_AN_ENGINE,
            ),
            Route("GET /snapshot", "The state of the whole system", self._snapshot, gives=Snapshot, fails=(504,)),
            Route("GET /ledger", "Who holds how much of each GPU", self._ledger, gives=LedgerView, fails=(504,)),
            Route("GET /openapi.json", "This document", self._openapi, gives=dict[str, Any]),
        ]
        return mine + self._operator.routes() + self._peers.routes() + self._observatory.routes() + self.dashboard.routes()

    def build(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_in_one_shape, self._gate.middleware])
        app.on_response_prepare.append(self._gate.on_prepare)
        if self._account is not None:
            app.on_response_prepare.append(self._account.on_prepare)
        routes = self.routes()
        self._document = msgspec.json.encode(openapi.document(routes))
        self._gate.guard(routes)
        app.add_routes([route.definition() for route in routes])
        return app

    def _completion(self, path: str, what: str, takes: type[CompletionWish], gives: Any, streams: Any) -> Route:
        """A POST that is answered with tokens, at once or one after another."""
        handler = partial(self._complete, msgspec.json.Decoder(takes))
        return Route(f"POST {path}", what, handler, takes=takes, gives=gives, streams=streams, fails=ANSWERED_BY_AN_ENGINE)

    async def _complete(self, decoder: msgspec.json.Decoder[CompletionWish], http: web.Request) -> web.StreamResponse:
        arrived_s = time.monotonic()
        guest = http[GUEST]
        guest.admit()
        body = await read_body(http)
        wish = intake.decode(body, decoder)
        wish.check()
        stops = intake.stop_strings(wish.stops)
        spec = self._asked_for(wish.model, guest, embeds=False)
        tokenizer = await self._catalogue.tokenizer(spec)
        prompts = await _aside(len(body), partial(wish.prompts, tokenizer))
        hearing = await self._catalogue.hearing(spec, wish, tokenizer, prompts[0])
        terms = intake.terms(spec, wish, prompts, tokenizer, _form(wish, hearing))
        request_id = new_request_id()
        dialect = wish.dialect(request_id, tokenizer, hearing)
        reader = EventStream(dialect, len(terms)) if wish.stream else WholeBody(dialect, len(terms))
        special = hearing is not None and hearing.needs_special_tokens
        answers = [
            Answer(
                request_id=f"{request_id}-{index}" if index else request_id,
                model=spec.name,
                prompt_ids=prompts[index // wish.choices],
                terms=one,
                detokenizer=tokenizer.detokenizer(prompts[index // wish.choices], special=special),
                stops=stops,
                reader=reader,
                arrived_s=arrived_s,
                index=index,
            )
            for index, one in enumerate(terms)
        ]
        response = reader.respond(http, {"x-request-id": client_id(http) or request_id})
        answered = self._answered(http, guest, tokenizer, prompts, answers, response)
        if not (wish.stream and wish.send_loading_state):
            return await answered
        asking = asyncio.create_task(self._ask_for_standing(answers[0]))
        try:
            return await answered
        finally:
            asking.cancel()

    async def _ask_for_standing(self, answer: Answer) -> None:
        """Until an engine has begun with it; what control says is shown as it comes."""
        while answer.source is None:
            await asyncio.sleep(_STANDING_EVERY_S)
            self._relay.tell(StandingWanted(request_id=answer.attempt_id))

    def _embedding(self, kind: type[EmbeddingRequest | EncodeRequest]) -> Handler:
        return partial(self._embed, msgspec.json.Decoder(kind))

    async def _embed(
        self, decoder: msgspec.json.Decoder[EmbeddingRequest | EncodeRequest], http: web.Request
    ) -> web.StreamResponse:
        arrived_s = time.monotonic()
        guest = http[GUEST]
        guest.admit()
        body = await read_body(http)
        request = intake.decode(body, decoder)
        request.check()
        spec = self._asked_for(request.model, guest, embeds=True)
        tokenizer = await self._catalogue.tokenizer(spec)
        prompts = await _aside(len(body), partial(request.prompts, tokenizer))
        terms = embeddings.terms(spec, request, prompts)
        request_id = new_request_id()
        reader = WholeBody(request.dialect(request_id), len(terms))
        answers = [
            Answer(
                request_id=f"{request_id}-{index}" if index else request_id,
                model=spec.name,
                prompt_ids=prompts[index],
                terms=one,
                detokenizer=tokenizer.detokenizer(()),
                stops=(),
                reader=reader,
                arrived_s=arrived_s,
                index=index,
            )
            for index, one in enumerate(terms)
        ]
        response = reader.respond(http, {"x-request-id": client_id(http) or request_id})
        return await self._answered(http, guest, tokenizer, prompts, answers, response)

    def _asked_for(self, name: str | None, guest: Guest, *, embeds: bool) -> ModelSpec:
        spec = self._catalogue.resolve(name, guest.key)
        guest.require(spec.name)
        if spec.embedding != embeds:
            told = "makes embeddings; it generates no text" if spec.embedding else "generates text; it makes no embeddings"
            raise RequestError("unsupported_parameter", f"{spec.name} {told}", param="model")
        return spec

    async def _answered(
        self,
        http: web.Request,
        guest: Guest,
        tokenizer: ModelTokenizer,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        response: Awaitable[web.StreamResponse],
    ) -> web.StreamResponse:
        guest.charge(sum(map(len, prompts)))
        caller = Caller.of(http, guest.key.name)
        if self._account is not None:
            for answer in answers:
                self._account.open_book(answer, caller)
        try:
            return await self._wait_for(answers, response)
        finally:
            guest.charge(sum(len(answer.emitted) for answer in answers))
            if self._account is not None:
                for answer in answers:
                    self._account.close_book(answer, caller, tokenizer)

    async def _count_tokens(self, http: web.Request) -> web.Response:
        body = await read_body(http)
        request = intake.decode(body, _count_decoder)
        request.check()
        spec = self._catalogue.resolve(request.model, http[GUEST].key)
        http[GUEST].require(spec.name)
        tokenizer = await self._catalogue.tokenizer(spec)
        [prompt_ids] = await _aside(len(body), partial(request.prompts, tokenizer))
        return json_response({"input_tokens": len(prompt_ids)})

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
            ModelList(data=[_card(spec, since_s) for spec, since_s in self._catalogue.models if allows(spec.name)])
        )

    async def _model(self, http: web.Request) -> web.Response:
        spec = self._catalogue.resolve(http.match_info["name"], http[GUEST].key)
        http[GUEST].require(spec.name)
        since_s = next(since_s for known, since_s in self._catalogue.models if known is spec)
        return json_response(_card(spec, since_s))

    async def _health(self, http: web.Request) -> web.Response:
        """Whether requests can be taken; not whether a model is up."""
        if not self._relay.in_touch:
            raise RequestError("service_unavailable", "the server's control process is not there", retry_after_s=1)
        return json_response(Health(status="ok"))

    async def _health_generate(self, http: web.Request) -> web.Response:
        """One real token from a model that is up."""
        snapshot = seen(http, await self._relay.snapshot())
        up = (self._catalogue.resolve(v.replica.model) for v in snapshot.replicas if v.state is ReplicaState.SERVING)
        spec = next((spec for spec in up if not spec.embedding), None)
        if spec is None:
            raise RequestError("service_unavailable", "no model is up", retry_after_s=1)
        tokenizer = await self._catalogue.tokenizer(spec)
        token = FirstToken()
        prompt_ids = tokenizer.encode("a")
        answer = Answer(
            request_id=new_request_id(),
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
        return json_response(Health(status="ok", model=spec.name, seconds=answer.age_s))

    async def _snapshot(self, http: web.Request) -> web.Response:
        return json_response(seen(http, await self._relay.snapshot()))

    async def _openapi(self, http: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def _ledger(self, http: web.Request) -> web.Response:
        snapshot = seen(http, await self._relay.snapshot())
        return json_response(LedgerView(now_s=snapshot.now_s, gpus=snapshot.ledgers))


async def _aside(size: int, work: Callable[[], T]) -> T:
    """Long work in a thread: the streams of others do not wait for it."""
    return await asyncio.to_thread(work) if size > _ASIDE_BYTES else work()


def _form(wish: CompletionWish, hearing: SglangHearing | None) -> tuple[str, Grammar] | None:
    """What the client asks for goes first, but a tool that must be called has a form of its own."""
    form = wish.form
    if form is not None and wish.toolbox is not None and wish.toolbox.choice != "auto":
        raise RequestError("bad_request", f"{form[0]}: cannot be kept by a call, which tool_choice asks for", param=form[0])
    if form is not None or hearing is None or hearing.form is None:
        return form
    return "tools", hearing.form


def _card(spec: ModelSpec, since_s: int) -> ModelCard:
    return ModelCard(id=spec.name, created=since_s, root=spec.path, max_model_len=spec.context_length)


@web.middleware
async def _in_one_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error, request.path)
    except web.HTTPException as refusal:
        return refusal_response(refusal, request.path)
    except ConnectionError:  # the client left while we wrote: this goes nowhere, and aiohttp does not log it as a fault of ours
        return web.Response(status=499)
    except Exception:  # noqa: BLE001 - the outermost frame of one request; the others, and the process, go on
        _log.exception("fault while answering %s %s", request.method, request.path)
        mistake = RequestError("internal_error", "the server made a mistake; its log has the details")
        return error_response(mistake, request.path)
