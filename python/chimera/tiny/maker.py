"""Writes a tiny model as a checkpoint folder: the same seed writes the same bytes. Knows files, not architectures."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from chimera.errors import ConfigError
from chimera.tiny import vocabulary
from chimera.tiny.shapes import CONTEXT, SPREAD, Tensor, TinyModel

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Weights: TypeAlias = dict[str, Values]

_TITLE = "# A tiny model made by `chimera models make`"
"""The first line of each folder's README.md, by which the maker knows a folder that it may write over."""


def make(model: TinyModel, folder: Path, seed: int) -> int:
    """The checkpoint of `model` in `folder`; answers its number of parameters. Leaves folders it did not make alone."""
    _claim(folder)
    tokenizer = _tokenizer(model.vocabulary, model.config["vocab_size"], seed)
    weights = _weights(model, vocabulary.unspoken(tokenizer), seed)
    _write_json(folder / "config.json", model.config)
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_weights(folder / "model.safetensors", weights)
    parameters = sum(weight.size for weight in weights.values())
    (folder / "README.md").write_text(_readme(model, parameters, seed))
    return parameters


def _claim(folder: Path) -> None:
    readme = folder / "README.md"
    ours = readme.is_file() and readme.read_text(errors="replace").startswith(_TITLE)
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        hint = "name another directory, or move it away"
        raise ConfigError.single(str(folder), "holds something that `chimera models make` did not make", hint=hint)
    folder.mkdir(parents=True, exist_ok=True)
    # First of all, so that a run cut short leaves a folder that the next one may write over.
    readme.write_text(_TITLE + "\n\nUnfinished: make it again.\n")


@cache
def _tokenizer(name: str, size: int, seed: int) -> Tokenizer:
    return vocabulary.train(name, size, seed)


def _weights(model: TinyModel, unspoken: list[int], seed: int) -> Weights:
    weights = {tensor.name: _values(tensor, f"{model.name}/{seed}/{tensor.name}") for tensor in model.tensors(model.config)}
    head = weights.get("lm_head.weight", weights.get("model.embed_tokens.weight"))
    if head is not None:
        # Their logit is always zero, and thousands of others vie to be higher: answers are made of whole, readable words.
        head[unspoken] = 0.0
    return weights


def _values(tensor: Tensor, seed: str) -> Values:
    if tensor.fill is not None:
        return np.full(tensor.shape, tensor.fill, np.float32)
    # The old generator on purpose: numpy promises that its stream never changes.
    dice = np.random.RandomState(zlib.crc32(seed.encode()))
    return (dice.standard_normal(tensor.shape) * SPREAD).astype(np.float32)


def _write_weights(path: Path, weights: Weights) -> None:
    # Renamed into place: a server that has the old file mapped keeps it, instead of dying of a truncated one.
    part = path.with_suffix(".part")
    save_file(weights, part, metadata={"format": "pt"})
    part.replace(path)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = [tokenizer.token_to_id(token) for token in (vocabulary.EOS, vocabulary.TURN_END)]
    return {"bos_token_id": tokenizer.token_to_id(vocabulary.BOS), "eos_token_id": ends, "pad_token_id": 2}


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.BOS,
        "eos_token": vocabulary.EOS,
        "pad_token": vocabulary.PAD,
        "additional_special_tokens": [vocabulary.TURN, vocabulary.TURN_END],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": vocabulary.CHAT_TEMPLATE,
    }


def _readme(model: TinyModel, parameters: int, seed: int) -> str:
    return (
        f"{_TITLE}\n\n{model.purpose}: {parameters:,} parameters, context {CONTEXT}, seed {seed}.\n"
        "The weights are random and the answers gibberish. Made again by the same command, byte for byte.\n"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
