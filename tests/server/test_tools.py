"""Calls of tools and thoughts, in every API's words, whole and streamed.

The parser here is a plain one of the test's own: `<thought>`, `{name:arguments}`, and the rest is said. What SGLang's own
parsers make of real models' text is in `tests/parsing`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from chimera.core.model import ModelSpec
from chimera.msg.events import Outcome
from chimera.msg.stream import Grammar
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import CallPiece, Heard, Toolbox
from chimera.server import catalogue
from openai import AsyncOpenAI

from tests.server.conftest import Stage, until
from tests.server.rehearsal import model

SAID = ["<hm", ">well, ", "{wea", "ther:", "[7]}", "{clock:1}"]
"""As it comes, step by step."""
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("weather", "clock")
]
HI: Any = [{"role": "user", "content": "hi"}]


class PlainEar:
    def __init__(self) -> None:
        self._mode = ""
        self._calls = -1

    def feed(self, text: str) -> Heard:
        said, thought, calls = "", "", []
        for letter in text:
            match self._mode, letter:
                case "", "<" | "{":
                    self._mode = letter
                    if letter == "{":
                        self._calls += 1
                        self._name = ""
                case "<", ">":
                    self._mode = ""
                case "<", _:
                    thought += letter
                case "{", ":":
                    self._mode = ":"
                    calls.append(CallPiece(self._calls, self._name, ""))
                case "{", _:
                    self._name += letter
                case ":", "}":
                    self._mode = ""
                case ":", _:
                    calls.append(CallPiece(self._calls, None, letter))
                case _:
                    said += letter
        return Heard(said, thought, tuple(calls))

    def finish(self) -> Heard:
        return Heard()

    def whole(self, text: str) -> Heard:
        heard = self.feed(text)
        named = {piece.index: piece.name for piece in heard.calls if piece.name}
        calls = (
            CallPiece(n, name, "".join(piece.arguments for piece in heard.calls if piece.index == n))
            for n, name in named.items()
        )
        return Heard(heard.said, heard.thought, tuple(calls))


class PlainHearing:
    needs_special_tokens = False

    def __init__(self, _: ModelTokenizer, *, toolbox: Toolbox | None, **others: Any) -> None:
        seen.append((toolbox, others))
        self.form = None if toolbox is None or toolbox.choice == "auto" else Grammar("json_schema", "calls")

    def ear(self) -> PlainEar:
        return PlainEar()


seen: list[tuple[Toolbox | None, dict[str, Any]]] = []


@pytest.fixture
async def thinking(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage with a model that thinks and calls."""
    seen.clear()
    monkeypatch.setattr(catalogue, "_import_hearing", lambda: PlainHearing)
    spec: ModelSpec = model("m", stage.run_dir / "m", reasoning_parser="plain")
    stage.rehearsal.register(spec)
    stage.rehearsal.hold = True
    await until(lambda: stage.front.catalogue.models[0][0].reasoning_parser is not None)
    return stage


async def said(stage: Stage, pieces: Sequence[str] = SAID, outcome: Outcome = Outcome.STOP) -> Any:
    """The model says it, piece by piece, to whoever has asked; returns what it was asked."""
    request, payload = await stage.rehearsal.next_ask()
    for piece in pieces:
        await stage.rehearsal.worker.say(request, piece)
    await stage.rehearsal.worker.say(request, [], outcome)
    return payload


async def test_a_chat_tells_thoughts_text_and_calls_apart(thinking: Stage) -> None:
    async with AsyncOpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as client:
        asking = asyncio.create_task(client.chat.completions.create(model="m", messages=HI, tools=TOOLS))
        await said(thinking)
        [choice] = (await asking).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "well, "
    assert choice.message.model_extra == {"reasoning_content": "hm"}
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
        ("weather", "[7]"),
        ("clock", "1"),
    ]
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)


async def test_a_streamed_chat_tells_them_as_they_come(thinking: Stage) -> None:
    async with AsyncOpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as client:
        asking = asyncio.create_task(client.chat.completions.create(model="m", messages=HI, tools=TOOLS, stream=True))
        await said(thinking)
        chunks = [chunk.choices[0] async for chunk in await asking]
    thoughts = [chunk.delta.model_extra["reasoning_content"] for chunk in chunks if chunk.delta.model_extra]
    pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or ()]
    assert "".join(thoughts) == "hm" and "".join(chunk.delta.content or "" for chunk in chunks) == "well, "
    named = [(piece.index, piece.function.name) for piece in pieces if piece.function and piece.function.name]
    assert named == [(0, "weather"), (1, "clock")]
    for index, arguments in ((0, "[7]"), (1, "1")):
        assert "".join(p.function.arguments or "" for p in pieces if p.index == index and p.function) == arguments
    assert all((piece.id is None) == (piece.function is not None and piece.function.name is None) for piece in pieces)
    assert chunks[-1].finish_reason == "tool_calls"


