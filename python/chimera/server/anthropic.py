"""`/v1/messages` and its `count_tokens`: Anthropic's words for a chat; what a client asks. Knows no socket."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from chimera.errors import RequestError
from chimera.msg.stream import Grammar
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import Hearing, Tool, Toolbox
from chimera.server import intake
from chimera.server.anthropic_told import MessagesDialect
from chimera.server.conversation import plain_text
from chimera.server.openai import json
from chimera.server.readers import Dialect
from chimera.server.words import OurWords, Positive

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": ()}
"""Known and not served, with the values that ask for nothing."""


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of content: text, a thought, a call, or what came of one."""

    type: str
    text: str | None = None
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: str | list[InnerBlock] | None = None


class InnerBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of what came of a call."""

    type: str
    text: str | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolOffered(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolWish(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingWish(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    form: dict[str, Any] = msgspec.field(name="schema")


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a prompt is made of; all that `count_tokens` takes."""

    model: str
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[ToolOffered] | None = None
    tool_choice: ToolWish | None = None
    thinking: ThinkingWish | None = None

    def check(self) -> None:
        check(self.tools)

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [_prompt(self, tokenizer)]


class MessagesRequest(OurWords, frozen=True, kw_only=True):
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[ToolOffered] | None = None
    tool_choice: ToolWish | None = None
    thinking: ThinkingWish | None = None
    max_tokens: Positive
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    output_format: OutputFormat | None = None
    output_config: OutputConfig | None = None
    # Known, and not served.
    container: Any = None
    mcp_servers: Any = None

    def check(self) -> None:
        intake.refuse_unsupported(self, _UNSUPPORTED)
        check(self.tools)

    @property
    def stops(self) -> list[str] | None:
        return self.stop_sequences

    @property
    def answer_tokens(self) -> int:
        return self.max_tokens

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def form(self) -> tuple[str, Grammar] | None:
        wish = self.output_format or (None if self.output_config is None else self.output_config.format)
        if wish is None:
            return super().form
        field = "output_format" if self.output_format else "output_config.format"
        return field, Grammar("json_schema", json(wish.form).decode())

    @property
    def toolbox(self) -> Toolbox | None:
        return toolbox(self.tools, self.tool_choice)

    @property
    def tells_thoughts(self) -> bool:
        return True

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        return [_prompt(self, tokenizer)]

    def dialect(self, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> Dialect:
        return MessagesDialect(self.model, f"msg_{request_id}", hearing, tells_thoughts=_thinks(self.thinking))


def check(tools: list[ToolOffered] | None) -> None:
    for n, tool in enumerate(tools or ()):
        if tool.type not in (None, "custom"):
            told = f"tools[{n}]: a tool of type {tool.type!r} is not supported by this server"
            raise RequestError("unsupported_parameter", told, param=f"tools[{n}]")


def toolbox(tools: list[ToolOffered] | None, wish: ToolWish | None) -> Toolbox | None:
    offered = [
        Tool(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=bool(tool.strict))
        for tool in tools or ()
    ]
    if wish is None:
        return intake.toolbox(offered, None, None, parallel=True)
    choices: dict[str, Literal["none", "auto", "required", "named"]]
    choices = {"none": "none", "auto": "auto", "any": "required", "tool": "named"}
    return intake.toolbox(offered, choices[wish.type], wish.name, parallel=not wish.disable_parallel_tool_use)


def _thinks(wish: ThinkingWish | None) -> bool:
    return wish is not None and wish.type != "disabled"


def _prompt(request: CountRequest | MessagesRequest, tokenizer: ModelTokenizer) -> list[int]:
    if not request.messages:
        raise RequestError("bad_request", "messages: there is none", param="messages")
    chat: list[dict[str, Any]] = []
    if request.system:
        chat.append({"role": "system", "content": plain_text(request.system, "system")})
    for i, turn in enumerate(request.messages):
        chat += _said(turn, f"messages[{i}].content")
    # What hybrid models call their switch; a template that has none ignores it.
    thinks = _thinks(request.thinking)
    switches = {"enable_thinking": thinks, "thinking": thinks}
    return tokenizer.encode_chat(chat, switches, toolbox(request.tools, request.tool_choice))


def _said(turn: Turn, where: str) -> list[dict[str, Any]]:
    """As chat templates take it: what came of calls are messages of their own, before what the user says to it."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    text: list[Block] = []
    for n, block in enumerate(turn.content):
        match block.type:
            case "tool_result":
                said = plain_text(block.content, f"{where}[{n}].content")
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": said})
            case "tool_use":
                calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}})
            case "thinking" | "redacted_thinking":
                pass  # a model is not shown its earlier thoughts
            case _:
                text.append(block)
    if results and not text:
        return results
    message: dict[str, Any] = {"role": turn.role, "content": plain_text(text, where)}
    return [*results, {**message, "tool_calls": calls} if calls else message]
