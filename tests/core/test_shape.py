"""What models weigh, held against published figures and against the tensors of real models."""

from collections.abc import Callable
from typing import Any

import pytest
from chimera.core.quantization import Quantization
from chimera.core.shape import ModelShape, Split, Weight, shape_of
from hypothesis import given, settings
from hypothesis import strategies as st

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
LLAMA_31_70B = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
LLAMA_32_1B = {
    **LLAMA_3_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    **LLAMA_3_8B,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
}
QWEN25_7B = {
    **LLAMA_3_8B,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN3_30B_A3B = {
    **QWEN3_8B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}
MISTRAL_7B = {
    **LLAMA_3_8B,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
}
MIXTRAL_8X7B = {
    **LLAMA_3_8B,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
}
GEMMA_2_9B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    **DEEPSEEK_V2_LITE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
}


@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [
        pytest.param(LLAMA_3_8B, 8_030_261_248, 131_072, id="Llama-3-8B"),
        pytest.param(LLAMA_31_70B, 70_553_706_496, 327_680, id="Llama-3.1-70B"),
        pytest.param(LLAMA_32_1B, 1_235_814_400, 32_768, id="Llama-3.2-1B"),
        pytest.param(QWEN3_8B, 8_190_735_360, 147_456, id="Qwen3-8B"),
        pytest.param(QWEN25_7B, 7_615_616_512, 57_344, id="Qwen2.5-7B"),
        pytest.param(QWEN3_30B_A3B, 30_532_122_624, 98_304, id="Qwen3-30B-A3B"),
        pytest.param(MISTRAL_7B, 7_248_023_552, 131_072, id="Mistral-7B-v0.3"),
        pytest.param(MIXTRAL_8X7B, 46_702_792_704, 131_072, id="Mixtral-8x7B"),
        pytest.param(GEMMA_2_9B, 9_241_705_984, 344_064, id="Gemma-2-9B"),
        pytest.param(DEEPSEEK_V2_LITE, 15_706_484_224, 31_104, id="DeepSeek-V2-Lite"),
        pytest.param(DEEPSEEK_V3, 671_026_419_200, 70_272, id="DeepSeek-V3"),
    ],
)
def test_published_models_weigh_what_their_authors_say(config: dict[str, Any], parameters: int, kv_bytes: int) -> None:
    shape = shape_of(config)
    assert shape.parameters == parameters
    assert shape.kv_bytes_per_token() == kv_bytes


def test_unpadded_half_precision_weighs_two_bytes_a_parameter() -> None:
    assert shape_of(LLAMA_3_8B).weight_bytes() == 2 * 8_030_261_248
    assert shape_of(LLAMA_3_8B).weight_bytes(dtype="float32") == 4 * 8_030_261_248


