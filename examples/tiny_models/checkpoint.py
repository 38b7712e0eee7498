"""The files of a checkpoint, as Hugging Face's libraries and SGLang read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .lessons import Lesson

CONTEXT = 1024


def config_of(lesson: Lesson, tokenizer: Tokenizer) -> dict[str, Any]:
    begin, end, pad = range(3)
    return {
        "dtype": "bfloat16",
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": pad,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | lesson.config


def write(lesson: Lesson, tokenizer: Tokenizer, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(lesson, tokenizer)
    sampling = {"do_sample": True, "temperature": lesson.temperature} if lesson.temperature else {"do_sample": False}
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    begin, end, pad, *others = lesson.special
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ends | sampling)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": pad,
            "additional_special_tokens": others,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": lesson.chat_template,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    halves = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
