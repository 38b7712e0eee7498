"""A request as decisions see it: its measure, never its text."""

from __future__ import annotations

import msgspec

from chimera.core.model import Slo


class Request(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    model: str
    """The registered name; aliases are resolved before this exists."""
    front: str
    """The front-end that answers the client; tokens go straight there."""
    prompt_tokens: int
    max_tokens: int
    arrived_s: float
    """When the client's request came in, on the clock the schedulers are told."""
    slo: Slo = Slo()
    priority: int = 0
    keep_alive_s: float | None = None
    """How long its model shall stay after it; below zero for ever, `None` as the model's entry says."""
    emitted_tokens: int = 0
    """Tokens already sent to the client before the request was requeued; they are part of the new prompt."""
    tries: int = 0
    """Attempts before this one, whatever ended them."""
    losses: int = 0
    """Times that it was in an engine that was lost: it may be what ends them."""
    trace: str = ""
    """The W3C context under which whoever has it now tells of it; empty where nobody does."""
    preempted: int = 0
    """Times that it was given back so that another could be in time."""

    @property
    def final_tokens(self) -> int:
        """The most KV slots the request can ever need."""
        return self.prompt_tokens + self.max_tokens
