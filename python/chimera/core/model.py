"""A model as decisions see it: a name, what it weighs, what a token of its cache weighs, and what it owes its users."""

from __future__ import annotations

from typing import Any

import msgspec


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """The latencies promised to a user. `None` promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    reject_late: bool = False
    """Whether a request that cannot be in time is turned away at once; if not, it is served when no other can be in time."""


class Tastes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a model's makers would pick its tokens, where a request does not say. `None`: they do not say either."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the system knows of a registered model, whether it is running or not."""

    name: str
    path: str
    """The folder with config.json and weights."""
    tokenizer_path: str
    architecture: str
    weight_bytes: int
    """Per tensor-parallel rank."""
    kv_bytes_per_token: int
    """Per tensor-parallel rank, over all layers."""
    context_length: int
    tp_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    aliases: tuple[str, ...] = ()
    slo: Slo = Slo()
    priority: int = 0
    pin: bool = False
    preload: bool = False
    keep_alive_s: float | None = None
    """Idle time after which the model may leave; `None` leaves that to the policy."""
    drain_s: float = 30.0
    tool_call_parser: str | None = None
    """How it writes calls, in SGLang's words; `auto` or `None`: as its chat template suggests, when a request has tools."""
    reasoning_parser: str | None = None
    """How it sets its thoughts apart; `None`: they are not told apart from what it says."""
    tastes: Tastes = Tastes()
    embedding: bool = False
    """It makes embeddings, and no text."""
    engine: str = "sglang"
    engine_args: dict[str, Any] = {}

    def runs_as(self, other: ModelSpec) -> bool:
        """Whether an engine that was brought up for the other may go on as this: what differs is no engine's business."""
        return other == msgspec.structs.replace(self, **{field: getattr(other, field) for field in _NO_ENGINES_BUSINESS})

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.kv_bytes_per_token


_NO_ENGINES_BUSINESS = (
    "aliases",
    "slo",
    "priority",
    "pin",
    "preload",
    "keep_alive_s",
    "drain_s",
    "tool_call_parser",
    "reasoning_parser",
    "tastes",
)
