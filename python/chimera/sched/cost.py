"""What work costs on one kind of machine: steps, prefills, activations, neighbours. Policies and simulator read the same table.

A table is a few measured coefficients, so that a model never seen on the machine has a price too: a decode step reads the
weights once and the context once, a prefill multiplies every token with every weight, an activation moves the weights over
the link. Where a figure comes from stands in the table itself. Knows no file. A live server corrects it per model
(`refine.py`).
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from chimera.core.model import ModelSpec

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Factors(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How many times longer a model's work takes than the figures say."""

    decode: Positive = 1.0
    prefill: Positive = 1.0
    activation: Positive = 1.0


class CostTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of machine."""

    machine: str
    sources: dict[str, str]
    """Where each figure comes from, by the name of its field."""
    gpu_bytes: Annotated[int, msgspec.Meta(gt=0)]
    request_s: NonNegative
    """HTTP, tokenising and messages, once per request."""
    step_s: NonNegative
    """Of every step, whatever the model: launches, sampling, the engine's own loop."""
    step_sequence_s: NonNegative
    """Of every step, for each sequence in it."""
    gang_step_s: NonNegative = 0.0
    """Of every step of a tensor-parallel gang: its all-reduces."""
    weight_bytes_per_s: Positive
    """How fast a decode step reads weights."""
    kv_bytes_per_s: Positive
    """How fast a decode step reads the cache."""
    prefill_weight_bytes_per_s: Positive
    """Weight bytes × prompt tokens per second."""
    prefill_kv_bytes_per_s: Positive
    """Cache bytes × prompt tokens per second: attention over what came before."""
    chunk_tokens: Annotated[int, msgspec.Meta(gt=0)]
    """The most prompt tokens of one prefill step."""
    running: Annotated[int, msgspec.Meta(gt=0)]
    """The most sequences of one engine: its credits."""
    engine_bytes: Annotated[int, msgspec.Meta(ge=0)]
    """What a replica holds on each GPU beside weights and cache."""
    stripe_bytes: Annotated[int, msgspec.Meta(gt=0)]
    """KV memory is held in whole stripes."""
    activation_s: NonNegative
    """Of an activation, whatever the size."""
    link_bytes_per_s: Positive
    """From host memory to one GPU."""
    node_link_bytes_per_s: Positive
    """From host memory to all GPUs of a node together."""
    neighbour_slowdown: NonNegative
    """By how much k engines at work on one GPU take longer than k turns: 1 + this × (k − 1)."""
    refined: dict[str, Factors] = {}
    """By model: what a running server has seen."""

    def of(self, model: ModelSpec) -> EngineCost:
        """The price list for one model, per rank, as far as is known."""
        plain, factors = self.plain(model), self.refined.get(model.name)
        return plain if factors is None else plain.times(factors)

    def plain(self, model: ModelSpec) -> EngineCost:
        """By the table's figures alone."""
        return EngineCost(
            step_s=self.step_s
            + model.weight_bytes / self.weight_bytes_per_s
            + (self.gang_step_s if model.tp_size > 1 else 0.0),
            sequence_s=self.step_sequence_s,
            context_token_s=model.kv_bytes_per_token / self.kv_bytes_per_s,
            prefill_step_s=self.step_s + (self.gang_step_s if model.tp_size > 1 else 0.0),
            prompt_token_s=model.weight_bytes / self.prefill_weight_bytes_per_s,
            prompt_pair_s=model.kv_bytes_per_token / self.prefill_kv_bytes_per_s,
            activation_s=self.activation_s + model.weight_bytes / self.link_bytes_per_s,
            chunk_tokens=self.chunk_tokens,
        )

    def resident_bytes(self, model: ModelSpec) -> int:
        """What a replica holds on each of its GPUs before its first token."""
        return model.weight_bytes + self.engine_bytes

    def slowdown(self, engines: float) -> float:
        """How many times longer a step takes when so many engines are at work on the GPU, this one among them."""
        return engines * (1.0 + self.neighbour_slowdown * (engines - 1)) if engines > 1 else 1.0


class EngineCost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Seconds of one model's work on a GPU that it has to itself."""

    step_s: float
    sequence_s: float
    context_token_s: float
    prefill_step_s: float
    prompt_token_s: float
    prompt_pair_s: float
    activation_s: float
    chunk_tokens: int

    def times(self, factors: Factors) -> EngineCost:
        return EngineCost(
            step_s=self.step_s * factors.decode,
            sequence_s=self.sequence_s * factors.decode,
            context_token_s=self.context_token_s * factors.decode,
            prefill_step_s=self.prefill_step_s * factors.prefill,
            prompt_token_s=self.prompt_token_s * factors.prefill,
            prompt_pair_s=self.prompt_pair_s * factors.prefill,
            activation_s=self.activation_s * factors.activation,
            chunk_tokens=self.chunk_tokens,
        )

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """One step that gives every sequence of the batch a token; `context_tokens` is the sum over the batch."""
        return self.step_s + batch * self.sequence_s + context_tokens * self.context_token_s

    def decodes_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """So many steps in a row; the context grows by the batch with each of them."""
        return steps * self.decode_s(batch, context_tokens) + self.context_token_s * batch * steps * (steps - 1) / 2

    def decodes_within(self, batch: int, context_tokens: int, seconds: float) -> int:
        """How many whole steps fit into a time."""
        growth = self.context_token_s * batch / 2
        first = self.decode_s(batch, context_tokens) - growth
        if growth <= 0:
            return int(seconds / first + 1e-9)
        return int((math.sqrt(first * first + 4 * growth * seconds) - first) / (2 * growth) + 1e-9)

    def prefill_s(self, tokens: int, before: int = 0) -> float:
        """One prefill step of `tokens`, after `before` tokens of the same prompt."""
        return self.prefill_step_s + tokens * (self.prompt_token_s + (before + tokens / 2) * self.prompt_pair_s)

    def prompt_s(self, tokens: int) -> float:
        """A whole prompt, in its chunks."""
        chunks = -(-tokens // self.chunk_tokens) or 1
        return chunks * self.prefill_step_s + tokens * (self.prompt_token_s + tokens / 2 * self.prompt_pair_s)

    def request_s(self, prompt_tokens: float, output_tokens: float, batch: float) -> float:
        """The share of the engine's time that a request takes when so many are decoded together."""
        context = prompt_tokens + output_tokens / 2
        prefill = self.prompt_s(int(prompt_tokens))
        return prefill + output_tokens * (self.step_s / max(1.0, batch) + self.sequence_s + context * self.context_token_s)
