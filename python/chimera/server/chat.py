"""`/v1/chat/completions`: OpenAI's words for a chat, with tools and with what a model thinks. Knows no socket."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from chimera.errors import RequestError
from chimera.msg.events import Outcome
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import CallPiece, Ear, Heard, Hearing, Tool, Toolbox
from chimera.server import intake
from chimera.server.answer import Answer
from chimera.server.conversation import call_arguments, plain_text
from chimera.server.errors import error_event
from chimera.server.logprobs import ChatLogprobs, Teller
from chimera.server.openai import MARK, Card, OpenAiRequest, Usage, json, reason
from chimera.server.readers import Dialect
from chimera.server.words import Alternatives, Positive


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: CalledFunction
    type: str = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionTold(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolTold(msgspec.Struct, frozen=True, kw_only=True):
    function: FunctionTold
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class ChatRequest(OpenAiRequest, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Positive | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = None
    """Whether what the model thinks comes as `reasoning_content`; true unless told otherwise."""
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[ToolTold] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # Known, and not served.
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def toolbox(self) -> Toolbox | None:
        tools = [
            Tool(
                name=told.function.name,
                description=told.function.description,
                parameters=told.function.parameters,
                strict=bool(told.function.strict),
            )
            for told in self.tools or ()
        ]
        choice, parallel = self.tool_choice, self.parallel_tool_calls is not False
        if isinstance(choice, NamedTool):
            return intake.toolbox(tools, "named", choice.function.name, parallel)
        return intake.toolbox(tools, choice, None, parallel)

    @property
    def tells_thoughts(self) -> bool:
        return self.separate_reasoning is not False

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("bad_request", "top_logprobs: needs logprobs", param="top_logprobs")

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        switches = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            switches.setdefault("reasoning_effort", self.reasoning_effort)
        return [tokenizer.encode_chat(self._plain_messages(), switches, self.toolbox)]

    def dialect(self, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> Dialect:
        return ChatDialect(self, request_id, tokenizer, hearing)

    def _plain_messages(self) -> list[dict[str, Any]]:
        """As chat templates take them: fields that were given, and the content of each as one text."""
        if not self.messages:
            raise RequestError("bad_request", "messages: there is none", param="messages")
        return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


def _plain_message(message: Message, where: str) -> dict[str, Any]:
    plain = msgspec.to_builtins(message)
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = plain_text(message.content, f"{where}.content")
    for n, call in enumerate(message.tool_calls or ()):
        arguments = call_arguments(call.function.arguments, f"{where}.tool_calls[{n}].function.arguments")
        plain["tool_calls"][n] = {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": arguments},
        }
    return plain  # type: ignore[no-any-return]


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ChatDialect:
    """How `/v1/chat/completions` answers."""

    def __init__(self, request: ChatRequest, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> None:
        self._card = Card(request, f"chatcmpl-{request_id}", "chat.completion.chunk")
        self._teller = None if request.alternatives is None else Teller(tokenizer, request.choices)
        self._hearing = hearing
        self._ears: list[Ear] = [] if hearing is None else [hearing.ear() for _ in range(request.choices)]
        self._called: set[int] = set()
        """Answers with a call in them."""
        self._frames = [
            self._card.event_frame(index, {"delta": {"content": MARK}, "logprobs": None}) for index in range(request.choices)
        ]
        self._unopened = set(range(request.choices))

    def piece(self, text: str, answer: Answer) -> bytes:
        index = answer.index
        if self._ears:
            event = self._heard(self._ears[index].feed(text), answer)
        elif self._teller is not None:
            event = self._card.event(index, {"delta": {"content": text}, "logprobs": self._teller.chat(answer)})
        else:
            head, tail = self._frames[index]
            event = b"%b%b%b" % (head, json(text), tail)
        return self._opening(index) + event if self._unopened else event

    def close(self, text: str, answer: Answer) -> bytes:
        last = self.piece(text, answer) if text else self._opening(answer.index)
        if self._ears:
            last += self._heard(self._ears[answer.index].finish(), answer)
        finish_reason = _reason(answer, answer.index in self._called)
        return last + self._card.event(answer.index, {"delta": {}, "logprobs": self._logprobs(answer)}, finish_reason)

    def done(self, answers: Sequence[Answer]) -> bytes:
        return self._card.closing(answers)

    def failure(self, error: RequestError) -> bytes:
        return error_event(error)

    def whole(self, texts: Sequence[str], answers: Sequence[Answer]) -> bytes:
        choices = [self._choice(text, answer) for text, answer in zip(texts, answers, strict=True)]
        return self._card.body("chat.completion", choices, answers)

    def _choice(self, text: str, answer: Answer) -> ChatChoice:
        heard = Heard(text) if self._hearing is None else self._hearing.ear().whole(text)
        message = AssistantMessage(
            role="assistant",
            content=None if heard.calls and not heard.said else heard.said,
            refusal=None,
            reasoning_content=heard.thought or UNSET,
            tool_calls=[_call(piece) for piece in heard.calls] or UNSET,
        )
        finish_reason = _reason(answer, bool(heard.calls))
        return ChatChoice(index=answer.index, message=message, logprobs=self._logprobs(answer), finish_reason=finish_reason)

    def _heard(self, heard: Heard, answer: Answer) -> bytes:
        deltas = []
        if heard.thought:
            deltas.append(Delta(reasoning_content=heard.thought))
        if heard.said:
            deltas.append(Delta(content=heard.said))
        if heard.calls:
            self._called.add(answer.index)
            deltas += [Delta(tool_calls=[_call_delta(piece)]) for piece in heard.calls]
        return b"".join(
            self._card.event(answer.index, {"delta": delta, "logprobs": self._logprobs(answer) if not n else None})
            for n, delta in enumerate(deltas)
        )

    def _logprobs(self, answer: Answer) -> ChatLogprobs | None:
        return None if self._teller is None else self._teller.chat(answer)

    def _opening(self, index: int) -> bytes:
        if index not in self._unopened:
            return b""
        self._unopened.discard(index)
        return self._card.event(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})


def _reason(answer: Answer, called: bool) -> str | None:
    finished = reason(answer)
    return "tool_calls" if called and finished == Outcome.STOP else finished


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(piece: CallPiece) -> ToolCall:
    return ToolCall(id=call_id(), function=CalledFunction(name=piece.name or "", arguments=piece.arguments))


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    if piece.name is None:
        return ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.arguments))
    function = FunctionDelta(name=piece.name, arguments=piece.arguments)
    return ToolCallDelta(index=piece.index, id=call_id(), type="function", function=function)