def test_ranks_share_matrices_and_vocabulary_and_each_keep_the_norms() -> None:
    norms = (2 * 32 + 1) * 4096
    assert shape_of(LLAMA_3_8B).weight_bytes(tp_size=4) == 2 * ((8_030_261_248 - norms) // 4 + norms)


def test_more_ranks_than_kv_heads_hold_the_same_head() -> None:
    shape = shape_of(LLAMA_3_8B)
    assert shape.kv_bytes_per_token(tp_size=8) == 131_072 // 8
    assert shape.kv_bytes_per_token(tp_size=16) == 131_072 // 8
    assert Weight(name="k", out=8 * 128, into=4096, split=Split.KV_HEADS, unit=128).on_rank(16) == (128, 4096)


def test_every_rank_holds_the_whole_latent_of_mla() -> None:
    shape = shape_of(DEEPSEEK_V2_LITE)
    assert shape.kv_bytes_per_token(tp_size=8) == shape.kv_bytes_per_token(tp_size=1) == 27 * (512 + 64) * 2


def test_an_fp8_cache_halves_the_tokens_weight() -> None:
    assert shape_of(LLAMA_3_8B).kv_bytes_per_token(kv_dtype="fp8_e5m2") == 65_536
    assert shape_of(LLAMA_3_8B).kv_bytes_per_token(dtype="float32") == 262_144


def test_the_vocabulary_is_padded_to_64_rows_in_embedding_and_head() -> None:
    odd, even = shape_of({**LLAMA_3_8B, "vocab_size": 1001}), shape_of({**LLAMA_3_8B, "vocab_size": 1024})
    assert odd.weight_bytes() == even.weight_bytes()
    assert even.parameters - odd.parameters == 2 * 23 * 4096


def test_a_tied_head_is_counted_once() -> None:
    untied = shape_of({**LLAMA_32_1B, "tie_word_embeddings": False})
    assert untied.parameters - shape_of(LLAMA_32_1B).parameters == 128256 * 2048


def test_float32_checkpoints_are_served_in_half_precision_as_sglang_does() -> None:
    assert shape_of({**LLAMA_3_8B, "torch_dtype": "float32"}).dtype == "float16"
    assert shape_of(GEMMA_2_9B).dtype == "bfloat16"
    assert shape_of({**LLAMA_3_8B, "torch_dtype": None, "dtype": "bfloat16"}).dtype == "bfloat16"


def test_context_length_grows_by_a_rope_factor_unless_the_config_already_counts_it() -> None:
    assert shape_of(LLAMA_31_70B).context_length == 131_072
    assert shape_of(DEEPSEEK_V2_LITE).context_length == 163_840
    assert shape_of({**LLAMA_3_8B, "rope_scaling": {"type": "linear", "factor": 4.0}}).context_length == 32_768


def linear_elements(shape: ModelShape) -> int:
    return sum(weight.parameters for weight in shape.weights if weight.linear)


def test_block_fp8_counts_a_byte_a_weight_and_four_for_each_block() -> None:
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    plain, packed = shape_of(LLAMA_3_8B), shape_of({**LLAMA_3_8B, "quantization_config": stored})
    elements = linear_elements(plain)
    assert packed.weight_bytes() == plain.weight_bytes() - elements + elements // (128 * 128) * 4


def test_fp8_at_load_adds_one_scale_a_matrix() -> None:
    plain = shape_of(LLAMA_3_8B)
    assert plain.weight_bytes(quantization="fp8") == plain.weight_bytes() - linear_elements(plain) + 7 * 32 * 4


def test_awq_counts_scales_and_zeros_for_each_group() -> None:
    stored = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    plain, packed = shape_of(LLAMA_3_8B), shape_of({**LLAMA_3_8B, "quantization_config": stored})
    elements = linear_elements(plain)
    kept = plain.parameters - elements
    assert packed.weight_bytes(quantization="awq_marlin") == 2 * kept + elements // 2 + elements // 128 * (2 + 0.5)


def test_gptq_adds_an_order_of_columns() -> None:
    scheme = shape_of(
        {**LLAMA_3_8B, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    ).quantization
    assert scheme is not None
    qweight, qzeros, scales, g_idx = 4096 // 8 * 14336 * 4, 32 * 14336 // 8 * 4, 32 * 14336 * 2, 4096 * 4
    assert scheme.matrix_bytes(14336, 4096, 2) == qweight + qzeros + scales + g_idx


def test_compressed_tensors_keep_their_scales_in_the_models_type() -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    stored = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}, "ignore": ["lm_head"]}
    scheme = shape_of({**LLAMA_3_8B, "quantization_config": stored}).quantization
    assert scheme is not None
    assert scheme.matrix_bytes(14336, 4096, 2) == 14336 * 4096 // 2 + 14336 * 32 * 2 + 16