async def test_an_answer_cut_off_is_cut_off_whatever_it_calls(thinking: Stage) -> None:
    asking = asyncio.create_task(thinking.post("/v1/chat/completions", {"model": "m", "messages": HI, "tools": TOOLS}))
    await said(thinking, outcome=Outcome.LENGTH)
    assert (await asking)[1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("choice", "offered", "form"),
    [
        ("auto", ["weather", "clock"], None),
        ("required", ["weather", "clock"], Grammar("json_schema", "calls")),
        ({"type": "function", "function": {"name": "clock"}}, ["clock"], Grammar("json_schema", "calls")),
    ],
)
async def test_what_must_be_called_is_held_to_it(thinking: Stage, choice: Any, offered: list[str], form: Any) -> None:
    ask = {"model": "m", "messages": HI, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    asking = asyncio.create_task(thinking.post("/v1/chat/completions", ask))
    payload = await said(thinking)
    assert (await asking)[0] == 200
    [(toolbox, _)] = seen
    assert toolbox is not None and [tool.name for tool in toolbox.tools] == offered and not toolbox.parallel
    assert payload.sampling.grammar == form


async def test_with_no_choice_a_model_is_told_of_no_tool(thinking: Stage) -> None:
    ask = {"model": "m", "messages": HI, "tools": TOOLS, "tool_choice": "none", "separate_reasoning": False}
    asking = asyncio.create_task(thinking.post("/v1/chat/completions", ask))
    await said(thinking)
    assert (await asking)[1]["choices"][0]["message"]["content"] == "".join(SAID)
    assert seen == []


async def test_what_came_of_a_call_is_shown_to_the_model(thinking: Stage) -> None:
    (thinking.run_dir / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments.days }}{% endfor %}{% endfor %}"
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 3}'}}
    openais = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    blocks = [{"type": "text", "text": ""}, {"type": "tool_use", "id": "1", "name": "weather", "input": {"days": 3}}]
    result = [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "rain"}]}]
    anthropics = [*HI, {"role": "assistant", "content": blocks}, {"role": "user", "content": result}]
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"days": 3}'},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
    ]
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    offered = [{"name": tool["function"]["name"], "input_schema": {"type": "object"}} for tool in TOOLS]
    for path, ask in (
        ("/v1/chat/completions", {"messages": openais, "tools": TOOLS}),
        ("/v1/messages", {"messages": anthropics, "tools": offered, "max_tokens": 9}),
        ("/v1/responses", {"input": items, "tools": flat}),
    ):
        asking = asyncio.create_task(thinking.post(path, {"model": "m", **ask}))
        payload = await said(thinking, ["ok"])
        assert (await asking)[0] == 200
        shown = ModelTokenizer.load(thinking.run_dir / "m").decode(payload.input_ids)
        assert shown == "<user>hi<assistant>weather=3<tool>rain[weather][clock]", path


async def test_messages_are_blocks_of_thoughts_text_and_calls(thinking: Stage) -> None:
    ask: Any = {
        "model": "m",
        "max_tokens": 100,
        "messages": HI,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
    }
    async with AsyncAnthropic(base_url=thinking.url, api_key="none", max_retries=0) as client:
        asking = asyncio.create_task(client.messages.create(**ask))
        await said(thinking)
        whole = await asking

        async def streamed() -> Any:
            async with client.messages.stream(**ask) as stream:
                return await stream.get_final_message()

        asking = asyncio.create_task(streamed())
        await said(thinking)
        stream = await asking
    for message in (whole, stream):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        blocks: list[Any] = message.content
        assert (blocks[0].thinking, blocks[1].text) == ("hm", "well, ")
        assert [(call.name, call.input) for call in blocks[2:]] == [("weather", [7]), ("clock", 1)]
        assert message.stop_reason == "tool_use"


async def test_thoughts_that_were_not_asked_for_are_not_told_in_messages(thinking: Stage) -> None:
    asking = asyncio.create_task(thinking.post("/v1/messages", {"model": "m", "max_tokens": 9, "messages": HI}))
    await said(thinking, ["<hm>", "well"])
    assert [block["type"] for block in (await asking)[1]["content"]] == ["text"]


async def test_a_response_is_items_of_thoughts_text_and_calls(thinking: Stage) -> None:
    flat: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    async with AsyncOpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as client:
        asking = asyncio.create_task(client.responses.create(model="m", input="hi", tools=flat))
        await said(thinking)
        whole = await asking
        opening = asyncio.create_task(client.responses.create(model="m", input="hi", tools=flat, stream=True))
        await said(thinking)
        told: list[Any] = [event async for event in await opening]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    for response in (whole, told[-1].response):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        assert response.output_text == "well, "
        assert [item.arguments for item in response.output[2:]] == ["[7]", "1"]
    begun = [event.item.id for event in told if event.type == "response.output_item.added"]
    ended = [event.item.id for event in told if event.type == "response.output_item.done"]
    assert begun == ended == [item.id for item in told[-1].response.output]
    arguments = [event.delta for event in told if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(arguments[:-1])) == [7] and arguments[-1] == "1"


async def test_a_form_and_a_call_that_must_be_made_exclude_each_other(thinking: Stage) -> None:
    ask = {"model": "m", "messages": HI, "tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}
    status, body = await thinking.post("/v1/chat/completions", ask)
    assert (status, body["error"]["param"]) == (400, "response_format")
