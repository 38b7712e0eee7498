"""`flexible`: ours, and the default. Whichever placement promises the most requests within their SLO, at a price worth paying.

For each GPU the forecast says what would be kept; a change is made when it promises more by a margin that covers its price
and the doubt about the rates (hysteresis), and only so many at a time. A model under pressure gets another replica where that
helps most, or takes the room of one that is worth less; a replica leaves when the GPU promises more without it. A move is both,
in that order, so somebody always serves. A GPU on which nobody is asked for is put to use by whoever has requests that overlap.
Models that nobody asks for stay warm while they are in nobody's way.
"""

from __future__ import annotations

import math

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.record import Alternative
from chimera.sched.demand import LONG_S, SHORT_S
from chimera.sched.policies.board import Board, places_weighed, weighed
from chimera.sched.policies.forecast import Asked, Forecast, Load, forecast, load_of
from chimera.sched.policies.policy import CALM_S, TICK_S, Decision, Question

PROMISED = "requests a second that keep their SLO, more than now"
OVERLAP = "requests that are under way at once on each of its replicas"
DOUBT = 1.0
"""How many standard deviations of a count make it more than chance."""
FORGOTTEN = 0.1
"""A rate that so much of one request leaves behind is taken for none."""


class Flexible(msgspec.Struct, frozen=True):
    name: str = "flexible"
    on_demand: bool = True
    pressed: float = 0.99
    """A model predicted to attain less is under pressure."""
    margin: float = 0.05
    """A change has to promise so much more of the rates it touches."""
    least_gain_per_s: float = 0.02
    settle_s: float = 4.0
    """A replica stays at least this long, whatever the forecast."""
    overlap: float = 0.25
    """So many requests at once on each replica, on average, deserve one more where nobody is asked for."""
    idle_s: float = 1.0
    """An idle model leaves for one that is waited for after this long."""
    spare: float = 0.2
    """The part of a GPU left to caches before a model is brought in that nobody waits for."""
    looked_at: int = 4
    """The models under the most pressure are looked at."""
    tried_gangs: int = 6
    """For each of them, the places with the least work."""

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        plan = _Plan(board)
        for model in board.seatless():
            self._bring_in(plan, model)
        self._warm_up(plan)
        self._put_to_use(plan)
        stirring = any(d.open or d.waiting for d in question.snapshot.demands.values())
        pressed = plan.pressed(self.pressed, self.least_gain_per_s) if stirring else []
        if pressed:
            self._relieve(plan, pressed)
            self._withdraw(plan)
        board.keep_house()
        return board.decision(TICK_S if pressed or board.seatless() else CALM_S)

    def _bring_in(self, plan: _Plan, model: ModelSpec) -> None:
        """Somebody waits: where it fits and harms least, else where idle models can leave."""
        board = plan.board
        gains = {gang: plan.gain(model, gang) for gang in board.gangs(model) if board.fits(model, gang)}
        gang = max(gains, key=lambda gang: gains[gang], default=None)
        gang = gang or board.make_room(model, idle_s=self.idle_s) or board.make_room(model)
        if gang is not None:
            waiting = board.demand(model.name).waiting
            reason = f"{waiting} requests wait; GPUs {list(gang)} promise the most for it"
            plan.add(model, gang, reason, places_weighed(gains.items(), gang, PROMISED))

    def _warm_up(self, plan: _Plan) -> None:
        """While there is room, every model stands somewhere: the first request then finds it there."""
        board = plan.board
        absent = [m for m in board.models.values() if not board.seats_of(m.name) and m.keep_alive_s is None]
        absent = [m for m in absent if not board.is_away(m.name)]
        for model in sorted(absent, key=lambda m: (-board.demand(m.name).requests_per_s_minute, -m.weight_bytes, m.name)):
            spare_bytes = self.spare * min((gpu.capacity_bytes for gpu in board.gpus.values()), default=0)
            gang = board.roomiest(model, spare_bytes=spare_bytes)
            if gang is not None:
                plan.add(model, gang, f"GPUs {list(gang)} have room to keep it warm")

    def _put_to_use(self, plan: _Plan) -> None:
        """A GPU on which nobody is asked for helps whoever has requests that overlap: none of them waits for another there."""
        board = plan.board
        idle = [gpu_id for gpu_id in board.gpus if not any(plan.rate(seat.replica.model) for seat in board.on_gpu(gpu_id))]
        if not idle:
            return
        crowds = {name: plan.crowd(name) for name in board.models if board.seats_of(name)}
        for name in sorted((n for n in crowds if crowds[n] >= self.overlap), key=lambda n: (-crowds[n], n)):
            model = board.models[name]
            gangs = [gang for gang in board.gangs(model) if set(gang) <= set(idle) and board.fits(model, gang)]
            if gangs:
                gang = min(gangs, key=lambda gang: (-min(board.free_bytes(g) for g in gang), gang))
                reason = f"nobody is asked for on GPUs {list(gang)}, and {crowds[name]:.1f} of its requests overlap"
                scores = ((f"{n} on GPUs {list(gang)}", crowd, n == name) for n, crowd in crowds.items() if crowd > 0)
                plan.add(model, gang, reason, weighed((*scores, ("leave it as it is", 0.0, False)), OVERLAP))
                return

    def _relieve(self, plan: _Plan, pressed: list[ModelSpec]) -> None:
        """The one more replica that promises the most, if it is worth it."""
        best: tuple[float, ModelSpec, tuple[int, ...]] | None = None
        seen: list[tuple[float, ModelSpec, tuple[int, ...]]] = []
        for model in pressed[: self.looked_at]:
            most = sum(plan.lost_on(seat) for seat in plan.board.seats_of(model.name))
            for gang in self._places(plan, model):
                price = self._price(plan, model, gang)
                if most < price or (best is not None and most <= best[0]):
                    continue
                gain = plan.gain(model, gang)
                seen.append((gain, model, gang))
                if gain >= price and (best is None or gain > best[0]):
                    best = (gain, model, gang)
        if best is None:
            return
        gain, model, gang = best
        scores = ((f"{m.name} on GPUs {list(g)}", score, (m, g) == (model, gang)) for score, m, g in seen)
        options = weighed((*scores, ("leave it as it is", 0.0, False)), PROMISED)
        plan.clear(model, gang, self.settle_s, options)
        reason = f"with a replica on GPUs {list(gang)}, {gain:.2f} more requests a second keep their SLO"
        plan.add(model, gang, reason, options)

    def _places(self, plan: _Plan, model: ModelSpec) -> list[tuple[int, ...]]:
        """Where one more replica could stand, the least busy first."""
        board = plan.board
        places = [
            gang
            for gang in board.gangs(model)
            if not board.stands_on(model.name, gang)
            and all(board.loading(g) < 2 for g in gang)
            and plan.has_room(model, gang, self.settle_s)
        ]
        places.sort(key=lambda gang: (max(plan.forecast_of(g).busy for g in gang), gang))
        return places[: self.tried_gangs]

    def _price(self, plan: _Plan, model: ModelSpec, gang: tuple[int, ...]) -> float:
        """What a change has to promise: a part of what it touches, more the longer it takes to come about."""
        touched = plan.rate(model.name) + sum(plan.rate(seat.replica.model) for g in gang for seat in plan.board.on_gpu(g))
        seconds = plan.board.costs.of(model).activation_s
        return max(self.least_gain_per_s, self.margin * touched * min(1.0, seconds / self.settle_s + 0.5))

    def _withdraw(self, plan: _Plan) -> None:
        """The replica whose leaving promises the most; its model has another that serves."""
        board = plan.board
        best: tuple[float, Seat] | None = None
        seen: list[tuple[float, Seat]] = []
        for seat in board.seats():
            others = [s for s in board.seats_of(seat.replica.model) if s is not seat and board.serves(s)]
            model = board.models[seat.replica.model]
            if not others or model.pin or not board.serves(seat) or board.since_s(seat.replica) < self.settle_s:
                continue
            if plan.lost_on(seat) < self.least_gain_per_s:
                continue
            gain = plan.gain_without(seat)
            seen.append((gain, seat))
            if gain >= self._price(plan, model, seat.gpu_ids) and (best is None or gain > best[0]):
                best = (gain, seat)
        if best is not None:
            gain, seat = best
            scores = ((f"without {s.replica} on GPUs {list(s.gpu_ids)}", score, s is seat) for score, s in seen)
            options = weighed((*scores, ("leave it as it is", 0.0, False)), PROMISED)
            reason = f"without it on GPUs {list(seat.gpu_ids)}, {gain:.2f} more requests a second keep their SLO"
            plan.remove(seat, reason, options)


