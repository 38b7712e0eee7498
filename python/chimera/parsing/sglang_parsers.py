"""SGLang's parsers of tool calls and of thoughts, as a library. The only module of this room with SGLang in it.

Importing it takes seconds and hundreds of megabytes, so that is done once, by whoever first needs it, in a thread. Knows one
request's tools and the names of parsers; no model's state, no HTTP.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from chimera import standins

standins.install()

from sglang.srt.entrypoints.openai import protocol  # noqa: E402 - the stand-ins come first
from sglang.srt.function_call.function_call_parser import FunctionCallParser  # noqa: E402
from sglang.srt.function_call.json_array_parser import JsonArrayParser  # noqa: E402
from sglang.srt.function_call.utils import get_json_schema_constraint  # noqa: E402
from sglang.srt.parser import template_detection  # noqa: E402
from sglang.srt.parser.reasoning_parser import ReasoningParser  # noqa: E402

from chimera.core.parsers import AUTO  # noqa: E402
from chimera.errors import RequestError  # noqa: E402
from chimera.msg.stream import Grammar  # noqa: E402
from chimera.parsing.tokenizer import ModelTokenizer  # noqa: E402
from chimera.parsing.tools import CallPiece, Heard, Tool, Toolbox  # noqa: E402

_MADE_OF_SPECIAL_TOKENS = ("apertus2509", "gpt-oss", "inkling", "kimi_k3", "muse")
"""Parsers of formats whose every mark is a special token."""
_MARKS_CALLS = {"mistral": "[TOOL_CALLS"}
"""What begins the calls of parsers that, reading in small pieces, take a list's second call for something said."""

_log = logging.getLogger(__name__)


def tool_call_parsers() -> set[str]:
    return set(FunctionCallParser.ToolCallParserEnum)


def reasoning_parsers() -> set[str]:
    return set(ReasoningParser.DetectorMap)


