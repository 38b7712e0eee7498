"""What every engine can do, in the words of the worker that holds it.

An engine owns the step loop while it serves, because real engines do. Once a step it asks its `Post` for orders and
hands it the tokens it made. It knows no agent, no front-end and no epoch; it never waits for anybody but its post.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from chimera.core.model import ModelSpec
from chimera.errors import ChimeraError
from chimera.msg.actions import Place
from chimera.msg.stream import Payload, TokenDelta


class Submission(msgspec.Struct, frozen=True):
    request_id: str
    payload: Payload


class Withdrawal(msgspec.Struct, frozen=True):
    """Stop this request; nothing more is said of it."""

    request_id: str


class Limit(msgspec.Struct, frozen=True):
    """Hold at most so much KV memory. A newer limit replaces an older one, whatever has become of that."""

    kv_bytes: int
    retract_by_s: float | None = None
    """When running requests must yield for it, on the monotonic clock; until then, and with `None` for ever, only what
    nobody runs on is given up."""


class Flush(msgspec.Struct, frozen=True):
    """Let go of every cached prefix that no request runs on, and say so with `Post.flushed`."""


Order = Submission | Withdrawal | Limit | Flush


class Leave(Exception):
    """Raised by `Post.collect`: `Engine.serve` ends with it."""


class CannotServe(ChimeraError):
    """The model does not come up on this engine. `permanent`: trying again is no use."""

    def __init__(self, reason: str, *, permanent: bool) -> None:
        self.permanent = permanent
        super().__init__(reason)


class Parking(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker may keep of models that have left, so that they are there at once when they return."""

    models: int = 0
    nbytes: int | None = None
    """Of the memory that models run in; `None` leaves it to the number."""
    host_kv_bytes: int = 0
    """Of the host's memory, for their cached prefixes."""


NO_PARKING = Parking()


class Remains(msgspec.Struct, frozen=True):
    """What an engine keeps of models that have left."""

    models: tuple[str, ...] = ()
    nbytes: int = 0


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """What a model has once it is up."""

    credits: int
    """Requests the engine takes at a time."""
    kv_tokens: int
    context_length: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    running: int = 0
    queued: int = 0
    kv_tokens: int = 0
    kv_used_tokens: int = 0
    lost_cached_tokens: int = 0
    """Cached prefixes that went because memory was recalled, since the model came up."""


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """An elastic engine's KV memory on each of its GPUs."""

    held_bytes: int
    """What it has, in use or not. Above its limit while it is on its way down."""
    wanted_bytes: int
    """What its requests would need to run to their ends together."""


class Post(Protocol):
    """The worker's side: where orders come from and tokens go."""

    def collect(self, wait_s: float | None) -> Sequence[Order]:
        """The orders that have come; with none there, waits up to `wait_s` (`None`: until there is one, 0: not at all)."""

    def deliver(self, deltas: list[TokenDelta]) -> None:
        """The tokens of one step. A delta with an outcome is its request's last."""

    def fail(self, request_id: str, code: str, message: str) -> None:
        """The engine itself gives the request up; nothing more is said of it."""

    def give_back(self, request_id: str, reason: str) -> None:
        """The engine cannot go on with it for now: to be brought again, with the tokens it has made; not said of again."""

    def flushed(self) -> None:
        """The eldest `Flush` is carried out."""


class Engine(Protocol):
    def prepare(self, model: ModelSpec, *, gpu_ids: tuple[int, ...]) -> int:
        """Do beforehand, while it is empty, whatever makes later activations of the model fast, on this host and for all
        workers. The bytes it takes of the host's memory. Raises `CannotServe`."""

    def activate(
        self,
        model: ModelSpec,
        *,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None = None,
        place: Place | None = None,
    ) -> Vitals:
        """Bring the model up with so much KV memory per GPU (`None`: the engine's own choice). Raises `CannotServe`.

        With a ceiling it is elastic: a `Limit` moves it, up to the ceiling. Over several GPUs there is an engine in a
        process for each, at its `place`; they come up together, and what one cannot do none does.
        """

    def serve(self, post: Post) -> None:
        """Step without end; `Leave`, raised by `post.collect`, passes through to the caller.

        Of engines that serve together, the first has the requests; `Leave` reaches the others through it, or their own post.
        """

    def stats(self) -> Stats: ...

    def holding(self) -> Holding | None:
        """Empty for a pool of fixed size. Cheap: asked once a step."""

    def deactivate(self) -> None:
        """The model leaves, and its memory is back but for what `remains`; the process is empty again."""

    def remains(self, gpu_id: int) -> Remains:
        """On one GPU. What was kept of a model that is up again counts in the bytes."""

    def let_go(self, gpu_id: int, most_bytes: int, reason: str) -> None:
        """Keep no more than this there, whatever it costs those who return."""
