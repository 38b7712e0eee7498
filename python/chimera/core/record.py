"""What is kept of a request, and of each thing that was done: the rows that `explain`, the dashboard and SQL read.

Times are seconds on one clock; whoever writes them down says which. Knows measures and reasons, never what a request said,
unless its operator asked for that.
"""

from __future__ import annotations

import msgspec

from chimera.core.metrics import Story
from chimera.core.model import Slo

ANSWERED = ("stop", "length")


class Alternative(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something else that could have been done, and what it was worth to whoever decided."""

    what: str
    """In words for people."""
    score: float
    unit: str = ""
    """What the score counts; more is better unless it says otherwise."""
    chosen: bool = False


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One client's request from its arrival to its end, as its front-end saw it."""

    request_id: str
    client_id: str = ""
    """What its client calls it: `x-request-id`."""
    trace: str = ""
    """W3C trace context, as it came."""
    key: str = ""
    """The name of the API key, never the key."""
    model: str
    arrived_s: float
    first_token_s: float | None = None
    ended_s: float
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    tries: int = 0
    """How often it was brought again."""
    outcome: str
    """`stop`, `length`, `cancelled`, or the code of the refusal or failure."""
    detail: str = ""
    """Of a refusal or failure, in words."""
    slo: Slo = Slo()
    prompt: str = ""
    """Only where the operator has switched it on."""
    answer: str = ""

    @property
    def story(self) -> Story:
        """The same in the words of docs/metrics.md."""
        answered = self.outcome in ANSWERED
        return Story(
            request_id=self.request_id,
            model=self.model,
            sent_s=self.arrived_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            slo=self.slo,
            first_token_s=self.first_token_s,
            last_token_s=self.ended_s if answered else None,
            refusal="" if answered else self.outcome,
        )


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One try at a request: which replica had it, and when."""

    request_id: str
    """Of the try: the request's, and `.1`, `.2` for those that followed."""
    model: str
    replica: str
    arrived_s: float
    """Of the client's request."""
    routed_s: float
    """When the dispatcher handed it on; until then it waited for a replica."""
    admitted_s: float | None = None
    """When the replica's engine was given it; until then it waited for its turn."""
    ended_s: float
    outcome: str
    output_tokens: int = 0
    cached_tokens: int = 0
    reason: str = ""
    """Why it went to this replica."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the action log: an action that was committed, or what became of one."""

    at_s: float
    what: str
    """Actions: `activate deactivate pause resume grant recall reject requeue abort policy`. What became of them: `ready
    stopped failed lost`; and `joined`, `away` for agents."""
    model: str = ""
    replica: str = ""
    gpus: tuple[int, ...] = ()
    request_id: str = ""
    code: str = ""
    reason: str = ""
    move: bool = False
    """Another replica of the model stands while this one comes or goes."""
    seconds: float | None = None
    """What it took: an activation from its order to serving, a departure from its order to being gone."""
    pages: int | None = None
    """The level of a lease."""
    alternatives: tuple[Alternative, ...] = ()
