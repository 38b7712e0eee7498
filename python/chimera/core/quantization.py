"""How a checkpoint packs its matrices: bits per weight, and what scales, zeros and orders add. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from chimera.units import ceil_div


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    method: str
    bits: int
    scale_block: tuple[int, int] = (0, 0)
    """Rows and columns that share one scale; 0 stands for all of them."""
    scale_bytes: int | None = 4
    """`None`: scales are in the model's own type."""
    zero_bits: int = 0
    """Per scale; asymmetric formats store where zero is."""
    order_bytes: int = 0
    """Per column: GPTQ's g_idx."""
    fixed_bytes: int = 0
    """Per matrix: a static scale of the inputs, a recorded shape."""
    skipped: tuple[str, ...] = ()
    """Modules left in the model's own type."""

    @classmethod
    def fp8_at_load(cls) -> Quantization:
        return cls(method="fp8", bits=8)

    def matrix_bytes(self, out: int, into: int, element_bytes: int) -> int:
        rows, columns = self.scale_block
        scales = ceil_div(out, rows or out) * ceil_div(into, columns or into)
        scale_bytes = element_bytes if self.scale_bytes is None else self.scale_bytes
        packed = ceil_div(out * into * self.bits, 8) + ceil_div(scales * self.zero_bits, 8)
        return packed + scales * scale_bytes + into * self.order_bytes + self.fixed_bytes

    def skips(self, module: str) -> bool:
        return any(_names(entry, module) for entry in self.skipped)


def _names(entry: str, module: str) -> bool:
    """`lm_head`, `model.layers.0`, `mlp.gate`: the whole name, or some whole words of it; or a `re:` pattern."""
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return f".{entry}." in f".{module}."


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """From the contents of config.json; ValueError names what is not understood."""
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, Mapping):
        raise ValueError(f"'quantization_config' is {stored!r}, not a mapping")
    method = stored.get("quant_method")
    match method:
        case "fp8":
            return _fp8(stored)
        case "awq":
            return _awq(stored)
        case "gptq":
            return _gptq(stored)
        case "compressed-tensors":
            return _compressed_tensors(stored)
    known = "fp8, awq, gptq, compressed-tensors"
    raise ValueError(f"unknown 'quantization_config.quant_method' {method!r}; known are {known}")


def _fp8(stored: Mapping[str, Any]) -> Quantization:
    block = stored.get("weight_block_size")
    if block is not None and (not isinstance(block, list) or len(block) != 2):
        raise ValueError(f"'quantization_config.weight_block_size' is {block!r}, not a list of two sizes")
    return Quantization(
        method="fp8",
        bits=8,
        scale_block=(0, 0) if block is None else (_size(block[0]), _size(block[1])),
        fixed_bytes=4 if stored.get("activation_scheme") == "static" else 0,
        skipped=_skipped(stored, "modules_to_not_convert") + _skipped(stored, "ignored_layers"),
    )


def _awq(stored: Mapping[str, Any]) -> Quantization:
    bits = _bits(stored.get("bits", stored.get("w_bit")))
    return Quantization(
        method="awq",
        bits=bits,
        scale_block=(1, _group(stored.get("group_size", stored.get("q_group_size")))),
        scale_bytes=2,
        zero_bits=bits,
        skipped=_skipped(stored, "modules_to_not_convert"),
    )


def _gptq(stored: Mapping[str, Any]) -> Quantization:
    bits = _bits(stored.get("bits"))
    return Quantization(
        method="gptq",
        bits=bits,
        scale_block=(1, _group(stored.get("group_size"))),
        scale_bytes=2,
        zero_bits=bits,  # stored even where the zeros are all alike
        order_bytes=4,
        skipped=_skipped(stored, "modules_to_not_convert"),
    )


def _compressed_tensors(stored: Mapping[str, Any]) -> Quantization:
    groups = stored.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError("'quantization_config.config_groups' describes no weights")
    bits = _bits(weights.get("num_bits"))
    packed = bits < 8
    return Quantization(
        method="compressed-tensors",
        bits=bits,
        scale_block=_strategy(weights),
        scale_bytes=None if packed else 4,
        zero_bits=0 if weights.get("symmetric", True) else bits,
        fixed_bytes=16 if packed else 0,  # weight_shape: two int64
        skipped=_skipped(stored, "ignore"),
    )


def _strategy(weights: Mapping[str, Any]) -> tuple[int, int]:
    match weights.get("strategy"):
        case "tensor":
            return 0, 0
        case "channel":
            return 1, 0
        case "group":
            return 1, _group(weights.get("group_size"))
        case unknown:
            raise ValueError(f"unknown strategy {unknown!r} in 'quantization_config'; known are tensor, channel, group")


def _bits(value: Any) -> int:
    if value not in (2, 3, 4, 8) or isinstance(value, bool):
        raise ValueError(f"{value!r} bits in 'quantization_config' are not 2, 3, 4 or 8")
    return int(value)


def _group(value: Any) -> int:
    return 0 if value == -1 else _size(value)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} in 'quantization_config' is not a size")
    return value


def _skipped(stored: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = stored.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"'quantization_config.{key}' is {value!r}, not a list of module names")
    for name in value:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as fault:
                raise ValueError(f"'quantization_config.{key}' holds {name!r}: {fault}") from None
    return tuple(value)
