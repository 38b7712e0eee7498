"""`time-sharing`: a GPU, or a gang of them, is one model's at a time; models take turns.

A model that is asked for takes a free GPU, else the turn of the model that is worth least there: one that is idle, or one
whose turn is over. A turn lasts at least `turn_s`, and several times what the swap costs, so that swapping stays the
smaller part of the time. Pinned models keep their GPUs.
"""

from __future__ import annotations

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.sched.policies.board import Board
from chimera.sched.policies.policy import Decision, Question


class TimeSharing(msgspec.Struct, frozen=True):
    name: str = "time-sharing"
    on_demand: bool = True
    turn_s: float = 2.0
    swaps_per_turn: float = 5.0
    """A turn is at least this many times as long as bringing the next model up."""
    grace_s: float = 0.5
    """An idle model keeps its GPU this long: its next request may be on its way."""

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        for model in board.seatless():
            gang = self._free(board, model) or self._turn(board, model)
            if gang is not None:
                waiting = board.demand(model.name).waiting
                board.add(model, gang, f"its turn on GPUs {list(gang)}: {waiting} requests wait")
        board.keep_house()
        return board.decision()

    def _free(self, board: Board, model: ModelSpec) -> tuple[int, ...] | None:
        empty = (gang for gang in board.gangs(model) if not any(board.on_gpu(gpu_id) for gpu_id in gang))
        return next((gang for gang in empty if board.fits(model, gang)), None)

    def _turn(self, board: Board, model: ModelSpec) -> tuple[int, ...] | None:
        """The GPUs whose models can all end their turn, those with the least work first."""
        least_s = max(self.turn_s, self.swaps_per_turn * board.costs.of(model).activation_s)
        best: tuple[tuple[int, float], tuple[int, ...]] | None = None
        for gang in board.gangs(model):
            seats = {seat.replica: seat for gpu_id in gang for seat in board.on_gpu(gpu_id)}.values()
            if seats and all(self._over(board, seat, model, least_s) for seat in seats):
                work = sum(board.demand(seat.replica.model).open for seat in seats)
                oldest_s = max(board.since_s(seat.replica) for seat in seats)
                if best is None or (work, -oldest_s) < best[0]:
                    best = ((work, -oldest_s), gang)
        if best is None:
            return None
        for seat in {seat.replica: seat for gpu_id in best[1] for seat in board.on_gpu(gpu_id)}.values():
            board.remove(seat, f"its turn is over, and requests wait for {model.name}")
        return best[1]

    def _over(self, board: Board, seat: Seat, next_model: ModelSpec, least_s: float) -> bool:
        model = board.models[seat.replica.model]
        if model.pin or not board.serves(seat) or model.priority > next_model.priority:
            return False
        demand = board.demand(model.name)
        idle = demand.open == 0 and demand.waiting == 0
        if idle and demand.idle_s >= max(self.grace_s, model.keep_alive_s or 0.0):
            return True
        return board.since_s(seat.replica) >= least_s and not (idle and model.keep_alive_s is not None)
