"""What only a real engine shows: answers held to a form, calls that must be made, embeddings, biased tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import PATIENCE_S, house, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "fine": {"type": "boolean"}},
    "required": ["colour", "fine"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}} for name in ("paint", "look")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    entries: list[dict[str, Any]] = []
    for name, kind, more in (("m", "llama", {"tool_call_parser": "qwen25"}), ("e", "embedder", {})):
        make(MODELS[kind], folder / kind, seed=0)
        entries.append({"model_name": name, "model_path": str(folder / kind), "init_placements": [{"gpu_ids": [0]}], **more})
    (folder / "placement.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with house(folder / "placement.json", "--engine", "sglang", ready=False) as served:
        until(lambda: any("ready in" in line and "http" in line for line in served.said), "a ready server", 8 * PATIENCE_S)
        host, port = served.address
        with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="m", messages=HI, **{"max_tokens": 300, **more}).choices[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_keeps_to_its_schema(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    choice = ask(client, response_format=form, temperature=temperature)
    told = json.loads(choice.message.content)
    assert set(told) == {"colour", "fine"} and told["colour"] in ("red", "blue") and choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "pattern"), [({"regex": "(abc|def){3}"}, "(abc|def){3}"), ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no")]
)
def test_an_answer_keeps_to_other_forms(client: openai.OpenAI, form: dict[str, str], pattern: str) -> None:
    assert re.fullmatch(pattern, ask(client, extra_body=form).message.content)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}])
def test_a_schema_that_makes_no_sense_is_named_and_the_engine_lives(client: openai.OpenAI, schema: dict[str, str]) -> None:
    for _ in range(2):  # compiled, and remembered
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
        assert refused.value.param == "response_format"
        assert next(iter(schema.values())).strip("#/") in str(refused.value) and ".cc:" not in str(refused.value)
    assert ask(client, max_tokens=3).finish_reason == "length"


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"paint", "look"}), ({"type": "function", "function": {"name": "look"}}, {"look"})]
)
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    [call, *_] = ask(client, **asked).message.tool_calls
    assert call.function.name in names and set(json.loads(call.function.arguments)) == {"colour", "fine"}
    stream = client.chat.completions.create(model="m", messages=HI, max_tokens=300, stream=True, **asked)
    pieces = [piece for chunk in stream for piece in chunk.choices[0].delta.tool_calls or () if piece.index == 0]
    assert pieces[0].function.name in names
    assert set(json.loads("".join(piece.function.arguments or "" for piece in pieces))) == {"colour", "fine"}


def test_a_token_with_a_great_bias_is_all_that_is_said(client: openai.OpenAI, folder: Path) -> None:
    from tokenizers import Tokenizer

    token = Tokenizer.from_file(str(folder / "llama" / "tokenizer.json")).token_to_id("A")
    choice = ask(client, logit_bias={str(token): 100}, max_tokens=5, extra_body={"ignore_eos": True})
    assert choice.message.content == "AAAAA"


def test_an_embedding_is_the_one_that_transformers_computes(client: openai.OpenAI, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaModel

    texts = ["hello world", "what a fine day"]
    told = [entry.embedding for entry in client.embeddings.create(model="e", input=texts).data]
    reference = LlamaModel.from_pretrained(folder / "embedder")
    tokenizer = Tokenizer.from_file(str(folder / "embedder" / "tokenizer.json"))
    for text, embedding in zip(texts, told, strict=True):
        with torch.no_grad():
            hidden = reference(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1]
        expected = (hidden / hidden.norm()).tolist()
        assert math.dist(embedding, expected) < 1e-3
