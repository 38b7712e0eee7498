"""`simple-global`: Prism as released (see the seed's `simple-global` policy). A baseline, kept as it is, weaknesses included.

Every five seconds, and never sooner after a change: models idle beyond 50 s leave; at most one migration, if memory per
request differs more than fifteen times between two GPUs, and it stops the model while it moves. Models that are asked for
start at once, the most violating first, among the GPUs within 5 GB of the most free memory on the one with the fewest
requests.
"""

from __future__ import annotations

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.sched.policies.board import Board
from chimera.sched.policies.policy import Decision, Question
from chimera.units import GB


class SimpleGlobal(msgspec.Struct, frozen=True):
    name: str = "simple-global"
    on_demand: bool = True
    every_s: float = 5.0
    idle_s: float = 50.0
    imbalance: float = 15.0
    group_bytes: int = 5 * GB

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        rested = all(board.since_s(seat.replica) >= self.every_s for seat in board.seats())
        for seat in board.seats():
            if board.demand(seat.replica.model).idle_s > self.idle_s and board.may_leave(seat) and board.serves(seat):
                board.remove(seat, f"idle for more than {self.idle_s:g} s")
        if rested:
            self._migrate(board)
        for model in board.seatless():
            gang = self._emptiest(board, model)
            if gang is not None:
                board.add(model, gang, f"{board.demand(model.name).waiting} requests wait; GPUs {list(gang)} have room")
        board.keep_house()
        return board.decision(self.every_s)

    def _load(self, board: Board, gpu_id: int) -> int:
        return sum(board.demand(seat.replica.model).open for seat in board.on_gpu(gpu_id))

    def _emptiest(self, board: Board, model: ModelSpec) -> tuple[int, ...] | None:
        fitting = [gang for gang in board.gangs(model) if board.fits(model, gang)]
        if not fitting:
            return None
        most = max(min(board.free_bytes(g) for g in gang) for gang in fitting)
        group = [gang for gang in fitting if min(board.free_bytes(g) for g in gang) >= most - self.group_bytes]
        return min(group, key=lambda gang: (sum(self._load(board, g) for g in gang), gang))

    def _migrate(self, board: Board) -> None:
        """From the GPU with the least memory per request to the one with the most; the model stops meanwhile."""
        per_request = {g: board.free_bytes(g) / (1 + self._load(board, g)) for g in board.gpus}
        if len(per_request) < 2:
            return
        poor = min(per_request, key=lambda g: (per_request[g], g))
        rich = max(per_request, key=lambda g: (per_request[g], -g))
        if per_request[rich] <= self.imbalance * max(1.0, per_request[poor]):
            return
        movable = [seat for seat in board.on_gpu(poor) if self._movable(board, seat, rich)]
        if len(board.on_gpu(poor)) < 2 or not movable:
            return
        seat = max(movable, key=lambda s: (board.demand(s.replica.model).open, s.replica))
        model = board.models[seat.replica.model]
        reason = f"GPU {rich} has more than {self.imbalance:g} times the memory per request of GPU {poor}"
        board.remove(seat, reason)
        board.add(model, (rich,), reason)

    def _movable(self, board: Board, seat: Seat, gpu_id: int) -> bool:
        model = board.models[seat.replica.model]
        return len(seat.gpu_ids) == 1 and board.serves(seat) and not model.pin and board.fits(model, (gpu_id,))
