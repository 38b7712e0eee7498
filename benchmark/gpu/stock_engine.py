"""Stock SGLang with a random model in the shape of Llama-3-8B, in a process of its own; no hook of ours is in it.

    python -m benchmark.gpu.stock_engine CONFIG-FOLDER ENGINE-ARGUMENTS-AS-JSON

Says how long it took to stand, then answers orders: {"batch": 16, "prompt": 128, "new": 64} is a batch of random prompts.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.gpu.partner import Partner, orders, reply

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_server_warmup": True,
    "log_level": "info",
    "random_seed": 42,
}
ON_GPU: dict[str, Any] = {
    **COMMON,
    "attention_backend": "triton",
    "disable_prefill_cuda_graph": True,
    "cuda_graph_max_bs_decode": 32,
    "max_running_requests": 64,
    "max_total_tokens": 131072,
    "context_length": 16384,
    # Two of them share a device in one of the questions.
    "mem_fraction_static": 0.5,
}
ON_CPU: dict[str, Any] = {
    **COMMON,
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "dtype": "float32",
    "max_running_requests": 4,
    "max_total_tokens": 2048,
}


def start(folder: Path, *, rehearse: bool, **arguments: Any) -> Partner:
    """An engine in the making; its first word comes when it serves. `folder` takes its model and its log."""
    model = folder / "model"
    model.mkdir(parents=True)
    shape = {**SHAPE, **TINY, "head_dim": 16, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2} if rehearse else SHAPE
    (model / "config.json").write_text(json.dumps(shape))
    asked = {**(ON_CPU if rehearse else ON_GPU), **arguments}
    return Partner(__name__, str(model), json.dumps(asked), log=folder / "log")


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True)


def main() -> None:
    begin = time.monotonic()
    vocabulary: int = json.loads(Path(sys.argv[1], "config.json").read_text())["vocab_size"]
    engine: Any = None
    for order, answers in orders():
        if engine is None:
            from sglang.srt.entrypoints.engine import Engine

            imported = time.monotonic()
            engine = Engine(model_path=sys.argv[1], **json.loads(sys.argv[2]))
            reply(answers, import_s=imported - begin, engine_s=time.monotonic() - imported)
            continue
        dice = random.Random(order.get("seed"))
        prompts = [[dice.randrange(3, vocabulary) for _ in range(order["prompt"])] for _ in range(order["batch"])]
        asked = time.monotonic()
        outputs = engine.generate(
            input_ids=prompts,
            sampling_params={"max_new_tokens": order["new"], "temperature": 0, "ignore_eos": True},
        )
        reply(answers, s=time.monotonic() - asked, tokens=[output["output_ids"] for output in outputs])
    engine.shutdown()


# SGLang spawns processes that import this module again.
if __name__ == "__main__":
    main()
