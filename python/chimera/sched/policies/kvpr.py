"""`kvpr`: Prism as published (Algorithm 1): the KV pressure ratio of the GPUs, kept even. A baseline.

The ratio of a GPU is the rate at which its models write cache, weighted by how little time they have for a token, over the
memory left for caches. Models are laid out anew in descending order of that rate, each on the GPU of least ratio, and move
if that betters the ratio by more than τ. The paper's argmin is printed without the model and told with it; `after` takes
the second reading. The paper gives no τ, no period and no capacity check: here τ is a tenth of the ratio, models are laid out
again when nothing has moved for five seconds, and what does not fit is passed over. Compute is in none of it.
"""

from __future__ import annotations

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.sched.policies.board import Board
from chimera.sched.policies.policy import TICK_S, Decision, Question

NO_PROMISE_TPOT_S = 0.1
"""What a model without a TPOT promise is weighed with."""


class _Gpu:
    """One GPU while models are laid out on it."""

    __slots__ = ("rate", "shared_bytes")

    def __init__(self, capacity_bytes: int) -> None:
        self.shared_bytes = float(capacity_bytes)
        self.rate = 0.0

    def ratio(self, rate: float = 0.0, weight_bytes: int = 0) -> float:
        return (self.rate + rate) / max(1.0, self.shared_bytes - weight_bytes)


class Kvpr(msgspec.Struct, frozen=True):
    after: bool = False
    every_s: float = 5.0
    idle_s: float = 45.0
    threshold: float = 0.1
    on_demand: bool = True

    @property
    def name(self) -> str:
        return "kvpr-after" if self.after else "kvpr"

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        for model in board.seatless():
            gang = board.roomiest(model) or board.make_room(model, idle_s=self.idle_s)
            if gang is not None:
                board.add(model, gang, f"{board.demand(model.name).waiting} requests wait")
        self._end_moves(board)
        if all(board.since_s(seat.replica) >= self.every_s for seat in board.seats()):
            self._lay_out(board)
        board.keep_house()
        moving = any(len(board.seats_of(name)) > 1 for name in board.models)
        return board.decision(TICK_S if moving or board.seatless() else self.every_s)

    def _weighted_rate(self, board: Board, model: ModelSpec) -> float:
        demand = board.demand(model.name)
        tokens_per_s = demand.requests_per_s_minute * (demand.prompt_tokens + demand.output_tokens)
        return tokens_per_s * model.kv_bytes_per_token / (model.slo.tpot_s or NO_PROMISE_TPOT_S)

    def _end_moves(self, board: Board) -> None:
        """A model that stands in two places has moved once the newer one serves."""
        for name in board.models:
            seats = board.seats_of(name)
            if len(seats) > 1 and all(board.serves(seat) for seat in seats):
                newest = min(seats, key=lambda seat: (board.since_s(seat.replica), seat.replica))
                for seat in list(seats):
                    if seat is not newest:
                        board.remove(seat, f"it has moved to GPUs {list(newest.gpu_ids)}")

    def _lay_out(self, board: Board) -> None:
        paper = {gpu_id: _Gpu(gpu.capacity_bytes) for gpu_id, gpu in board.gpus.items()}
        placed = [model for model in board.models.values() if len(board.seats_of(model.name)) == 1]
        for model in sorted(placed, key=lambda m: (-self._weighted_rate(board, m), m.name)):
            seat = board.seats_of(model.name)[0]
            rate = self._weighted_rate(board, model)
            target = self._target(board, paper, model, seat, rate)
            for gpu_id in target:
                paper[gpu_id].rate += rate / model.tp_size
                paper[gpu_id].shared_bytes -= model.weight_bytes

    def _target(self, board: Board, paper: dict[int, _Gpu], model: ModelSpec, seat: Seat, rate: float) -> tuple[int, ...]:
        def ratio(gang: tuple[int, ...]) -> float:
            added = (rate / model.tp_size, model.weight_bytes) if self.after else (0.0, 0)
            return max(paper[gpu_id].ratio(*added) for gpu_id in gang)

        best = min(board.gangs(model), key=lambda gang: (ratio(gang), gang), default=seat.gpu_ids)
        current_s, best_s = ratio(seat.gpu_ids), ratio(best)
        if best == seat.gpu_ids or current_s - best_s <= self.threshold * current_s or model.pin or not rate:
            return seat.gpu_ids
        if not board.serves(seat) or not board.fits(model, best) or board.stands_on(model.name, best):
            return seat.gpu_ids
        board.add(model, best, f"KV pressure there is {best_s:.3g}, and {current_s:.3g} where it stands")
        return best