class _Plan:
    """A board with the forecast of each of its GPUs, reckoned when it is asked for."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._forecasts: dict[int, Forecast] = {}
        self._rates: dict[str, float] = {}
        self._loads: dict[str, Load] = {}
        self._what_if: dict[tuple[int, str, int, bool, int], Forecast] = {}
        """Forecasts of placements that are not on the board; worthless once their GPU or their model changes."""

    def rate(self, model: str) -> float:
        """What is to be expected of the model: the last minute's rate, unless the last seconds differ by more than chance."""
        rate = self._rates.get(model)
        if rate is None:
            demand = self.board.demand(model)
            short, long = demand.requests_per_s, demand.requests_per_s_minute
            doubt = DOUBT * math.sqrt(max(short, 1 / SHORT_S) / (2 * SHORT_S))
            rate = max(short - doubt, min(long, short + doubt)) if long > FORGOTTEN / LONG_S else 0.0
            self._rates[model] = rate
        return rate

    def crowd(self, model: str) -> float:
        """How many of its requests are under way at once on each replica, if none of them is slowed."""
        load, rate = self._share(model)
        return rate * (load.prompt_cost_s + load.output_tokens * (load.step_s + load.sequence_s))

    def _load(self, model: str) -> Load:
        load = self._loads.get(model)
        if load is None:
            load = load_of(self.board.models[model], self.board.demand(model), self.board.costs)
            self._loads[model] = load
        return load

    def forecast_of(self, gpu_id: int) -> Forecast:
        known = self._forecasts.get(gpu_id)
        if known is None:
            known = self._reckon(gpu_id)
            self._forecasts[gpu_id] = known
        return known

    def _reckon(self, gpu_id: int) -> Forecast:
        board = self.board
        asked = [self._share(seat.replica.model) for seat in board.on_gpu(gpu_id) if self.rate(seat.replica.model)]
        return forecast(asked, board.free_bytes(gpu_id), board.costs.neighbour_slowdown)

    def _if(self, gpu_id: int, model: str, replicas: int, *, present: bool = True, freed_bytes: int = 0) -> Forecast:
        """What the GPU's forecast would be if `model` had so many replicas and stood here, or did not."""
        key = (gpu_id, model, replicas, present, freed_bytes)
        known = self._what_if.get(key)
        if known is None:
            board = self.board
            others = [seat.replica.model for seat in board.on_gpu(gpu_id) if seat.replica.model != model]
            asked = [self._share(name) for name in others if self.rate(name)]
            if present:
                asked.append((self._load(model), self.rate(model) / max(1, replicas)))
            here = len(others) < len(board.on_gpu(gpu_id))
            resident = board.costs.resident_bytes(board.models[model])
            free_bytes = board.free_bytes(gpu_id) + freed_bytes + resident * (int(here) - int(present))
            known = forecast(asked, free_bytes, board.costs.neighbour_slowdown)
            self._what_if[key] = known
        return known

    def _share(self, model: str) -> Asked:
        return self._load(model), self.rate(model) / max(1, len(self.board.seats_of(model)))

    def pressed(self, threshold: float, worth_per_s: float) -> list[ModelSpec]:
        """Models predicted to miss promises, those that miss most first; where all that is lost is worth a change."""
        found: list[tuple[float, str]] = []
        for name in self.board.models:
            seats = self.board.seats_of(name)
            rate = self.rate(name)
            if seats and rate > 0 and sum(self.lost_on(seat) for seat in seats) >= worth_per_s:
                kept = sum(min(self.forecast_of(g).attainment[name] for g in seat.gpu_ids) for seat in seats) / len(seats)
                if kept < threshold:
                    found.append((-rate * (1 - kept), name))
        return [self.board.models[name] for _, name in sorted(found)]

    def lost_on(self, seat: Seat) -> float:
        """Requests a second that miss a promise on its GPUs, whosever they are: no more can be gained there."""
        return sum(self.forecast_of(gpu_id).lost_per_s for gpu_id in seat.gpu_ids)

    def gain(self, model: ModelSpec, gang: tuple[int, ...]) -> float:
        """How many more requests a second would keep their SLO with one more replica there."""
        seats = self.board.seats_of(model.name)
        replicas = len(seats) + 1
        gained = 0.0
        for gpu_id in gang:
            freed = sum(self._freeable(gpu_id, model)) if not self.board.fits(model, (gpu_id,)) else 0
            with_it = self._if(gpu_id, model.name, replicas, freed_bytes=freed)
            gained += (with_it.attained_per_s - self.forecast_of(gpu_id).attained_per_s) / model.tp_size
        for seat in seats:
            for gpu_id in seat.gpu_ids:
                relieved = self._if(gpu_id, model.name, replicas)
                gained += (relieved.attained_per_s - self.forecast_of(gpu_id).attained_per_s) / model.tp_size
        return gained

    def gain_without(self, seat: Seat) -> float:
        model = self.board.models[seat.replica.model]
        others = [other for other in self.board.seats_of(model.name) if other is not seat]
        gained = 0.0
        for gpu_id in seat.gpu_ids:
            without = self._if(gpu_id, model.name, 0, present=False)
            gained += (without.attained_per_s - self.forecast_of(gpu_id).attained_per_s) / model.tp_size
        for other in others:
            for gpu_id in other.gpu_ids:
                burdened = self._if(gpu_id, model.name, len(others))
                gained += (burdened.attained_per_s - self.forecast_of(gpu_id).attained_per_s) / model.tp_size
        return gained

    def _freeable(self, gpu_id: int, model: ModelSpec) -> list[int]:
        costs = self.board.costs
        spare = [seat for seat in self.board.on_gpu(gpu_id) if self._worthless(seat)]
        return [costs.resident_bytes(self.board.models[seat.replica.model]) for seat in spare]

    def _worthless(self, seat: Seat, settle_s: float = 0.0) -> bool:
        """Nobody uses it now, and either another copy stays or nobody has asked for it for a minute."""
        board = self.board
        model = seat.replica.model
        if not board.serves(seat) or not board.may_leave(seat) or board.since_s(seat.replica) < settle_s:
            return False
        return len(board.seats_of(model)) > 1 or board.demand(model).idle_s > 60.0

    def has_room(self, model: ModelSpec, gang: tuple[int, ...], settle_s: float) -> bool:
        needed = self.board.needs_bytes(model)
        short = (g for g in gang if self.board.free_bytes(g) < needed)
        return all(self.board.free_bytes(g) + self._spare_bytes(g, settle_s) >= needed for g in short)

    def _spare_bytes(self, gpu_id: int, settle_s: float) -> int:
        costs = self.board.costs
        spare = (seat for seat in self.board.on_gpu(gpu_id) if self._worthless(seat, settle_s))
        return sum(costs.resident_bytes(self.board.models[seat.replica.model]) for seat in spare)

    def clear(self, model: ModelSpec, gang: tuple[int, ...], settle_s: float, options: tuple[Alternative, ...] = ()) -> None:
        """Sends away what is worth least until the model fits."""
        for gpu_id in gang:
            for seat in sorted(self.board.on_gpu(gpu_id), key=self.board.leaving_order):
                if self.board.fits(model, (gpu_id,)):
                    break
                if self._worthless(seat, settle_s):
                    self.remove(seat, f"nobody uses it, and {model.name} needs the room", options)

    def add(self, model: ModelSpec, gang: tuple[int, ...], reason: str, options: tuple[Alternative, ...] = ()) -> None:
        self.board.add(model, gang, reason, options)
        self._forget(model.name)

    def remove(self, seat: Seat, reason: str, options: tuple[Alternative, ...] = ()) -> None:
        self.board.remove(seat, reason, options)
        self._forget(seat.replica.model, seat)

    def _forget(self, model: str, *gone: Seat) -> None:
        touched = {gpu_id for seat in (*self.board.seats_of(model), *gone) for gpu_id in seat.gpu_ids}
        for gpu_id in touched:
            self._forecasts.pop(gpu_id, None)
        self._what_if = {key: known for key, known in self._what_if.items() if key[0] not in touched and key[1] != model}
