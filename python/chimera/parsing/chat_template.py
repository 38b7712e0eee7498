"""Writes a chat as the one text that a model was trained on, with the template in the model's folder.

Owns the surroundings that Hugging Face templates count on (filters, globals, white space rules) in a sandbox: a template is
a program that came with a download. Knows no tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chimera.errors import ConfigError, RequestError


class ChatTemplate:
    """One model's template, compiled once."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, path: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as fault:
            raise ConfigError.single(
                path, f"the chat template does not compile: {fault.message}", where=f"line {fault.lineno}"
            ) from None
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The chat as text, up to where the assistant begins to speak. `extra` are the template's own switches."""
        words = {**(extra or {}), **self._special_tokens, "messages": messages, "tools": tools, "documents": None}
        try:
            return self._template.render(**words, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as fault:
            # Mostly the template's own verdict, through `raise_exception`: roles that must alternate, no system role, …
            raise RequestError(
                "bad_request", f"the model's chat template refuses the messages: {fault}", param="messages"
            ) from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationMark(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote, for training. Here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own spelling

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes `<` and `'` for HTML; no model was trained on that."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
