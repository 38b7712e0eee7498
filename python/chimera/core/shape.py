"""What a model weighs, computed from its Hugging Face config: parameters, weight bytes and KV bytes on one rank.

A model is a list of weights, each with the way tensor parallelism splits it; every figure is a sum over that list.
Split, padding and replication follow SGLang. What an engine derives after loading (rotary tables, MLA's absorbed
projections) is not counted: that is known when its weight image has been built. Knows no file and no device.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from chimera.core.quantization import Quantization, quantization_of
from chimera.units import ceil_div

VOCABULARY_PADDING = 64
_ELEMENT_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_KV_BYTES = {**_ELEMENT_BYTES, "fp8_e4m3": 1, "fp8_e5m2": 1}
# Far above any model; it keeps a broken config from asking for a list without end.
_LARGEST_COUNT = 1 << 31
_MOST_LAYERS = 4096


class Split(enum.StrEnum):
    """What each rank of a tensor-parallel gang holds of a weight."""

    WHOLE = "whole"
    """Every rank holds all of it."""
    OUT = "out"
    """Rows are shared out, in runs of `unit`."""
    IN = "in"
    """Columns are shared out, in runs of `unit`."""
    KV_HEADS = "kv-heads"
    """As OUT; with more ranks than heads, several ranks hold the same head."""
    VOCABULARY = "vocabulary"
    """Rows are padded to a multiple of 64 and shared out."""


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the model, or `copies` of the same shape: the experts of a layer."""

    name: str
    out: int
    into: int = 1
    """Columns; a vector has one."""
    copies: int = 1
    split: Split = Split.WHOLE
    unit: int = 1
    linear: bool = False
    """Whether quantisation replaces it."""
    element_bytes: int | None = None
    """Set where the weight keeps its own type, whatever the model's."""

    @property
    def parameters(self) -> int:
        return self.copies * self.out * self.into

    def on_rank(self, tp_size: int) -> tuple[int, int]:
        """Rows and columns that one rank holds."""
        match self.split:
            case Split.WHOLE:
                return self.out, self.into
            case Split.IN:
                return self.out, _share(self.into, self.unit, tp_size)
            case Split.VOCABULARY:
                padded = ceil_div(self.out, VOCABULARY_PADDING) * VOCABULARY_PADDING
                return ceil_div(padded, tp_size), self.into
            case Split.OUT | Split.KV_HEADS:
                return _share(self.out, self.unit, tp_size), self.into

    def divides(self, tp_size: int) -> bool:
        """Whether ranks come out alike. A vocabulary always does: it is padded."""
        match self.split:
            case Split.WHOLE | Split.VOCABULARY:
                return True
            case Split.IN:
                return (self.into // self.unit) % tp_size == 0
            case Split.OUT:
                return (self.out // self.unit) % tp_size == 0
            case Split.KV_HEADS:
                heads = self.out // self.unit
                return heads % tp_size == 0 or tp_size % heads == 0


def _share(size: int, unit: int, tp_size: int) -> int:
    return ceil_div(size // unit, tp_size) * unit


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The measures of one model, whatever the machine it will run on."""

    architecture: str
    generates: bool = True
    """Else it has no head, and makes embeddings."""
    context_length: int
    dtype: str
    """What `auto` stands for: the checkpoint's type, halved where SGLang would halve it."""
    quantization: Quantization | None
    layers: int
    kv_heads: int
    """MLA counts as one head, which every rank holds."""
    kv_head_elements: int
    """What one token adds per layer and head: K and V, or MLA's latent with its rotary part."""
    weights: tuple[Weight, ...]

    @property
    def parameters(self) -> int:
        return sum(weight.parameters for weight in self.weights)

    def weight_bytes(self, tp_size: int = 1, dtype: str = "auto", quantization: str | None = None) -> int:
        """On one rank, padding, scales and zeros included."""
        element_bytes = _bytes_of(dtype, self.dtype, _ELEMENT_BYTES, "dtype")
        scheme = self._scheme(quantization)
        return sum(_bytes_on_rank(weight, tp_size, element_bytes, scheme) for weight in self.weights)

    def kv_bytes_per_token(self, tp_size: int = 1, kv_dtype: str = "auto", dtype: str = "auto") -> int:
        """On one rank, over all layers. Sliding-window layers count in full, as SGLang keeps them for these models."""
        model_dtype = self.dtype if dtype == "auto" else dtype
        element_bytes = _bytes_of(kv_dtype, model_dtype, _KV_BYTES, "kv_cache_dtype")
        return self.layers * ceil_div(self.kv_heads, tp_size) * self.kv_head_elements * element_bytes

    def divides(self, tp_size: int) -> bool:
        """Whether so many ranks come out alike."""
        return all(weight.divides(tp_size) for weight in self.weights)

    def require_divisible(self, tp_size: int) -> None:
        """ValueError that names the first weight which `tp_size` ranks cannot share."""
        for weight in self.weights:
            if not weight.divides(tp_size):
                shape = f"{weight.out} × {weight.into}"
                raise ValueError(f"tp_size {tp_size} does not divide {weight.name} ({shape}, in runs of {weight.unit})")

    def _scheme(self, quantization: str | None) -> Quantization | None:
        stored = self.quantization
        if quantization is None:
            return stored
        wanted = quantization.removesuffix("_marlin")
        if stored is None:
            if wanted != "fp8":
                raise ValueError(f"quantization {quantization!r} needs a checkpoint stored that way; only fp8 is made at load")
            return Quantization.fp8_at_load()
        if wanted != stored.method:
            raise ValueError(f"quantization {quantization!r} does not fit a checkpoint stored as {stored.method!r}")
        return stored


def _bytes_of(dtype: str, auto: str, known: Mapping[str, int], key: str) -> int:
    name = auto if dtype == "auto" else dtype
    if name not in known:
        raise ValueError(f"{key} {name!r} is not one of {', '.join(known)}")
    return known[name]


def _bytes_on_rank(weight: Weight, tp_size: int, element_bytes: int, scheme: Quantization | None) -> int:
    out, into = weight.on_rank(tp_size)
    if scheme is not None and weight.linear and not scheme.skips(weight.name):
        return weight.copies * scheme.matrix_bytes(out, into, element_bytes)
    return weight.copies * out * into * (weight.element_bytes or element_bytes)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """From the contents of config.json; ValueError names the key that is missing, wrong or unknown."""
    keys = _Keys(config)
    architecture = keys.architecture()
    traits = _ARCHITECTURES[architecture](keys)
    layers = keys.count("num_hidden_layers", most=_MOST_LAYERS)
    kv_heads, kv_head_elements = traits.kv(keys)
    return ModelShape(
        architecture=architecture,
        generates=traits.head,
        context_length=keys.context_length(),
        dtype=keys.dtype(),
        quantization=quantization_of(config),
        layers=layers,
        kv_heads=kv_heads,
        kv_head_elements=kv_head_elements,
        weights=tuple(_model(keys, traits, layers)),
    )


class _Keys:
    """A config.json whose values cannot be trusted: every read checks and names what it reads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def get(self, key: str) -> Any:
        return self._config.get(key)

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST_COUNT) -> int:
        value = self._config.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"missing key {key!r}")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{key!r} is {value!r}, not a whole number from {least} to {most}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key!r} is {value!r}, not true or false")
        return value

    def layer_numbers(self, key: str) -> frozenset[int]:
        value = self._config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
            raise ValueError(f"{key!r} is {value!r}, not a list of layer numbers")
        return frozenset(value)

    def architecture(self) -> str:
        names = self._config.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(f"'architectures' is {names!r}, not a list with one name")
        if names[0] not in _ARCHITECTURES:
            raise ValueError(f"unknown architecture {names[0]!r}; known are {', '.join(_ARCHITECTURES)}")
        return names[0]

    def dtype(self) -> str:
        value = self._config.get("dtype") or self._config.get("torch_dtype") or "float32"
        if not isinstance(value, str) or value not in _ELEMENT_BYTES:
            raise ValueError(f"'dtype' is {value!r}, not one of {', '.join(_ELEMENT_BYTES)}")
        if _ELEMENT_BYTES[value] == 4:  # SGLang's `auto` serves float32 checkpoints in half precision
            return "bfloat16" if str(self._config.get("model_type")).startswith("gemma") else "float16"
        return value

    def context_length(self) -> int:
        length = self.count("max_position_embeddings")
        scaling = self._config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise ValueError(f"'rope_scaling' is {scaling!r}, not a mapping")
        factor = scaling.get("factor", 1)
        already_scaled = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
        if already_scaled or factor is None:
            return length
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor <= 1024:
            raise ValueError(f"'rope_scaling.factor' is {factor!r}, not a number from 1 to 1024")
        return int(length * factor)

    @property
    def hidden(self) -> int:
        return self.count("hidden_size")

    @property
    def heads(self) -> int:
        return self.count("num_attention_heads")

    @property
    def head_dim(self) -> int:
        return self.count("head_dim", max(1, self.hidden // self.heads))


class _Traits(msgspec.Struct, frozen=True, kw_only=True):
    """In what one architecture differs from a plain Llama."""

    attention: Callable[[_Keys, str, _Traits], Iterator[Weight]]
    mlp: Callable[[_Keys, str, int, _Traits], Iterator[Weight]]
    kv: Callable[[_Keys], tuple[int, int]]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False
    """Whether the head shares the embedding when the config does not say."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    head: bool = True


def _model(keys: _Keys, traits: _Traits, layers: int) -> Iterator[Weight]:
    hidden, vocabulary = keys.hidden, keys.count("vocab_size")
    yield Weight(name="model.embed_tokens", out=vocabulary, into=hidden, split=Split.VOCABULARY)
    for number in range(layers):
        at = f"model.layers.{number}"
        yield from traits.attention(keys, f"{at}.self_attn", traits)
        yield from traits.mlp(keys, at, number, traits)
        for norm in traits.norms:
            yield Weight(name=f"{at}.{norm}", out=hidden)
    yield Weight(name="model.norm", out=hidden)
    if traits.head and not keys.flag("tie_word_embeddings", traits.tied):
        yield Weight(name="lm_head", out=vocabulary, into=hidden, split=Split.VOCABULARY)


def _linear(
    name: str, out: int, into: int, split: Split, *, unit: int = 1, bias: bool = False, copies: int = 1
) -> Iterator[Weight]:
    yield Weight(name=name, out=out, into=into, split=split, unit=unit, copies=copies, linear=True)
    if bias:  # a row-parallel bias is added once, so every rank holds all of it
        yield Weight(name=f"{name}.bias", out=out, split=Split.WHOLE if split is Split.IN else split, unit=unit, copies=copies)


def _grouped_attention(keys: _Keys, at: str, traits: _Traits) -> Iterator[Weight]:
    hidden, dim = keys.hidden, keys.head_dim
    query, cached = keys.heads * dim, _kv_heads(keys) * dim
    yield from _linear(f"{at}.q_proj", query, hidden, Split.OUT, unit=dim, bias=traits.qkv_bias)
    yield from _linear(f"{at}.k_proj", cached, hidden, Split.KV_HEADS, unit=dim, bias=traits.qkv_bias)
    yield from _linear(f"{at}.v_proj", cached, hidden, Split.KV_HEADS, unit=dim, bias=traits.qkv_bias)
    yield from _linear(f"{at}.o_proj", hidden, query, Split.IN, unit=dim, bias=traits.out_bias)
    if traits.qk_norm:
        yield Weight(name=f"{at}.q_norm", out=dim)
        yield Weight(name=f"{at}.k_norm", out=dim)


def _latent_attention(keys: _Keys, at: str, traits: _Traits) -> Iterator[Weight]:
    """MLA: the down-projections are whole on every rank, the up-projections split by head."""
    hidden, heads = keys.hidden, keys.heads
    latent, rotary = keys.count("kv_lora_rank"), keys.count("qk_rope_head_dim")
    plain, value = keys.count("qk_nope_head_dim"), keys.count("v_head_dim")
    query = plain + rotary
    query_rank = keys.count("q_lora_rank", 0)
    if query_rank:
        yield from _linear(f"{at}.q_a_proj", query_rank, hidden, Split.WHOLE, bias=traits.qkv_bias)
        yield Weight(name=f"{at}.q_a_layernorm", out=query_rank)
        yield from _linear(f"{at}.q_b_proj", heads * query, query_rank, Split.OUT, unit=query)
    else:
        yield from _linear(f"{at}.q_proj", heads * query, hidden, Split.OUT, unit=query)
    yield from _linear(f"{at}.kv_a_proj_with_mqa", latent + rotary, hidden, Split.WHOLE, bias=traits.qkv_bias)
    yield Weight(name=f"{at}.kv_a_layernorm", out=latent)
    yield from _linear(f"{at}.kv_b_proj", heads * (plain + value), latent, Split.OUT, unit=plain + value)
    yield from _linear(f"{at}.o_proj", hidden, heads * value, Split.IN, unit=value, bias=traits.out_bias)


def _kv_heads(keys: _Keys) -> int:
    # Only the first Llamas leave the key out, and mean as many as there are heads.
    default = keys.heads if keys.get("model_type") == "llama" else None
    return keys.count("num_key_value_heads", default)


def _kv_of_heads(keys: _Keys) -> tuple[int, int]:
    return _kv_heads(keys), 2 * keys.head_dim


def _kv_of_latent(keys: _Keys) -> tuple[int, int]:
    return 1, keys.count("kv_lora_rank") + keys.count("qk_rope_head_dim")


def _gated(
    at: str, hidden: int, inner: int, *, copies: int = 1, bias: bool = False, names: str = "gate_proj up_proj down_proj"
) -> Iterator[Weight]:
    gate, up, down = names.split()
    yield from _linear(f"{at}.{gate}", inner, hidden, Split.OUT, copies=copies, bias=bias)
    yield from _linear(f"{at}.{up}", inner, hidden, Split.OUT, copies=copies, bias=bias)
    yield from _linear(f"{at}.{down}", hidden, inner, Split.IN, copies=copies, bias=bias)


def _dense_mlp(keys: _Keys, at: str, number: int, traits: _Traits) -> Iterator[Weight]:
    return _gated(f"{at}.mlp", keys.hidden, keys.count("intermediate_size"), bias=traits.mlp_bias)


def _mixtral_mlp(keys: _Keys, at: str, number: int, traits: _Traits) -> Iterator[Weight]:
    at, hidden, experts = f"{at}.block_sparse_moe", keys.hidden, keys.count("num_local_experts")
    yield Weight(name=f"{at}.gate", out=experts, into=hidden)
    yield from _gated(f"{at}.experts.*", hidden, keys.count("intermediate_size"), copies=experts, names="w1 w3 w2")


def _qwen_moe_mlp(keys: _Keys, at: str, number: int, traits: _Traits) -> Iterator[Weight]:
    dense = number in keys.layer_numbers("mlp_only_layers") or (number + 1) % keys.count("decoder_sparse_step", 1)
    if dense:
        yield from _dense_mlp(keys, at, number, traits)
        return
    at, hidden = f"{at}.mlp", keys.hidden
    experts = keys.count("num_local_experts" if keys.get("num_experts") is None else "num_experts")
    yield Weight(name=f"{at}.gate", out=experts, into=hidden)
    yield from _gated(f"{at}.experts.*", hidden, keys.count("moe_intermediate_size"), copies=experts)
    if keys.get("model_type") == "qwen2_moe":
        yield from _gated(f"{at}.shared_expert", hidden, keys.count("shared_expert_intermediate_size"))
        yield Weight(name=f"{at}.shared_expert_gate", out=1, into=hidden)


def _deepseek_mlp(keys: _Keys, at: str, number: int, traits: _Traits) -> Iterator[Weight]:
    experts = keys.count("n_routed_experts", 0)
    sparse = number >= keys.count("first_k_dense_replace", 0, least=0) and number % keys.count("moe_layer_freq", 1) == 0
    if not (experts and sparse):
        yield from _dense_mlp(keys, at, number, traits)
        return
    at, hidden, inner = f"{at}.mlp", keys.hidden, keys.count("moe_intermediate_size")
    yield Weight(name=f"{at}.gate", out=experts, into=hidden)
    if keys.get("topk_method") == "noaux_tc":
        yield Weight(name=f"{at}.gate.e_score_correction_bias", out=experts, element_bytes=4)
    yield from _gated(f"{at}.experts.*", hidden, inner, copies=experts)
    shared = keys.count("n_shared_experts", 0, least=0)
    if shared:
        yield from _gated(f"{at}.shared_experts", hidden, inner * shared)


def _plain(keys: _Keys) -> _Traits:
    return _Traits(attention=_grouped_attention, mlp=_dense_mlp, kv=_kv_of_heads)


def _llama(keys: _Keys) -> _Traits:
    bias = keys.flag("attention_bias")
    return msgspec.structs.replace(_plain(keys), qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias"))


def _qwen2(keys: _Keys) -> _Traits:
    return msgspec.structs.replace(_plain(keys), qkv_bias=True)


def _qwen2_moe(keys: _Keys) -> _Traits:
    return msgspec.structs.replace(_plain(keys), qkv_bias=keys.flag("qkv_bias", True), mlp=_qwen_moe_mlp)


def _qwen3(keys: _Keys) -> _Traits:
    keys.count("head_dim")  # its default is not hidden / heads
    bias = keys.flag("attention_bias")
    return msgspec.structs.replace(_plain(keys), qkv_bias=bias, out_bias=bias, qk_norm=True)


def _qwen3_moe(keys: _Keys) -> _Traits:
    return msgspec.structs.replace(_qwen3(keys), mlp=_qwen_moe_mlp)


def _mixtral(keys: _Keys) -> _Traits:
    return msgspec.structs.replace(_plain(keys), mlp=_mixtral_mlp)


def _gemma(keys: _Keys) -> _Traits:
    keys.count("head_dim")  # its default is not hidden / heads
    bias = keys.flag("attention_bias")
    return msgspec.structs.replace(_plain(keys), qkv_bias=bias, out_bias=bias, tied=True)


def _gemma2(keys: _Keys) -> _Traits:
    around_mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    plain = _gemma(keys)
    return msgspec.structs.replace(plain, norms=plain.norms + around_mlp)


def _gemma3(keys: _Keys) -> _Traits:
    return msgspec.structs.replace(_gemma2(keys), qk_norm=True)


def _deepseek(keys: _Keys) -> _Traits:
    bias = keys.flag("attention_bias")
    return _Traits(attention=_latent_attention, mlp=_deepseek_mlp, kv=_kv_of_latent, qkv_bias=bias, out_bias=bias)


def _trunk(traits: Callable[[_Keys], _Traits]) -> Callable[[_Keys], _Traits]:
    """A decoder without its head, for embeddings."""
    return lambda keys: msgspec.structs.replace(traits(keys), head=False)


_ARCHITECTURES: dict[str, Callable[[_Keys], _Traits]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _plain,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "LlamaEmbeddingModel": _trunk(_llama),
    "MistralModel": _trunk(_plain),
    "Qwen3Model": _trunk(_qwen3),
}
