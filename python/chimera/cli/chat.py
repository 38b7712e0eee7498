"""`chimera chat MODEL`: a conversation with a model of a running server, in the terminal.

Ctrl-C while the model speaks stops the answer and frees its engine; at the prompt, Ctrl-D ends the program. Knows the
server only by its HTTP API.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from typing import Any

from chimera.cli.server_url import DEFAULT_URL, ServerError, request


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name or alias; `chimera status` lists them")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("-m", "--message", metavar="TEXT", help="say this, print the answer, and leave")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens of one answer")
    parser.add_argument("--temperature", type=float, metavar="T")


def run(arguments: argparse.Namespace) -> int:
    settings = {
        "model": arguments.model,
        "stream": True,
        **({} if arguments.max_tokens is None else {"max_tokens": arguments.max_tokens}),
        **({} if arguments.temperature is None else {"temperature": arguments.temperature}),
    }
    conversation = Conversation(arguments.url, settings, arguments.system)
    if arguments.message is not None:
        return conversation.say(arguments.message)
    return _talk(conversation)


class Conversation:
    """What was said so far."""

    def __init__(self, url: str, settings: dict[str, Any], system: str | None) -> None:
        self._url = url
        self._settings = settings
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> int:
        """Print the answer as it comes. An answer that was stopped is remembered as far as it came; one that failed is not."""
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = []
        status = 0
        try:
            for piece in _answer(self._url, {**self._settings, "messages": messages}):
                print(piece, end="", flush=True)
                answer.append(piece)
        except KeyboardInterrupt:
            status = 130
            print(" …stopped", end="")
        finally:
            if answer or status:
                print()
        self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
        return status


def _talk(conversation: Conversation) -> int:
    with contextlib.suppress(ImportError):  # some builds of Python have no line editing
        import readline  # noqa: F401 - importing it gives `input` its line editing
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("  (Ctrl-D ends)")
            continue
        if not text:
            continue
        try:
            conversation.say(text)
        except ServerError as fault:  # one message that cannot be answered is not the end of the conversation
            print(fault, file=sys.stderr)


def _answer(url: str, body: dict[str, Any]) -> Iterator[str]:
    """The text of a streamed answer. Closing the connection, by leaving early, cancels the request."""
    with request(url, "POST", "/v1/chat/completions", body) as response:  # no bound: the model may have to be loaded
        for event in _events(response):
            if event == b"[DONE]":
                return
            chunk = json.loads(event)
            if "error" in chunk:
                raise ServerError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    yield text
        raise ServerError("the server ended the answer before it was whole")


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        for line in response:
            if line.startswith(b"data: "):
                yield line[len(b"data: ") :].rstrip(b"\n")
    except (OSError, http.client.HTTPException) as fault:
        raise ServerError(f"the connection broke: {fault!r}") from None
