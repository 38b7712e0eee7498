"""`space-sharing`: every model resident while they all fit, each on one place, their caches sharing what is left.

Places models where the most memory is free and never moves one. When a model is asked for and nothing is free, idle models
leave in the operator's order. Knows memory only; what a model's work takes does not count.
"""

from __future__ import annotations

import msgspec

from chimera.sched.policies.board import Board
from chimera.sched.policies.policy import Decision, Question

IDLE_S = 2.0
"""How long a model is left in peace after its last request before it makes room for another."""
SPARE = 0.15
"""The part of a GPU that is left to caches before a model is brought in that nobody asks for."""


class SpaceSharing(msgspec.Struct, frozen=True):
    name: str = "space-sharing"
    on_demand: bool = True

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        for model in board.seatless():
            gang = board.roomiest(model) or board.make_room(model, idle_s=IDLE_S)
            if gang is not None:
                board.add(model, gang, f"{board.demand(model.name).waiting} requests wait, and it shares GPUs {list(gang)}")
        for model in sorted(board.models.values(), key=lambda m: (-m.weight_bytes * m.tp_size, m.name)):
            if not board.seats_of(model.name) and not board.is_away(model.name) and model.keep_alive_s is None:
                spare_bytes = SPARE * min((gpu.capacity_bytes for gpu in board.gpus.values()), default=0)
                gang = board.roomiest(model, spare_bytes=spare_bytes)
                if gang is not None:
                    board.add(model, gang, f"all models are resident while they fit; GPUs {list(gang)} have the most room")
        board.keep_house()
        return board.decision()
