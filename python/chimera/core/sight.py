"""What a viewer is shown of the house, once a second: the same facts as the snapshot, small enough for 500 models.

Models and GPUs are numbers here, their places in a `Cast`, which is told again only when it changes. Memory is in MiB, a
moment is a second of the wall's clock. Array-like where there is one for each model, replica or pool.
"""

from __future__ import annotations

import msgspec

from chimera.core.record import Entry
from chimera.core.replica import ReplicaState

NOBODYS = -1
"""In the place of a model: memory of one that is no longer known."""
WINDOW_S = 300
"""How far back a viewer who has just come can see, and how much of the past attainment is of."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model, as one who watches needs to know it."""

    name: str
    aliases: tuple[str, ...] = ()
    weight_mib: int = 0
    kv_bytes: int = 0
    """Of one token, on each of its GPUs."""
    tp_size: int = 1
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    pin: bool = False
    embedding: bool = False


class Device(msgspec.Struct, frozen=True, kw_only=True):
    gpu_id: int
    node: str
    name: str
    mib: int


class Cast(msgspec.Struct, frozen=True, kw_only=True):
    """Who is on stage. `number` is the millisecond in which that changed, so it only grows, over restarts as well."""

    number: int = 0
    models: tuple[Part, ...] = ()
    gpus: tuple[Device, ...] = ()


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """What one model holds of one GPU, all its replicas together."""

    model: int
    weights: int = 0
    kv: int = 0
    """Leased to it; it breathes."""
    used: int = 0
    """The part of that where tokens lie."""


class Shelf(msgspec.Struct, frozen=True, array_like=True):
    """One GPU's memory: whose it is, from the bottom up."""

    pools: tuple[Pool, ...] = ()
    engines: int = 0
    """Contexts, graphs, workspace: what it costs to have engines at all."""
    adapters: int = 0
    others: int = 0
    """Strangers and the margin."""


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """One replica."""

    model: int
    index: int
    state: ReplicaState
    gpu_ids: tuple[int, ...]
    running: int = 0
    queued: int = 0
    kv_tokens: int = 0
    kv_used_tokens: int = 0
    age_s: float = 0.0
    failures: int = 0
    quarantine_s: float | None = None
    why: str = ""


class Pulse(msgspec.Struct, frozen=True, array_like=True):
    """One model's business. A model that has none is left out."""

    model: int
    waiting: int = 0
    """Held, because no replica serves them yet."""
    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    sent: int = 0
    """Requests that ended in the last five minutes, however they ended."""
    kept: int = 0
    """Of these, those that kept both promises."""


class News(msgspec.Struct, frozen=True, array_like=True):
    """A line of the action log, and its number."""

    number: int
    entry: Entry


class Sight(msgspec.Struct, frozen=True, kw_only=True, tag_field="of", tag="sight"):
    """One second."""

    at_s: float
    policy: str
    local: str
    cast: int
    """The number of the cast that this is told in."""
    changed: Cast | None = None
    """That cast, when the one who asked has another."""
    shelves: tuple[Shelf, ...] = ()
    """By GPU, in the order of the cast."""
    replicas: tuple[Standing, ...] = ()
    pulses: tuple[Pulse, ...] = ()
    news: tuple[News, ...] = ()
    fault: str = ""
    """Why records cannot be kept, when they cannot."""


class Stretch(msgspec.Struct, frozen=True, array_like=True):
    """One figure of one model on one GPU over the past: `(value, how many times in a row)…`, one for each moment."""

    model: int
    kind: str
    """A field of `Pool`; or, with nobody's model, of `Shelf`."""
    runs: tuple[int, ...]


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """The last minutes for a viewer who has just come; coarser where there is much of it."""

    cast: Cast
    moments: tuple[float, ...] = ()
    gpus: tuple[tuple[Stretch, ...], ...] = ()
    news: tuple[News, ...] = ()