def test_modules_left_alone_keep_the_models_type() -> None:
    scheme = Quantization(method="fp8", bits=8, skipped=("mlp.gate", "model.layers.0", "re:.*k_proj$"))
    assert scheme.skips("model.layers.3.mlp.gate")
    assert not scheme.skips("model.layers.3.mlp.gate_proj")
    assert scheme.skips("model.layers.0.self_attn.q_proj")
    assert not scheme.skips("model.layers.01.self_attn.q_proj")
    assert scheme.skips("model.layers.7.self_attn.k_proj")


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**LLAMA_3_8B, "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        (without(LLAMA_3_8B, "architectures"), "architectures"),
        (without(LLAMA_3_8B, "hidden_size"), "hidden_size"),
        (without(QWEN3_8B, "head_dim"), "head_dim"),
        (without(MISTRAL_7B, "num_key_value_heads"), "num_key_value_heads"),
        (without(DEEPSEEK_V2_LITE, "kv_lora_rank"), "kv_lora_rank"),
        ({**LLAMA_3_8B, "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({**LLAMA_3_8B, "hidden_size": "4096"}, "hidden_size"),
        ({**LLAMA_3_8B, "vocab_size": True}, "vocab_size"),
        ({**LLAMA_3_8B, "torch_dtype": ["bfloat16"]}, "dtype"),
        ({**LLAMA_3_8B, "rope_scaling": {"factor": float("nan")}}, "rope_scaling.factor"),
        ({**QWEN3_30B_A3B, "mlp_only_layers": "none"}, "mlp_only_layers"),
        ({**LLAMA_3_8B, "quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({**LLAMA_3_8B, "quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
        ({**LLAMA_3_8B, "quantization_config": {"quant_method": "awq", "bits": 5, "group_size": 64}}, "5 bits"),
        ({**LLAMA_3_8B, "quantization_config": {"quant_method": "fp8", "ignored_layers": ["re:("]}}, "ignored_layers"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        shape_of(config)


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda shape: shape.weight_bytes(dtype="int7"), "int7"),
        (lambda shape: shape.kv_bytes_per_token(kv_dtype="fp3"), "fp3"),
        (lambda shape: shape.weight_bytes(quantization="awq"), "awq"),
        (lambda shape: shape.require_divisible(3), "self_attn.q_proj"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_by_name(ask: Callable[[ModelShape], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ask(shape_of(LLAMA_3_8B))


def test_ranks_divide_heads_or_share_them() -> None:
    for tp_size in (1, 2, 4, 8, 16, 32):
        shape_of(LLAMA_3_8B).require_divisible(tp_size)


ALL = [LLAMA_3_8B, QWEN25_7B, QWEN3_30B_A3B, MISTRAL_7B, MIXTRAL_8X7B, GEMMA_2_9B, DEEPSEEK_V2_LITE, DEEPSEEK_V3]
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(0, 3), max_size=2)
STORED = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["fp8", "awq", "gptq", "compressed-tensors"]) | ODD},
    optional={
        "bits": st.just(4) | ODD,
        "group_size": st.just(128) | ODD,
        "weight_block_size": st.just([128, 128]) | ODD,
        "config_groups": st.just({"g": {"weights": {"num_bits": 8, "strategy": "channel"}}}) | ODD,
        "ignore": st.just(["lm_head", "re:.*"]) | ODD,
    },
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_config_is_a_shape_or_a_value_error(data: st.DataObject) -> None:
    config = dict(data.draw(st.sampled_from(ALL)))
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        config[key] = data.draw(ODD)
    if data.draw(st.booleans()):
        config["quantization_config"] = data.draw(STORED | ODD)
    try:
        shape = shape_of(config)
    except ValueError:
        return
    assert shape.weight_bytes(tp_size=3) > 0
    assert shape.kv_bytes_per_token(tp_size=3) > 0


SMALL = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.slow  # importing transformers takes longer than all of the above
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 24}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen2", {}),
        ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]}),
        ("Qwen3", {"head_dim": 32}),
        ("Qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
        ("Qwen3Moe", {**MOE, "head_dim": 32, "decoder_sparse_step": 2}),
        ("Gemma", {"head_dim": 32}),
        ("Gemma2", {"head_dim": 32}),
        ("Gemma3", {"head_dim": 32}),
        ("DeepseekV2", {**MLA, "q_lora_rank": None}),
        ("DeepseekV2", {**MLA, "q_lora_rank": 40, "attention_bias": True}),
        ("DeepseekV3", {**MLA, "q_lora_rank": 40}),
    ],
)
def test_a_real_models_tensors_have_exactly_the_bytes_that_are_predicted(family: str, options: dict[str, Any]) -> None:
    import torch
    import transformers

    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**SMALL, **options})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    stored = {**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}
    if family == "DeepseekV3":
        stored["topk_method"] = "noaux_tc"  # in every published config.json; transformers takes it for granted

    tensors = {tensor.data_ptr() or name: tensor for name, tensor in model.named_parameters()}
    corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    held = [*tensors.values(), *corrections]
    shape = shape_of(stored)
    assert shape.parameters == sum(tensor.numel() for tensor in held)
    assert shape.weight_bytes(dtype="float32") == sum(tensor.numel() * tensor.element_size() for tensor in held)
