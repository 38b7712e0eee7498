"""Every error's HTTP status and its shape: OpenAI's, and Anthropic's under `/v1/messages`. No one else knows an HTTP code."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec
from aiohttp import web

from chimera.errors import RequestError

_STATUS = {
    "bad_request": 400,
    "context_length_exceeded": 400,
    "unsupported_parameter": 400,
    "invalid_api_key": 401,
    "permission_denied": 403,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "queue_timeout": 408,
    "body_too_large": 413,
    "queue_full": 429,
    "rate_limit_exceeded": 429,
    "slo_unattainable": 429,
    "internal_error": 500,
    "bad_gateway": 502,
    "worker_lost": 502,
    "agent_lost": 502,
    "model_not_loaded": 503,
    "model_unavailable": 503,
    "service_unavailable": 503,
    "gateway_timeout": 504,
}
_CODE = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_TYPE = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True):
    error: AnthropicErrorDetail
    type: str = "error"


def error_body(error: RequestError) -> bytes:
    """The JSON of an error, for an answer or for an event in a stream."""
    return msgspec.json.encode(ErrorBody(ErrorDetail(error.message, _type_of(_status_of(error)), error.param, error.code)))


def error_event(error: RequestError) -> bytes:
    """The event that ends a stream of OpenAI's or SGLang's kind."""
    return b"data: %b\n\n" % error_body(error)


def anthropic_error_body(error: RequestError) -> bytes:
    return _anthropic(_status_of(error), error.message)


def error_response(error: RequestError, path: str) -> web.Response:
    """In the shape that clients of the path expect."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["x-estimated-wait"] = f"{error.retry_after_s:.3f}"
    if error.queue_position is not None:
        headers["x-queue-position"] = str(error.queue_position)
    body = anthropic_error_body(error) if is_anthropic(path) else error_body(error)
    return web.Response(status=_status_of(error), body=body, content_type="application/json", headers=headers)


def refusal_response(refusal: web.HTTPException, path: str) -> web.Response:
    """What aiohttp itself refuses (a path, a method, a body too large), in the same shape."""
    status, told = refusal.status, _wording(refusal)
    code = _CODE.get(status, "bad_request" if status < 500 else "internal_error")
    body = msgspec.json.encode(ErrorBody(ErrorDetail(told, _type_of(status), None, code)))
    headers = {"Allow": refusal.headers["Allow"]} if "Allow" in refusal.headers else {}
    if is_anthropic(path):
        body = _anthropic(status, told)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def _anthropic(status: int, message: str) -> bytes:
    kind = _ANTHROPIC_TYPE.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return msgspec.json.encode(AnthropicErrorBody(AnthropicErrorDetail(kind, message)))


def _status_of(error: RequestError) -> int:
    return _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)


def _type_of(status: int) -> str:
    return _TYPE.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _wording(refusal: web.HTTPException) -> str:
    match refusal:
        case web.HTTPNotFound():
            return "no such path; the API is under /v1"
        case web.HTTPMethodNotAllowed():
            return f"{refusal.method} is not allowed here; allowed: {', '.join(sorted(refusal.allowed_methods))}"
        case web.HTTPRequestEntityTooLarge():
            return "the body is too large"
        case _:
            return refusal.reason