class SglangHearing:
    """One request's: what form its answer must have for its tools, and an ear for each answer.

    `tool_parser` and `reasoning_parser` are SGLang's names, or `auto`, which looks at the model's chat template.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        toolbox: Toolbox | None,
        tool_parser: str,
        reasoning_parser: str | None,
        prompt_ids: Sequence[int],
    ) -> None:
        self._tools = [] if toolbox is None else [_sglangs(tool) for tool in toolbox.tools]
        self._tool_parser = self._choose_tool_parser(tokenizer, toolbox, tool_parser)
        if reasoning_parser == AUTO:
            reasoning_parser = _guess(tokenizer, template_detection.REASONING_PARSER_RULES)
        self._reasoning_parser = reasoning_parser
        self._in_thought, self._marks_are_special = self._look_at_thoughts(tokenizer, prompt_ids)
        self.form = None if toolbox is None else self._form(toolbox)
        self._native = toolbox is None or self._writes_calls_its_own_way(toolbox)

    @property
    def needs_special_tokens(self) -> bool:
        """Marks of calls and thoughts may be tokens that no reader is shown otherwise."""
        return bool(self._tools) or self._marks_are_special

    def ear(self) -> _Ear:
        thoughts = None
        if self._reasoning_parser is not None and self._in_thought is not False:
            thoughts = ReasoningParser(self._reasoning_parser, stream_reasoning=True, force_reasoning=self._in_thought)
        if not self._tools:
            return _Ear(thoughts, None, [])
        if not self._native or self._tool_parser is None:
            return _Ear(thoughts, JsonArrayParser(), self._tools)
        kind = _Patient if self._tool_parser in _MARKS_CALLS else FunctionCallParser
        return _Ear(thoughts, kind(self._tools, self._tool_parser), self._tools)

    def _choose_tool_parser(self, tokenizer: ModelTokenizer, toolbox: Toolbox | None, wanted: str) -> str | None:
        if toolbox is None:
            return None
        found = _guess(tokenizer, template_detection.TOOL_CALL_PARSER_RULES) if wanted == AUTO else wanted
        if found is None and toolbox.choice == AUTO:
            told = "tools: how this model writes its calls is not known; the placement file may say it as tool_call_parser"
            raise RequestError("unsupported_parameter", told, param="tools")
        return found

    def _look_at_thoughts(self, tokenizer: ModelTokenizer, prompt_ids: Sequence[int]) -> tuple[bool | None, bool]:
        """Whether the chat template has begun a thought, or ended it (`None`: it says nothing, the parser knows best); and
        whether the marks around thoughts are special tokens."""
        if self._reasoning_parser is None:
            return None, False
        detector = ReasoningParser(self._reasoning_parser).detector
        begin, end = detector.think_start_token.strip(), detector.think_end_token.strip()
        special = bool(tokenizer.special_tokens & {begin, end}) or self._reasoning_parser in _MADE_OF_SPECIAL_TOKENS
        tail = tokenizer.decode(prompt_ids[-32:]).rstrip()
        if begin and tail.endswith(begin):
            return True, special
        return (False if end and tail.endswith(end) else None), special

    def _writes_calls_its_own_way(self, toolbox: Toolbox) -> bool:
        """Else as a JSON array, to which the form has held it."""
        if self._tool_parser is None:
            return False
        return toolbox.choice == AUTO or self.form is None or self.form.kind != "json_schema"

    def _form(self, toolbox: Toolbox) -> Grammar | None:
        choice: Any = toolbox.choice
        if choice == "named":
            choice = protocol.ToolChoice(function=protocol.ToolChoiceFuncName(name=toolbox.tools[0].name))
        constraint: Any = None
        if self._tool_parser is not None:
            parser = FunctionCallParser(self._tools, self._tool_parser)
            with contextlib.suppress(ValueError):  # schemas that contradict each other: without a form, then
                constraint = parser.get_structure_constraint(choice, parallel_tool_calls=toolbox.parallel)
            if constraint is None and getattr(parser.detector, "parses_required_natively", bool)():
                return None
        if constraint is None and choice != AUTO:
            constraint = ("json_schema", get_json_schema_constraint(self._tools, choice, toolbox.parallel))
        if constraint is None:
            return None
        kind, value = constraint
        if hasattr(value, "model_dump"):
            value = value.model_dump(by_alias=True)
        return Grammar("ebnf" if "ebnf" in kind else kind, value if isinstance(value, str) else json.dumps(value))


class _Patient(FunctionCallParser):  # type: ignore[misc]
    """Reads calls when the answer has ended, whole; what is said before them goes out at once."""

    def __init__(self, tools: list[Any], tool_parser: str) -> None:
        super().__init__(tools, tool_parser)
        self._name = tool_parser
        self._kept = ""

    def parse_stream_chunk(self, chunk_text: str) -> tuple[str, list[Any]]:
        text, mark = self._kept + chunk_text, _MARKS_CALLS[self._name]
        begins = next((at for at in range(len(text)) if mark.startswith(text[at : at + len(mark)])), len(text))
        self._kept = text[begins:]
        return text[:begins], []

    def parse_stream_end(self) -> tuple[str, list[Any]]:
        kept, self._kept = self._kept, ""
        found: tuple[str, list[Any]] = self.parse_non_stream(kept) if self.has_tool_call(kept) else (kept, [])
        return found


class _Ear:
    """One answer's."""

    def __init__(
        self, thoughts: ReasoningParser | None, calls: FunctionCallParser | JsonArrayParser | None, tools: list[Any]
    ) -> None:
        self._thoughts = thoughts
        self._calls = calls
        self._tools = tools
        self._deaf = False

    def feed(self, text: str) -> Heard:
        if self._deaf:
            return Heard(text)
        try:
            thought = ""
            if self._thoughts is not None:
                thought, text = (part or "" for part in self._thoughts.parse_stream_chunk(text))
            return self._sort(text, thought) if text else Heard(thought=thought)
        except Exception as fault:  # noqa: BLE001 - a library's parser and a model's text: whatever it raises, nothing is lost
            return self._give_up(text, fault)

    def finish(self) -> Heard:
        if self._deaf:
            return Heard()
        try:
            thought, text = "", ""
            if self._thoughts is not None and hasattr(self._thoughts.detector, "finish"):
                rest = self._thoughts.detector.finish()
                thought, text = rest.reasoning_text or "", rest.normal_text or ""
            heard = self._sort(text, thought) if text else Heard(thought=thought)
            said, items = "", []
            if isinstance(self._calls, FunctionCallParser) and hasattr(self._calls, "parse_stream_end"):
                said, items = self._calls.parse_stream_end()
            calls = (*heard.calls, *map(_piece, items), *self._unsaid())
            return Heard(heard.said + (said or ""), heard.thought, calls)
        except Exception as fault:  # noqa: BLE001 - as above
            return self._give_up("", fault)

    def whole(self, text: str) -> Heard:
        thought: str | None = ""
        if self._thoughts is not None:
            thought, said = self._thoughts.parse_non_stream(text)
            text = said or ""
        if isinstance(self._calls, JsonArrayParser):
            return Heard("", thought or "", tuple(_from_array(text))) if text else Heard(thought=thought or "")
        items: list[Any] = []
        if self._calls is not None and self._calls.has_tool_call(text):
            try:
                text, items = self._calls.parse_non_stream(text)
            except Exception as fault:  # noqa: BLE001 - as above
                self._give_up(text, fault)
        pieces = (CallPiece(number, item.name, item.parameters) for number, item in enumerate(items))
        return Heard(text.strip() if items else text, thought or "", tuple(pieces))

    def _sort(self, text: str, thought: str) -> Heard:
        """What is said from what is called."""
        if self._calls is None:
            return Heard(text, thought)
        if isinstance(self._calls, JsonArrayParser):
            result = self._calls.parse_streaming_increment(text, self._tools)
            said, items = "", result.calls  # the form leaves room for nothing but calls
        else:
            said, items = self._calls.parse_stream_chunk(text)
        return Heard(said or "", thought, tuple(map(_piece, items)))

    def _unsaid(self) -> list[CallPiece]:
        """Arguments that SGLang has read and not told."""
        detector = getattr(self._calls, "detector", self._calls)
        calls, told = getattr(detector, "prev_tool_call_arr", None), getattr(detector, "streamed_args_for_tool", None)
        if not calls or not told or len(calls) > len(told):
            return []
        wanted = calls[-1].get("arguments", {})
        written = wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False)
        said = told[len(calls) - 1]
        rest = written[len(said) :] if written.startswith(said) else ""
        return [CallPiece(len(calls) - 1, None, rest)] if rest else []

    def _give_up(self, text: str, fault: Exception) -> Heard:
        _log.warning("a parser gave up on an answer, the rest is shown as it came: %s: %s", type(fault).__name__, fault)
        self._deaf = True
        return Heard(text)


def _sglangs(tool: Tool) -> Any:
    function = protocol.Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return protocol.Tool(function=function)


def _piece(item: Any) -> CallPiece:
    return CallPiece(item.tool_index, item.name or None, item.parameters or "")


def _from_array(text: str) -> list[CallPiece]:
    try:
        calls = json.loads(text)
    except ValueError:  # cut off by its length
        return []
    calls = calls if isinstance(calls, list) else [calls]
    return [CallPiece(n, call["name"], json.dumps(call.get("parameters", {}))) for n, call in enumerate(calls)]


def _guess(tokenizer: ModelTokenizer, rules: Any) -> str | None:
    """By SGLang's rules about templates and vocabularies."""
    if tokenizer.template_source is None:
        return None
    always, toggle = template_detection.detect_reasoning_pattern(tokenizer.template_source)
    context = template_detection.TemplateDetectionContext(
        template=tokenizer.template_source, reasoning_config=toggle, force_reasoning=always, vocab=tokenizer.vocabulary
    )
    found: str | None = template_detection.match_rules(context, rules, "parser")
    return found
