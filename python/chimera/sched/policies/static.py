"""`static`: what the operator wrote, and nothing else. A model that the file gives no GPU is refused."""

from __future__ import annotations

import msgspec

from chimera.sched.policies.policy import Decision, Question


class Static(msgspec.Struct, frozen=True):
    name: str = "static"
    on_demand: bool = False

    def decide(self, question: Question) -> Decision:
        reasons = {seat.replica: "the placement file does not have it" for seat in question.wanted.seats}
        reasons |= {seat.replica: "the placement file wants it" for seat in question.filed.seats}
        return Decision(placement=question.filed, reasons=reasons, again_s=float("inf"))
