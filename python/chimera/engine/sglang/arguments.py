"""A model's entry as SGLang's own arguments. What an operator writes under `engine_args` passes through and wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chimera.core.model import ModelSpec

CPU_KV_TOKENS = 8192
CPU_CREDITS = 16


def server_arguments(model: ModelSpec, *, on_cpu: bool, kv_bytes: int | None) -> dict[str, Any]:
    """Keyword arguments of SGLang's `ServerArgs`."""
    arguments: dict[str, Any] = {
        "model_path": model.path,
        "tokenizer_path": model.tokenizer_path,
        "tp_size": model.tp_size,
        "dtype": model.dtype,
        "context_length": model.context_length,
        # Front-ends tokenise, detokenise and look for stop strings; a worker changes its model too often to build tokenizers.
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "log_level": "warning",
    }
    if model.quantization is not None:
        arguments["quantization"] = model.quantization
    if model.embedding:
        arguments["is_embedding"] = True
    if kv_bytes is not None:
        arguments["max_total_tokens"] = max(1, kv_bytes // model.kv_bytes_per_token)
    if on_cpu:
        arguments |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_cuda_graph": True,
            "max_running_requests": CPU_CREDITS,
        }
        arguments.setdefault("max_total_tokens", CPU_KV_TOKENS)
        if model.dtype == "auto" and checkpoint_dtype(Path(model.path)) == "float32":
            # SGLang's `auto` means float16 for such a checkpoint, which a CPU computes badly and slowly.
            arguments["dtype"] = "float32"
    return arguments | model.engine_args


def checkpoint_dtype(folder: Path) -> str:
    """What the checkpoint says its weights are, `float32` if it does not."""
    config = json.loads((folder / "config.json").read_text())
    dtype: str = config.get("dtype") or config.get("torch_dtype") or "float32"
    return dtype
