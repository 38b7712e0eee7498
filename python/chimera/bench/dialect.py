"""What is sent and what comes back, in the words of the three APIs that a server may speak. Knows bytes of JSON, no socket."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from chimera.bench.record import Record

_encode = msgspec.json.Encoder().encode
_DONE = b"[DONE]"


class Dialect(Protocol):
    path: str

    def body(self, record: Record, prompt: str) -> bytes: ...

    def hear(self, event: bytes, record: Record, at_s: float) -> bool:
        """One event of the stream. Says whether it was the last."""


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: _Delta | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class Completions:
    """OpenAI's `/v1/completions`, and with `chat` its `/v1/chat/completions`. `ignore_eos` is SGLang's and vLLM's word."""

    def __init__(self, *, chat: bool = False, ignore_eos: bool = True, temperature: float = 0.0) -> None:
        self.path = "/v1/chat/completions" if chat else "/v1/completions"
        self._chat = chat
        self._more = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {})}

    def body(self, record: Record, prompt: str) -> bytes:
        said = {"messages": [{"role": "user", "content": prompt}]} if self._chat else {"prompt": prompt}
        return _encode(
            {
                "model": record.model,
                **said,
                "max_tokens": record.wanted_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._more,
            }
        )

    def hear(self, event: bytes, record: Record, at_s: float) -> bool:
        if event == _DONE:
            return True
        chunk = _chunk.decode(event)
        if chunk.error is not None:
            blame(record, chunk.error)
            return True
        if chunk.usage is not None:
            record.output_tokens = chunk.usage.completion_tokens
            record.prompt_tokens = chunk.usage.prompt_tokens or record.prompt_tokens
            record.cached_tokens = int((chunk.usage.prompt_tokens_details or {}).get("cached_tokens") or 0)
        for choice in chunk.choices:
            if choice.text or (choice.delta is not None and (choice.delta.content or choice.delta.reasoning_content)):
                note_piece(record, at_s)
        return False


class _Meta(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    e2e_latency: float | None = None


class _State(msgspec.Struct, frozen=True):
    text: str = ""
    meta_info: _Meta = _Meta()
    error: Any = None


_state = msgspec.json.Decoder(_State)


class Generate:
    """SGLang's own `/generate`. Its events carry the server's clock, so the server's TTFT is known for each request."""

    path = "/generate"

    def __init__(self, *, ignore_eos: bool = True, temperature: float = 0.0) -> None:
        self._sampling = {"temperature": temperature, "ignore_eos": ignore_eos}

    def body(self, record: Record, prompt: str) -> bytes:
        sampling = {**self._sampling, "max_new_tokens": record.wanted_tokens}
        return _encode({"model": record.model, "text": prompt, "sampling_params": sampling, "stream": True})

    def hear(self, event: bytes, record: Record, at_s: float) -> bool:
        if event == _DONE:
            return True
        state = _state.decode(event)
        if state.error is not None:
            blame(record, state.error)
            return True
        meta = state.meta_info
        if meta.completion_tokens > record.output_tokens and state.text:
            if record.first_token_s is None:
                record.server_ttft_s = meta.e2e_latency
            note_piece(record, at_s)
        record.output_tokens = meta.completion_tokens
        record.prompt_tokens = meta.prompt_tokens or record.prompt_tokens
        record.cached_tokens = meta.cached_tokens
        return False


def note_piece(record: Record, at_s: float) -> None:
    if record.first_token_s is None:
        record.first_token_s = at_s
    elif record.last_token_s is not None:
        record.pieces_s.append(round(at_s - record.last_token_s, 6))
    record.last_token_s = at_s


def blame(record: Record, error: Any) -> None:
    """The server's error, nested as OpenAI's or flat as SGLang's."""
    told = error if isinstance(error, dict) else {"message": str(error)}
    record.refusal = str(told.get("code") or told.get("type") or "error")
    record.error = str(told.get("message", ""))[:500]


def refused(record: Record, status: int, body: bytes) -> None:
    """An answer whose status is not 200."""
    record.status = status
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError:
        document = None
    if isinstance(document, dict):
        blame(record, document.get("error", document.get("detail", document)))
    else:
        blame(record, {"code": str(status), "message": body[:200].decode(errors="replace")})


def dialect_named(api: str, *, ignore_eos: bool = True, temperature: float = 0.0) -> Dialect:
    if api == "generate":
        return Generate(ignore_eos=ignore_eos, temperature=temperature)
    return Completions(chat=api == "chat", ignore_eos=ignore_eos, temperature=temperature)


APIS = ("completions", "chat", "generate")
