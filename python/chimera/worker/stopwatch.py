"""How long an engine's steps take, for whoever plans with it: counted from one delivery of tokens to the next.

A step that makes a request's first token has that request's prompt in it; all others are decodes. Time in which the engine
had nothing to do, or was held back, belongs to no step.
"""

from __future__ import annotations

from chimera.core.replica import Epoch, ReplicaId
from chimera.msg.events import StepsTimed

TOLD_EVERY_S = 1.0


class Stopwatch:
    def __init__(self, replica: ReplicaId, epoch: Epoch) -> None:
        self._replica = replica
        self._epoch = epoch
        self._step_began_s: float | None = None
        self._told_s = 0.0
        self._clear()

    def hold(self) -> None:
        """The engine waits: the time until it is let go counts for nothing."""
        self._step_began_s = None

    def let_go(self, now_s: float) -> None:
        if self._step_began_s is None:
            self._step_began_s = now_s

    def step(self, now_s: float, *, tokens: int, context_tokens: int, prompts: int, prompt_tokens: int) -> None:
        """One has ended. `tokens` and `context_tokens` are those of requests that were decoding before."""
        began_s, self._step_began_s = self._step_began_s, now_s
        if began_s is None:
            return
        if prompts:
            self._prompts += prompts
            self._prompt_tokens += prompt_tokens
            self._prompt_s += now_s - began_s
        elif tokens:
            self._steps += 1
            self._tokens += tokens
            self._context_tokens += context_tokens
            self._decode_s += now_s - began_s

    def told(self, now_s: float) -> StepsTimed | None:
        """What there is to tell, if it is time."""
        if now_s - self._told_s < TOLD_EVERY_S or not (self._steps or self._prompts):
            return None
        seen = StepsTimed(
            replica=self._replica,
            epoch=self._epoch,
            decode_steps=self._steps,
            decode_s=self._decode_s,
            decode_tokens=self._tokens,
            context_tokens=self._context_tokens,
            prompts=self._prompts,
            prompt_tokens=self._prompt_tokens,
            prompt_s=self._prompt_s,
        )
        self._told_s = now_s
        self._clear()
        return seen

    def _clear(self) -> None:
        self._steps = self._tokens = self._context_tokens = self._prompts = self._prompt_tokens = 0
        self._decode_s = self._prompt_s = 0.0
