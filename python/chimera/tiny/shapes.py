"""The tiny models: the configuration of each, and the tensors that follow from it.

Names and shapes are those of the checkpoints on the hub, so any engine that serves the big model loads the small one.
Knows no weight and no file. Every shape divides by two, for tensor parallelism; heads are as wide as kernels expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

Config: TypeAlias = dict[str, Any]

CONTEXT = 4096
HIDDEN = 256
SPREAD = 0.15
"""The standard deviation of random weights: wide enough that prompts and models lead to different, varied answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    fill: float | None = None
    """The constant it is filled with; `None` is random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    name: str
    purpose: str
    config: Config
    tensors: Callable[[Config], Iterator[Tensor]]
    vocabulary: str = "english"


def _config(architecture: str, model_type: str, **own: Any) -> Config:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": SPREAD,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | own


def _matrix(name: str, outputs: int, inputs: int) -> Tensor:
    return Tensor(name=f"{name}.weight", shape=(outputs, inputs))


def _norm(name: str, size: int = HIDDEN, fill: float = 1.0) -> Tensor:
    return Tensor(name=f"{name}.weight", shape=(size,), fill=fill)


def _mlp(name: str, intermediate: int) -> Iterator[Tensor]:
    yield _matrix(f"{name}.gate_proj", intermediate, HIDDEN)
    yield _matrix(f"{name}.up_proj", intermediate, HIDDEN)
    yield _matrix(f"{name}.down_proj", HIDDEN, intermediate)


def _experts(name: str, count: int, intermediate: int) -> Iterator[Tensor]:
    yield _matrix(f"{name}.gate", count, HIDDEN)
    for expert in range(count):
        yield from _mlp(f"{name}.experts.{expert}", intermediate)


def _attention(name: str, c: Config) -> Iterator[Tensor]:
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield _matrix(f"{name}.q_proj", queries, HIDDEN)
    yield _matrix(f"{name}.k_proj", keys, HIDDEN)
    yield _matrix(f"{name}.v_proj", keys, HIDDEN)
    yield _matrix(f"{name}.o_proj", HIDDEN, queries)


def _latent_attention(name: str, c: Config) -> Iterator[Tensor]:
    heads, nope, rope, value, rank = (
        c[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    yield _matrix(f"{name}.q_proj", heads * (nope + rope), HIDDEN)
    yield _matrix(f"{name}.kv_a_proj_with_mqa", rank + rope, HIDDEN)
    yield _norm(f"{name}.kv_a_layernorm", rank)
    yield _matrix(f"{name}.kv_b_proj", heads * (nope + value), rank)
    yield _matrix(f"{name}.o_proj", HIDDEN, heads * value)


def _trunk(
    c: Config, layer: Callable[[int, str, Config], Iterator[Tensor]], norm: float = 1.0, at: str = ""
) -> Iterator[Tensor]:
    """A decoder but for its head; a checkpoint for embeddings is no more."""
    yield _matrix(f"{at}embed_tokens", c["vocab_size"], HIDDEN)
    for index in range(c["num_hidden_layers"]):
        yield from layer(index, f"{at}layers.{index}", c)
    yield _norm(f"{at}norm", fill=norm)


def _frame(c: Config, layer: Callable[[int, str, Config], Iterator[Tensor]], norm: float = 1.0) -> Iterator[Tensor]:
    """What every decoder has around its layers."""
    yield from _trunk(c, layer, norm, "model.")
    if not c["tie_word_embeddings"]:
        yield _matrix("lm_head", c["vocab_size"], HIDDEN)


def _llama_layer(_index: int, name: str, c: Config) -> Iterator[Tensor]:
    yield from _attention(f"{name}.self_attn", c)
    yield from _mlp(f"{name}.mlp", c["intermediate_size"])
    yield _norm(f"{name}.input_layernorm")
    yield _norm(f"{name}.post_attention_layernorm")


def _qwen3_attention(name: str, c: Config) -> Iterator[Tensor]:
    yield from _attention(f"{name}.self_attn", c)
    yield _norm(f"{name}.self_attn.q_norm", c["head_dim"])
    yield _norm(f"{name}.self_attn.k_norm", c["head_dim"])
    yield _norm(f"{name}.input_layernorm")
    yield _norm(f"{name}.post_attention_layernorm")


def _qwen3_layer(_index: int, name: str, c: Config) -> Iterator[Tensor]:
    yield from _qwen3_attention(name, c)
    yield from _mlp(f"{name}.mlp", c["intermediate_size"])


def _qwen3_moe_layer(_index: int, name: str, c: Config) -> Iterator[Tensor]:
    yield from _qwen3_attention(name, c)
    yield from _experts(f"{name}.mlp", c["num_experts"], c["moe_intermediate_size"])


def _gemma2_layer(_index: int, name: str, c: Config) -> Iterator[Tensor]:
    yield from _attention(f"{name}.self_attn", c)
    yield from _mlp(f"{name}.mlp", c["intermediate_size"])
    # Gemma's norms multiply by 1 + weight. Embedding and head are one, so a layer that added little would leave the last
    # token the likeliest next one: the norms after the sublayers make them loud.
    yield _norm(f"{name}.input_layernorm", fill=0.0)
    yield _norm(f"{name}.post_attention_layernorm", fill=7.0)
    yield _norm(f"{name}.pre_feedforward_layernorm", fill=0.0)
    yield _norm(f"{name}.post_feedforward_layernorm", fill=7.0)


def _deepseek_layer(index: int, name: str, c: Config) -> Iterator[Tensor]:
    yield from _latent_attention(f"{name}.self_attn", c)
    if index < c["first_k_dense_replace"]:
        yield from _mlp(f"{name}.mlp", c["intermediate_size"])
    else:
        yield from _experts(f"{name}.mlp", c["n_routed_experts"], c["moe_intermediate_size"])
        yield from _mlp(f"{name}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
    yield _norm(f"{name}.input_layernorm")
    yield _norm(f"{name}.post_attention_layernorm")


def _llama(c: Config) -> Iterator[Tensor]:
    return _frame(c, _llama_layer)


def _embedder(c: Config) -> Iterator[Tensor]:
    return _trunk(c, _llama_layer)


def _qwen3(c: Config) -> Iterator[Tensor]:
    return _frame(c, _qwen3_layer)


def _qwen3_moe(c: Config) -> Iterator[Tensor]:
    return _frame(c, _qwen3_moe_layer)


def _gemma2(c: Config) -> Iterator[Tensor]:
    return _frame(c, _gemma2_layer, norm=0.0)


def _deepseek(c: Config) -> Iterator[Tensor]:
    return _frame(c, _deepseek_layer)


_GEMMA2 = {
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",  # SGLang reads this name, transformers the one above
    "query_pre_attn_scalar": 64,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": CONTEXT,
}
_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
_DEEPSEEK = {
    # One dense layer and one with experts. Kernels for latent attention are built for these head sizes and this rank.
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT // 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}

_FOUR_NARROW = {"num_hidden_layers": 4, "intermediate_size": 384}
_ALL_HEADS = {"num_key_value_heads": 4, "sliding_window": None}

MODELS = {
    model.name: model
    for model in (
        TinyModel(
            name="llama",
            purpose="Llama",
            config=_config("LlamaForCausalLM", "llama", mlp_bias=False),
            tensors=_llama,
        ),
        TinyModel(
            name="qwen3",
            purpose="Qwen3: grouped queries, normalised queries and keys",
            config=_config("Qwen3ForCausalLM", "qwen3", **_FOUR_NARROW),
            tensors=_qwen3,
        ),
        TinyModel(
            name="gemma2",
            purpose="Gemma 2: tied embedding, soft-capped logits",
            config=_config("Gemma2ForCausalLM", "gemma2", **_GEMMA2),
            tensors=_gemma2,
        ),
        TinyModel(
            name="mistral",
            purpose="Mistral, with a key and a value for every head",
            config=_config("MistralForCausalLM", "mistral", **_ALL_HEADS),
            tensors=_llama,
        ),
        TinyModel(
            name="moe",
            purpose="Qwen3-MoE: a mixture of eight experts",
            config=_config("Qwen3MoeForCausalLM", "qwen3_moe", **_MOE),
            tensors=_qwen3_moe,
        ),
        TinyModel(
            name="deepseek",
            purpose="DeepSeek-V2: latent attention (MLA), shared and routed experts",
            config=_config("DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK),
            tensors=_deepseek,
        ),
        TinyModel(
            name="embedder",
            purpose="A Llama without a head, for embeddings",
            config=_config("LlamaEmbeddingModel", "llama", mlp_bias=False),
            tensors=_embedder,
        ),
        TinyModel(
            name="llama-other",
            purpose="Llama with other weights and another, smaller vocabulary",
            config=_config("LlamaForCausalLM", "llama", mlp_bias=False, vocab_size=1536),
            tensors=_llama,
            vocabulary="other",
        ),
    )
}
