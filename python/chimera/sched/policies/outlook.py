"""What a placement promises, GPU by GPU: the board's, and any other that a policy thinks of.

Turns what is asked for into rates that are believed and loads that are priced, and asks the forecast once for each thing that
a GPU might be. Knows no candidates and takes no decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import ReplicaState
from chimera.core.snapshot import Demand
from chimera.sched.demand import LONG_S, SHORT_S
from chimera.sched.policies.board import Board
from chimera.sched.policies.forecast import Forecast, Load, forecast, load_of

DOUBT = 2.0
"""How many standard deviations of a count make it more than chance."""
BEHIND_S = 10.0
"""Within so many seconds what is late should be caught up with."""
FORGOTTEN = 0.1
"""A rate that so much of one request leaves behind is taken for none."""

Bring = tuple[ModelSpec, tuple[int, ...]]
"""One more replica of a model, on these GPUs."""


class Outlook:
    def __init__(self, board: Board) -> None:
        self.board = board
        self.rates = _expected([(model, board.demand(model)) for model in board.models])
        """Requests a second that are to be expected, by model."""
        self._lates: dict[str, float] = {}
        self._loads: dict[str, Load] = {}
        self._forecasts: dict[tuple[int, frozenset[tuple[str, int]]], Forecast] = {}
        """By what stands on a GPU, and how many replicas each of that has anywhere."""
        self._now: dict[int, Forecast] = {}
        """By GPU, for the board's edition."""
        self._edition = board.edition
        self._leaving: dict[int, list[tuple[str, int]]] = {}
        """Replicas that run their last requests, where they still take their turns."""
        for view in board.views.values():
            if view.state is ReplicaState.DRAINING and view.running and view.replica.model in board.models:
                for gpu_id in view.gpu_ids:
                    self._leaving.setdefault(gpu_id, []).append((view.replica.model, view.running))

    # What is asked for.

    def crowd(self, model: str) -> float:
        """How many of its requests are under way at once on each replica, if none of them is slowed."""
        load = self._load(model)
        rate = self.rates[model] / max(1, len(self.board.seats_of(model)))
        return rate * (load.prompt_cost_s + load.output_tokens * (load.step_s + load.sequence_s))

    def _load(self, model: str) -> Load:
        load = self._loads.get(model)
        if load is None:
            load = load_of(self.board.models[model], self.board.demand(model), self.board.costs)
            self._loads[model] = load
        return load

    def _late(self, model: str) -> float:
        """Those that are under way and cannot be in time, as if they came within `BEHIND_S`: work without worth.

        Who keeps both promises stays no longer than they allow; there are no more of those at once than come in that time.
        """
        late = self._lates.get(model)
        if late is None:
            demand, load = self.board.demand(model), self._load(model)
            in_time = self.rates[model] * (load.ttft_s + load.output_tokens * load.tpot_s)
            late = max(0.0, demand.open + demand.waiting - in_time - 2 * math.sqrt(in_time + 1)) / BEHIND_S
            self._lates[model] = late
        return late

    # What is promised.

    def on(self, gpu_id: int) -> Forecast:
        """As the board stands."""
        if self._edition != self.board.edition:
            self._edition = self.board.edition
            self._now.clear()
        known = self._now.get(gpu_id)
        if known is None:
            known = self._now[gpu_id] = self._of(gpu_id, self._replicas(gpu_id))
        return known

    def _replicas(self, gpu_id: int) -> dict[str, int]:
        """How many replicas each of those has that stand there."""
        board = self.board
        return {seat.replica.model: len(board.seats_of(seat.replica.model)) for seat in board.on_gpu(gpu_id)}

    def _of(self, gpu_id: int, replicas: dict[str, int]) -> Forecast:
        key = (gpu_id, frozenset(replicas.items()))
        known = self._forecasts.get(key)
        if known is None:
            board = self.board
            asked = [(self._load(m), rate / n, self._late(m) / n) for m, n in replicas.items() if (rate := self.rates[m])]
            asked += [(self._load(model), 0.0, running / BEHIND_S) for model, running in self._leaving.get(gpu_id, ())]
            kv_bytes = board.gpus[gpu_id].capacity_bytes - sum(board.resident_bytes[model] for model in replicas)
            known = forecast(asked, kv_bytes, board.costs.neighbour_slowdown)
            self._forecasts[key] = known
        return known

    def _worth(self, gpu_id: int, replicas: dict[str, int]) -> float:
        """Requests a second that keep both promises there; of a gang, each GPU answers for its part."""
        kept = self._of(gpu_id, replicas).attainment
        models = self.board.models
        return sum(rate / n * kept[m] / models[m].tp_size for m, n in replicas.items() if (rate := self.rates[m]))

    def gain(self, brings: Iterable[Bring] = (), leaves: Iterable[Seat] = ()) -> float:
        """How many more requests a second would keep their SLO with these replicas, and without those."""
        board = self.board
        counts: dict[str, int] = {}
        there: dict[int, list[str]] = {}

        def touch(model: str, gpu_ids: tuple[int, ...], change: int) -> None:
            if model not in counts:
                counts[model] = len(board.seats_of(model))
                for seat in board.seats_of(model):
                    for gpu_id in seat.gpu_ids:
                        if gpu_id not in there:
                            there[gpu_id] = [s.replica.model for s in board.on_gpu(gpu_id)]
            counts[model] += change
            for gpu_id in gpu_ids:
                names = there.setdefault(gpu_id, [s.replica.model for s in board.on_gpu(gpu_id)])
                if change > 0:
                    names.append(model)
                else:
                    names.remove(model)

        for model, gang in brings:
            touch(model.name, gang, 1)
        for seat in leaves:
            touch(seat.replica.model, seat.gpu_ids, -1)
        gained = 0.0
        for gpu_id, names in there.items():
            after = {name: counts.get(name) or len(board.seats_of(name)) for name in names}
            gained += self._worth(gpu_id, after) - self._worth(gpu_id, self._replicas(gpu_id))
        return gained

    def relief(self, model: str, here: Iterable[int]) -> float:
        """The most that one more replica could gain where nobody leaves for it: what the GPUs on which the model stands can
        keep more, and all that the new one would be asked for."""
        count = len(self.board.seats_of(model)) + 1
        gained = self.rates[model] / count
        for gpu_id in here:
            replicas = self._replicas(gpu_id)
            gained += self._worth(gpu_id, {**replicas, model: count}) - self._worth(gpu_id, replicas)
        return gained

    def lost_on(self, gpu_ids: Iterable[int]) -> float:
        """Requests a second that miss a promise there, whosever they are: no more can be gained there."""
        return sum(self.on(gpu_id).lost_per_s for gpu_id in gpu_ids)

    def kept_of(self, seat: Seat) -> float:
        """Requests a second of the seat's own model that keep both promises there."""
        model = seat.replica.model
        rate = self.rates[model] / max(1, len(self.board.seats_of(model)))
        return rate * min(self.on(gpu_id).attainment[model] for gpu_id in seat.gpu_ids) if rate else 0.0


def _expected(demands: Sequence[tuple[str, Demand]]) -> dict[str, float]:
    """Of each model the last minute's rate, unless the last seconds differ by more than chance; of the sum over all models they
    tell more."""
    long = sum(demand.requests_per_s_minute for _, demand in demands)
    swell = _believed(sum(demand.requests_per_s for _, demand in demands), long) / long if long else 1.0
    rates = dict.fromkeys((model for model, _ in demands), 0.0)
    for model, demand in demands:
        if demand.requests_per_s_minute > FORGOTTEN / LONG_S:
            rates[model] = _believed(demand.requests_per_s, demand.requests_per_s_minute * swell)
    return rates


def _believed(short: float, long: float) -> float:
    """The longer rate, unless the shorter differs by more than chance."""
    doubt = DOUBT * math.sqrt(max(short, 1 / SHORT_S) / (2 * SHORT_S))
    return max(short - doubt, min(long, short + doubt))
