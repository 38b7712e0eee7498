"""Where a request does not say how its tokens are picked, its model's makers do, in the APIs in which SGLang heeds them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from chimera.core.model import Tastes
from chimera.msg.events import Outcome
from chimera.msg.stream import Sampling

from tests.server.conftest import Stage, until
from tests.server.rehearsal import model

HI = [{"role": "user", "content": "hi"}]
CHAT = ("/v1/chat/completions", {"messages": HI})
MESSAGES = ("/v1/messages", {"messages": HI, "max_tokens": 4})
RESPONSES = ("/v1/responses", {"input": "hi"})
TEXT = ("/v1/completions", {"prompt": "hi"})
NATIVE = ("/generate", {"text": "hi"})


async def picked(stage: Stage, path: str, body: dict[str, Any]) -> Sampling:
    """How the engine is told to pick for a model whose makers have tastes."""
    tastes = Tastes(temperature=0.25, top_p=0.5, top_k=20, min_p=0.125, repetition_penalty=1.5)
    stage.rehearsal.register(model("t", stage.run_dir / "m", tastes=tastes))
    await until(lambda: len(stage.front.catalogue.models) == 2)
    stage.rehearsal.hold = True
    waiting = asyncio.create_task(stage.post(path, {"model": "t", **body}))
    request, payload = await stage.rehearsal.next_ask()
    await stage.rehearsal.worker.say(request, "x", Outcome.STOP)
    status, _ = await waiting
    assert status == 200
    return payload.sampling


def words(sampling: Sampling) -> tuple[float, ...]:
    return (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty)


@pytest.mark.parametrize(("path", "body"), [CHAT, MESSAGES, RESPONSES])
async def test_a_chat_is_to_the_makers_taste(stage: Stage, path: str, body: dict[str, Any]) -> None:
    assert words(await picked(stage, path, body)) == (0.25, 0.5, 20, 0.125, 1.5)


@pytest.mark.parametrize(("path", "body"), [TEXT, NATIVE])
async def test_a_bare_text_is_not(stage: Stage, path: str, body: dict[str, Any]) -> None:
    assert words(await picked(stage, path, body)) == (1.0, 1.0, -1, 0.0, 1.0)


async def test_the_requests_own_word_goes_first_also_when_it_asks_for_nothing(stage: Stage) -> None:
    path, body = CHAT
    own = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    assert words(await picked(stage, path, body | own)) == (0.0, 1.0, -1, 0.0, 1.0)
