"""The cost table, corrected by what the machine does: per model, how many times longer decodes, prompts and activations take.

Pure arithmetic: a table and a reading in, a table out. A reading moves a factor by a part of the way only, and the part is
measured on a logarithmic scale and cut off, so that one wild reading is worth no more than a strong one; and a factor never
leaves its bounds, so that no reading makes work free or endless.
"""

from __future__ import annotations

import math

import msgspec

from chimera.core.model import ModelSpec
from chimera.msg.events import StepsTimed
from chimera.sched.cost import CostTable, Factors

WEIGHT = 0.2
"""The part of the way that one reading moves a factor."""
STRONGEST = math.log(2.0)
"""A reading counts as at most twice, or half, of what was expected."""
BOUND = 20.0
FEWEST_STEPS = 8
"""Fewer steps tell more about chance than about the machine."""


def after_steps(table: CostTable, model: ModelSpec, seen: StepsTimed, slowdown: float) -> CostTable:
    """`slowdown` is what the engine's neighbours account for."""
    base, factors = table.plain(model), table.refined.get(model.name, Factors())
    if seen.decode_steps >= FEWEST_STEPS and seen.decode_s > 0:
        batch = round(seen.decode_tokens / seen.decode_steps)
        expected_s = seen.decode_steps * base.decode_s(batch, round(seen.context_tokens / seen.decode_steps))
        factors = msgspec.structs.replace(factors, decode=_moved(factors.decode, seen.decode_s, expected_s * slowdown))
    if seen.prompts and seen.prompt_s > 0:
        expected_s = seen.prompts * base.prompt_s(max(1, seen.prompt_tokens // seen.prompts))
        factors = msgspec.structs.replace(factors, prefill=_moved(factors.prefill, seen.prompt_s, expected_s * slowdown))
    return _with(table, model, factors)


def after_activation(table: CostTable, model: ModelSpec, load_s: float) -> CostTable:
    if not load_s > 0:
        return table
    factors = table.refined.get(model.name, Factors())
    moved = _moved(factors.activation, load_s, table.plain(model).activation_s)
    return _with(table, model, msgspec.structs.replace(factors, activation=moved))


def _moved(factor: float, seen_s: float, expected_s: float) -> float:
    if not (expected_s > 0 and math.isfinite(seen_s)):
        return factor
    surprise = math.log(seen_s / expected_s) - math.log(factor)
    surprise = max(-STRONGEST, min(STRONGEST, surprise))
    return max(1 / BOUND, min(BOUND, factor * math.exp(WEIGHT * surprise)))


def _with(table: CostTable, model: ModelSpec, factors: Factors) -> CostTable:
    if factors == table.refined.get(model.name, Factors()):
        return table
    return msgspec.structs.replace(table, refined={**table.refined, model.name: factors})
