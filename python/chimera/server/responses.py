"""`/v1/responses`: OpenAI's newer words for a chat, without memory between requests; what a client asks. Knows no socket."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from chimera.errors import RequestError
from chimera.msg.stream import Grammar
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import Hearing, Tool, Toolbox
from chimera.server import intake
from chimera.server.conversation import call_arguments, plain_text
from chimera.server.openai import json
from chimera.server.readers import Dialect
from chimera.server.responses_told import ResponsesDialect
from chimera.server.words import OurWords, Positive

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "top_logprobs": (0,),
    "include": ([], ["reasoning.encrypted_content"]),
    "prompt": (),
    "truncation": ("disabled",),
}
"""Known and not served, with the values that ask for nothing."""


class ResponsePart(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | None = None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """Something said before: a message, a call, what came of it."""

    type: str = "message"
    role: str = ""
    content: str | list[ResponsePart] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: str | list[ResponsePart] = ""


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    name: str


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    form: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class TextWish(msgspec.Struct, frozen=True, kw_only=True):
    format: TextFormat | None = None


class ReasoningWish(msgspec.Struct, frozen=True, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(OurWords, frozen=True, kw_only=True):
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    metadata: dict[str, str] | None = None
    text: TextWish | None = None
    reasoning: ReasoningWish | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    # Known, and not served.
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    top_logprobs: Any = None
    include: Any = None
    prompt: Any = None
    truncation: Any = None

    def check(self) -> None:
        intake.refuse_unsupported(self, _UNSUPPORTED)
        for n, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                told = f"tools[{n}]: a tool of type {tool.type!r} is not supported by this server"
                raise RequestError("unsupported_parameter", told, param=f"tools[{n}]")
            if not tool.name:
                raise RequestError("bad_request", f"tools[{n}]: name is missing", param=f"tools[{n}].name")

    @property
    def answer_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def prompt_field(self) -> str:
        return "input"

    @property
    def form(self) -> tuple[str, Grammar] | None:
        wish = TextFormat() if self.text is None or self.text.format is None else self.text.format
        match wish.type:
            case "text":
                return super().form
            case "json_object":
                return "text.format", Grammar("json_schema", '{"type": "object"}')
            case _ if wish.form is None:
                raise RequestError("bad_request", "text.format: schema is missing", param="text.format.schema")
            case _:
                return "text.format", Grammar("json_schema", json(wish.form).decode())

    @property
    def toolbox(self) -> Toolbox | None:
        tools = [
            Tool(name=tool.name, description=tool.description, parameters=tool.parameters, strict=bool(tool.strict))
            for tool in self.tools or ()
        ]
        choice, parallel = self.tool_choice, self.parallel_tool_calls is not False
        if isinstance(choice, FunctionChoice):
            return intake.toolbox(tools, "named", choice.name, parallel)
        return intake.toolbox(tools, choice, None, parallel)

    @property
    def tells_thoughts(self) -> bool:
        return True

    def prompts(self, tokenizer: ModelTokenizer) -> list[list[int]]:
        chat = _chat([Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input)
        if not chat:
            raise RequestError("bad_request", "input: there is none", param="input")
        if self.instructions:
            chat.insert(0, {"role": "system", "content": self.instructions})
        effort = None if self.reasoning is None else self.reasoning.effort
        return [tokenizer.encode_chat(chat, None if effort is None else {"reasoning_effort": effort}, self.toolbox)]

    def dialect(self, request_id: str, tokenizer: ModelTokenizer, hearing: Hearing | None) -> Dialect:
        return ResponsesDialect(self._echo(), request_id, hearing)

    def _echo(self) -> dict[str, Any]:
        """What of the request an answer repeats."""
        form = None if self.text is None else self.text.format
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "model": self.model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": self.reasoning or ReasoningWish(),
            "store": False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": {"type": "text"} if form is None else form},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
        }


def _chat(items: list[Item]) -> list[dict[str, Any]]:
    """Calls are part of the assistant's message that they follow."""
    chat: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        match item.type:
            case "message":
                if not item.role:
                    raise RequestError("bad_request", f"{where}: role is missing", param=f"{where}.role")
                role = "system" if item.role == "developer" else item.role
                chat.append({"role": role, "content": plain_text(item.content, f"{where}.content")})
            case "function_call":
                function = {"name": item.name, "arguments": call_arguments(item.arguments, f"{where}.arguments")}
                if not chat or chat[-1]["role"] != "assistant":
                    chat.append({"role": "assistant", "content": ""})
                call = {"id": item.call_id, "type": "function", "function": function}
                chat[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                said = plain_text(item.output, f"{where}.output")
                chat.append({"role": "tool", "tool_call_id": item.call_id, "content": said})
            case "reasoning":
                pass  # a model is not shown its earlier thoughts
            case _:
                told = f"{where}: an item of type {item.type!r} is not supported by this server"
                raise RequestError("unsupported_parameter", told, param=where)
    return chat
