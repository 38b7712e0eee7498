"""Makes traces up: when requests come, whom they ask, how long they are. Random only by the seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import msgspec

from chimera.errors import ConfigError
from chimera.trace.sharegpt import Exchange
from chimera.trace.trace import Row, Trace

ARRIVALS = ("poisson", "gamma", "weibull", "constant")
SHAPES = ("uniform", "two-phase", "on-off", "power-law")


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[str, ...]
    rate: float
    """Requests per second, over all models."""
    seconds: float
    arrivals: str = "poisson"
    cv: float = 1.0
    """Standard deviation of the gaps between requests, in their mean; for `gamma` and `weibull`."""
    shape: str = "uniform"
    """Who is asked: `uniform`, everybody as often; `power-law`, the n-th model n^-alpha as often as the first; `two-phase`,
    the first half of the models in the first half of the time, then the others; `on-off`, every model in turns, see below."""
    alpha: float = 1.0
    period_s: float = 20.0
    """`on-off`: one turn on and off. Models begin one after the other."""
    on_share: float = 0.5
    prompt_tokens: tuple[int, int] = (256, 512)
    """From, to; both may occur."""
    output_tokens: tuple[int, int] = (256, 512)


def generate(recipe: Recipe, seed: int, exchanges: Sequence[Exchange] = ()) -> Trace:
    """`exchanges` give the lengths instead of the recipe's ranges."""
    _require(recipe)
    dice = random.Random(f"trace/{seed}")
    gap_s = _gaps(recipe, dice)
    rows: list[Row] = []
    at_s = gap_s()
    while at_s < recipe.seconds:
        model = _asked(recipe, at_s, dice)
        if exchanges:
            exchange = dice.choice(exchanges)
            rows.append(Row(at_s, model, exchange.prompt_tokens, exchange.output_tokens))
        else:
            rows.append(Row(at_s, model, dice.randint(*recipe.prompt_tokens), dice.randint(*recipe.output_tokens)))
        at_s += gap_s()
    return Trace(f"{recipe.arrivals} arrivals, {recipe.shape}", tuple(rows))


def _gaps(recipe: Recipe, dice: random.Random) -> Callable[[], float]:
    mean_s = 1 / recipe.rate
    match recipe.arrivals:
        case "constant":
            return lambda: mean_s
        case "gamma":
            shape = 1 / recipe.cv**2
            return lambda: dice.gammavariate(shape, mean_s / shape)
        case "weibull":
            shape = _weibull_shape(recipe.cv)
            scale = mean_s / math.gamma(1 + 1 / shape)
            return lambda: dice.weibullvariate(scale, shape)
        case _:
            return lambda: dice.expovariate(recipe.rate)


def _weibull_shape(cv: float) -> float:
    """The shape whose standard deviation is so many means; by halving, since it falls with the shape."""
    low, high = 0.2, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = math.gamma(1 + 1 / middle)
        wide = math.sqrt(max(0.0, math.gamma(1 + 2 / middle) / mean**2 - 1))
        low, high = (middle, high) if wide > cv else (low, middle)
    return (low + high) / 2


def _asked(recipe: Recipe, at_s: float, dice: random.Random) -> str:
    models = recipe.models
    match recipe.shape:
        case "power-law":
            return dice.choices(models, [rank**-recipe.alpha for rank in range(1, len(models) + 1)])[0]
        case "two-phase":
            half = math.ceil(len(models) / 2)
            return dice.choice(models[:half] if at_s < recipe.seconds / 2 else models[half:] or models)
        case "on-off":
            return dice.choice(tuple(_on(recipe, at_s)) or models)
        case _:
            return dice.choice(models)


def _on(recipe: Recipe, at_s: float) -> Iterator[str]:
    for number, model in enumerate(recipe.models):
        phase = (at_s / recipe.period_s - number / len(recipe.models)) % 1
        if phase < recipe.on_share:
            yield model


def _require(recipe: Recipe) -> None:
    for name in ("rate", "seconds", "cv", "period_s", "on_share"):
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError.single("trace", f"the {name} is {value:g}; it has to be above zero")
    if not recipe.models:
        raise ConfigError.single("trace", "there is no model to ask")
    for name, known in (("arrivals", ARRIVALS), ("shape", SHAPES)):
        if getattr(recipe, name) not in known:
            raise ConfigError.single("trace", f"the {name} are {getattr(recipe, name)!r}; known are {', '.join(known)}")
    for low, high in (recipe.prompt_tokens, recipe.output_tokens):
        if not 1 <= low <= high:
            raise ConfigError.single("trace", f"lengths from {low} to {high} are none")
    if recipe.arrivals in ("gamma", "weibull") and not 0.1 <= recipe.cv <= 10:
        raise ConfigError.single("trace", f"gaps of cv {recipe.cv:g}: 0.1 to 10 are possible")
