"""SGLang's own parsers behind our words: what real models write, whole and letter by letter.

Importing SGLang takes seconds and leaves no process as it was: `test_in_process.py` runs these in one of their own.
"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
from chimera.core import parsers
from chimera.errors import RequestError
from chimera.parsing import sglang_parsers
from chimera.parsing.chat_template import ChatTemplate
from chimera.parsing.sglang_parsers import SglangHearing
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.parsing.tools import Ear, Heard, Tool, Toolbox
from tokenizers import Tokenizer

from tests.parsing.vocabularies import byte_level

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SCHEMA = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
TOOLS = Toolbox(tools=(Tool(name="weather", parameters=SCHEMA), Tool(name="clock", parameters=SCHEMA)))
QWEN = '<tool_call>\n{{"name": "{0}", "arguments": {{"days": {1}}}}}\n</tool_call>'
CODER = "<tool_call>\n<function={0}>\n<parameter=days>\n{1}\n</parameter>\n</function>\n</tool_call>"
WRITTEN = {
    "qwen25": "\n".join((QWEN.format("weather", 3), QWEN.format("clock", 4))),
    "hermes": "\n".join((QWEN.format("weather", 3), QWEN.format("clock", 4))),
    "qwen3_coder": "\n".join((CODER.format("weather", 3), CODER.format("clock", 4))),
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"days": 3}}, {"name": "clock", "arguments": {"days": 4}}]',
    "llama3": '<|python_tag|>{"name": "weather", "parameters": {"days": 3}};{"name": "clock", "parameters": {"days": 4}}',
}


def tokenizer(template: str | None = None) -> ModelTokenizer:
    library: Tokenizer = byte_level()
    return ModelTokenizer(library, None if template is None else ChatTemplate(template, {}, path="m"))


def hearing(
    *, toolbox: Toolbox | None = None, tool_parser: str = "auto", reasoning: str | None = None, prompt: str = "hi", **more: Any
) -> SglangHearing:
    speaks = tokenizer(**more)
    return SglangHearing(
        speaks, toolbox=toolbox, tool_parser=tool_parser, reasoning_parser=reasoning, prompt_ids=speaks.encode(prompt)
    )


def streamed(ear: Ear, text: str) -> Heard:
    """Letter by letter, put together again as a client does."""
    pieces = [*(ear.feed(letter) for letter in text), ear.finish()]
    calls: dict[int, list[str]] = {}
    for piece in (call for heard in pieces for call in heard.calls):
        calls.setdefault(piece.index, []).extend([piece.name or "", piece.arguments])
    said, thought = "".join(heard.said for heard in pieces), "".join(heard.thought for heard in pieces)
    return Heard(said, thought, tuple(calls.items()))  # type: ignore[arg-type]


def names_and_arguments(heard: Heard) -> list[tuple[str, Any]]:
    if heard.calls and isinstance(heard.calls[0], tuple):  # streamed
        return [(words[0], json.loads("".join(words[1:]))) for _, words in heard.calls]  # type: ignore[misc]
    return [(call.name or "", json.loads(call.arguments)) for call in heard.calls]


@pytest.mark.skipif(importlib.metadata.version("sglang") != "0.5.20", reason="the names are those of 0.5.20")
def test_a_placement_file_knows_the_names_that_sglang_knows() -> None:
    assert sglang_parsers.tool_call_parsers() == parsers.TOOL_CALL_PARSERS
    assert sglang_parsers.reasoning_parsers() == parsers.REASONING_PARSERS


@pytest.mark.parametrize("name", WRITTEN)
def test_two_calls_are_heard_whole_and_letter_by_letter(name: str) -> None:
    listens = hearing(toolbox=TOOLS, tool_parser=name)
    expected = [("weather", {"days": 3}), ("clock", {"days": 4})]
    whole = listens.ear().whole(WRITTEN[name])
    assert names_and_arguments(whole) == expected and whole.said.strip() == ""
    assert names_and_arguments(streamed(listens.ear(), WRITTEN[name])) == expected
    assert listens.needs_special_tokens and listens.form is None


@pytest.mark.parametrize("name", WRITTEN)
def test_an_answer_without_a_call_is_what_it_says(name: str) -> None:
    listens = hearing(toolbox=TOOLS, tool_parser=name)
    assert listens.ear().whole("It is fine.") == Heard("It is fine.")
    assert streamed(listens.ear(), "It is fine.").said == "It is fine."


def test_a_thought_comes_before_what_is_said_and_called() -> None:
    listens = hearing(toolbox=TOOLS, tool_parser="qwen25", reasoning="qwen3")
    text = "<think>rain?</think>Let me look. " + WRITTEN["qwen25"]
    for heard in (listens.ear().whole(text), streamed(listens.ear(), text)):
        assert (heard.thought, heard.said.strip()) == ("rain?", "Let me look.")
        assert [name for name, _ in names_and_arguments(heard)] == ["weather", "clock"]


@pytest.mark.parametrize("prompt", ["hi<think>\n", "hi"])
def test_a_thought_that_the_template_has_begun_goes_on(prompt: str) -> None:
    begun = prompt != "hi"
    listens = hearing(reasoning="qwen3", prompt=prompt)
    text = "rain?</think>No." if begun else "<think>rain?</think>No."
    for heard in (listens.ear().whole(text), streamed(listens.ear(), text)):
        assert (heard.thought, heard.said) == ("rain?", "No.")


def test_a_template_that_has_ended_the_thought_leaves_none() -> None:
    listens = hearing(reasoning="deepseek-r1", prompt="hi<think>\n\n</think>\n\n")
    assert streamed(listens.ear(), "No.") == Heard("No.")


def test_how_calls_are_written_is_guessed_from_the_template() -> None:
    template = '{% if tools %}<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
    no_thoughts = "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    qwen = template + "<|im_start|>" + no_thoughts
    listens = hearing(toolbox=TOOLS, template=qwen)
    assert names_and_arguments(listens.ear().whole(WRITTEN["qwen25"]))[0] == ("weather", {"days": 3})
    with pytest.raises(RequestError) as refused:
        hearing(toolbox=TOOLS, template="plain")
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "tools")


@pytest.mark.parametrize("choice", ["required", "named"])
def test_without_a_parser_a_call_that_must_be_made_is_a_json_array(choice: Any) -> None:
    listens = hearing(toolbox=Toolbox(tools=TOOLS.tools[:1], choice=choice, parallel=False), template="plain")
    assert listens.form is not None and listens.form.kind == "json_schema"
    assert json.loads(listens.form.text)["maxItems"] == 1
    text = '[{"name": "weather", "parameters": {"days": 3}}]'
    for heard in (listens.ear().whole(text), streamed(listens.ear(), text)):
        assert names_and_arguments(heard) == [("weather", {"days": 3})] and heard.said == ""
    assert listens.ear().whole(text[:-5]) == Heard("")


def test_with_a_parser_it_is_held_to_the_models_own_way() -> None:
    listens = hearing(toolbox=Toolbox(tools=TOOLS.tools, choice="required"), tool_parser="qwen25")
    assert listens.form is not None and listens.form.kind == "structural_tag"
    assert len(names_and_arguments(listens.ear().whole(WRITTEN["qwen25"]))) == 2


def test_what_a_parser_cannot_bear_is_shown_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("planted")

    listens = hearing(toolbox=TOOLS, tool_parser="qwen25")
    ear = listens.ear()
    monkeypatch.setattr(sglang_parsers.FunctionCallParser, "parse_stream_chunk", fails)
    assert (ear.feed("It "), ear.feed("is."), ear.finish()) == (Heard("It "), Heard("is."), Heard())
