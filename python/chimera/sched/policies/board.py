"""A placement under construction: what stands where, what fits where, who may leave and in which order.

Starts from what is wanted now; a replica that is on its way out still counts where it stands. Knows bytes and rates; does
not know what is best. Whoever uses it need not think of pins, keep-alive, gangs or names of replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.record import Alternative
from chimera.core.replica import ReplicaId, ReplicaState
from chimera.core.snapshot import Demand, ReplicaView
from chimera.sched.policies.policy import CALM_S, TICK_S, Decision, Question

FIRST_TOKENS = 2048
"""Room for the cache of so many tokens is part of what a replica needs to start."""
_NO_DEMAND = Demand(idle_s=float("inf"))


class Board:
    def __init__(self, question: Question) -> None:
        snapshot = question.snapshot
        self.costs = question.costs
        self.now_s = snapshot.now_s
        self.gpus = {gpu.gpu_id: gpu for gpu in snapshot.gpus}
        self.models = {model.name: model for model in snapshot.models}
        self.resident_bytes = {name: self.costs.resident_bytes(model) for name, model in self.models.items()}
        """Of a replica, on each of its GPUs."""
        self.views: dict[ReplicaId, ReplicaView] = {view.replica: view for view in snapshot.replicas}
        self._question = question
        self._reasons: dict[ReplicaId, str] = {}
        self._alternatives: dict[ReplicaId, tuple[Alternative, ...]] = {}
        self._seats: dict[ReplicaId, Seat] = {}
        self._of_model: dict[str, list[Seat]] = {}
        self._on_gpu: dict[int, list[Seat]] = {gpu_id: [] for gpu_id in self.gpus}
        self._taken: dict[int, int] = dict.fromkeys(self.gpus, 0)
        self.edition = 0
        """Another number after every change."""
        self._away: list[Seat] = []
        """Seats on GPUs whose agent is not here: they stay wanted until control gives the agent up."""
        for seat in question.wanted.seats:
            if seat.replica.model in self.models and all(gpu_id in self.gpus for gpu_id in seat.gpu_ids):
                self._put(seat)
            else:
                self._away.append(seat)
        self._models_away = {seat.replica.model for seat in self._away}
        for view in snapshot.replicas:
            if view.replica not in self._seats and view.state is not ReplicaState.STOPPED:
                self._charge(view.replica.model, view.gpu_ids, 1)

    # What stands.

    def demand(self, model: str) -> Demand:
        return self._question.snapshot.demands.get(model, _NO_DEMAND)

    def seats(self) -> list[Seat]:
        return list(self._seats.values())

    def seats_of(self, model: str) -> list[Seat]:
        return self._of_model.get(model, [])

    def on_gpu(self, gpu_id: int) -> list[Seat]:
        return self._on_gpu[gpu_id]

    def state(self, replica: ReplicaId) -> ReplicaState:
        """A seat that control has not heard of yet is as good as loading."""
        view = self.views.get(replica)
        return ReplicaState.LOADING if view is None else view.state

    def serves(self, seat: Seat) -> bool:
        return self.state(seat.replica) is ReplicaState.SERVING

    def since_s(self, replica: ReplicaId) -> float:
        """How long the replica has been as it is."""
        view = self.views.get(replica)
        return 0.0 if view is None else self.now_s - view.since_s

    def seatless(self) -> list[ModelSpec]:
        """Models without a seat that somebody waits for or that are to be warm from the start, the most urgent first."""
        found = [model for name, model in self.models.items() if not self.seats_of(name) and not self.is_away(name)]
        wanted = [m for m in found if self.demand(m.name).waiting or m.preload]
        return sorted(wanted, key=lambda m: (-m.priority, -self.demand(m.name).waiting, m.name))

    def is_away(self, model: str) -> bool:
        """Whether a replica of it is expected back with its agent."""
        return model in self._models_away

    # Room.

    def free_bytes(self, gpu_id: int) -> int:
        """What no replica's weights or engine hold: room for caches, or for one more replica."""
        return self.gpus[gpu_id].capacity_bytes - self._taken[gpu_id]

    def needs_bytes(self, model: ModelSpec) -> int:
        first = model.kv_bytes(min(FIRST_TOKENS, model.context_length))
        return self.costs.resident_bytes(model) + max(first, self.costs.stripe_bytes)

    def gangs(self, model: ModelSpec) -> Iterator[tuple[int, ...]]:
        """The sets of GPUs that may hold a replica: each GPU alone, or aligned neighbours of one node."""
        size = model.tp_size
        by_node: dict[str, list[int]] = {}
        for gpu in self.gpus.values():
            by_node.setdefault(gpu.node, []).append(gpu.gpu_id)
        for gpu_ids in by_node.values():
            gpu_ids.sort()
            for start in range(0, len(gpu_ids) - size + 1, size):
                yield tuple(gpu_ids[start : start + size])

    def fits(self, model: ModelSpec, gpu_ids: Iterable[int], *, spare_bytes: float = 0) -> bool:
        needed = self.needs_bytes(model) + spare_bytes
        return all(self.free_bytes(gpu_id) >= needed for gpu_id in gpu_ids)

    def stands_on(self, model: str, gpu_ids: tuple[int, ...]) -> bool:
        return any(set(seat.gpu_ids) & set(gpu_ids) for seat in self.seats_of(model))

    def roomiest(self, model: ModelSpec, *, spare_bytes: float = 0) -> tuple[int, ...] | None:
        """Where the most is free, if the model fits there."""
        open_gangs = [gang for gang in self.gangs(model) if not self.stands_on(model.name, gang)]
        fitting = [gang for gang in open_gangs if self.fits(model, gang, spare_bytes=spare_bytes)]
        return max(fitting, key=lambda gang: (min(self.free_bytes(g) for g in gang), [-g for g in gang]), default=None)

    def loading(self, gpu_id: int) -> int:
        return sum(self.state(seat.replica) is ReplicaState.LOADING for seat in self.on_gpu(gpu_id))

    # Who may leave.

    def may_leave(self, seat: Seat) -> bool:
        """Nobody uses it, and nobody has asked to keep it."""
        model = self.models[seat.replica.model]
        demand = self.demand(model.name)
        view = self.views.get(seat.replica)
        if model.pin or view is None or view.running or view.queued:
            return False
        if len(self.seats_of(model.name)) > 1:
            return True  # Another copy of it stays.
        return demand.waiting == 0 and demand.open == 0 and demand.idle_s >= (model.keep_alive_s or 0.0)

    def leaving_order(self, seat: Seat) -> tuple[float, ...]:
        """Who leaves first is least: low priority, another copy elsewhere, then by the operator's order."""
        model = self.models[seat.replica.model]
        demand = self.demand(model.name)
        by = -demand.idle_s if self._question.warm.order == "lru" else demand.requests_per_s_minute
        return (model.priority, float(len(self.seats_of(model.name)) == 1), by)

    def make_room(self, model: ModelSpec, *, idle_s: float = 0.0) -> tuple[int, ...] | None:
        """Asks idle replicas to leave until the model fits somewhere, where that sends the fewest bytes away."""
        best: tuple[int, tuple[int, ...], list[Seat]] | None = None
        sizes: dict[tuple[int, ...], int] = {}
        for gang in self.gangs(model):
            if self.stands_on(model.name, gang):
                continue
            leaving = self._leaving_for(model, gang, idle_s)
            if leaving is not None:
                size = sum(self.models[seat.replica.model].weight_bytes for seat in leaving)
                sizes[gang] = size
                if best is None or size < best[0]:
                    best = (size, gang, leaving)
        if best is None:
            return None
        weighed = places_weighed(((gang, -size) for gang, size in sizes.items()), best[1], "bytes sent away")
        for seat in best[2]:
            self.remove(seat, f"it has been idle, and {model.name} needs the room", weighed)
        return best[1]

    def _leaving_for(self, model: ModelSpec, gang: tuple[int, ...], idle_s: float) -> list[Seat] | None:
        short = {gpu_id: self.needs_bytes(model) - self.free_bytes(gpu_id) for gpu_id in gang}
        present = {seat.replica: seat for gpu_id in gang for seat in self.on_gpu(gpu_id)}
        leaving: list[Seat] = []
        for seat in sorted(present.values(), key=self.leaving_order):
            if all(nbytes <= 0 for nbytes in short.values()):
                break
            if self.may_leave(seat) and self.demand(seat.replica.model).idle_s >= idle_s:
                leaving.append(seat)
                for gpu_id in seat.gpu_ids:
                    if gpu_id in short:
                        short[gpu_id] -= self.resident_bytes[seat.replica.model]
        return leaving if all(nbytes <= 0 for nbytes in short.values()) else None

    # Changing it.

    def add(self, model: ModelSpec, gpu_ids: tuple[int, ...], reason: str, weighed: tuple[Alternative, ...] = ()) -> Seat:
        """One more replica, under the lowest name that nothing of the model bears."""
        borne = {
            replica.index
            for replica in (*self.views, *self._seats, *(s.replica for s in self._away))
            if replica.model == model.name
        }
        index = next(i for i in range(len(borne) + 1) if i not in borne)
        seat = Seat(replica=ReplicaId(model.name, index), gpu_ids=gpu_ids)
        self._put(seat)
        self._explain(seat.replica, reason, weighed)
        return seat

    def remove(self, seat: Seat, reason: str, weighed: tuple[Alternative, ...] = ()) -> None:
        """It is no longer wanted; what it holds counts until it has left, unless it never started."""
        self.edition += 1
        del self._seats[seat.replica]
        self._of_model[seat.replica.model].remove(seat)
        for gpu_id in seat.gpu_ids:
            self._on_gpu[gpu_id].remove(seat)
        self._charge(seat.replica.model, seat.gpu_ids, -1)
        self._explain(seat.replica, reason, weighed)

    def _explain(self, replica: ReplicaId, reason: str, weighed: tuple[Alternative, ...]) -> None:
        self._reasons[replica] = reason
        if weighed:
            self._alternatives[replica] = weighed

    def keep_house(self) -> None:
        """What the operator asked of warm models, whoever decides: keep-alive, most models, most bytes."""
        warm = self._question.warm
        for seat in self.seats():
            keep_s = self.models[seat.replica.model].keep_alive_s
            if keep_s is None or not self.serves(seat) or not self.may_leave(seat):
                continue
            if min(self.demand(seat.replica.model).idle_s, self.since_s(seat.replica)) >= keep_s:
                self.remove(seat, f"idle beyond its keep-alive of {keep_s:g} s")
        if warm.most_models is None and warm.most_bytes is None:
            return
        leavers = sorted((seat for seat in self.seats() if self.may_leave(seat)), key=self.leaving_order)
        for seat in leavers:
            models = {other.replica.model for other in self.seats()}
            total = sum(self.resident_bytes[s.replica.model] * len(s.gpu_ids) for s in self.seats())
            many = warm.most_models is not None and len(models) > warm.most_models
            big = warm.most_bytes is not None and total > warm.most_bytes
            if not (many or big):
                break
            self.remove(seat, f"first to leave by {warm.order}: {len(models)} models are warm with {total} bytes")

    def decision(self, again_s: float | None = None) -> Decision:
        if again_s is None:
            stirring = any(d.open or d.waiting for d in self._question.snapshot.demands.values())
            again_s = TICK_S if stirring else CALM_S
        return Decision(
            placement=Placement((*self._seats.values(), *self._away)),
            reasons=self._reasons,
            alternatives=self._alternatives,
            again_s=again_s,
        )

    def _put(self, seat: Seat) -> None:
        self.edition += 1
        self._seats[seat.replica] = seat
        self._of_model.setdefault(seat.replica.model, []).append(seat)
        for gpu_id in seat.gpu_ids:
            self._on_gpu[gpu_id].append(seat)
        self._charge(seat.replica.model, seat.gpu_ids, 1)

    def _charge(self, model: str, gpu_ids: Iterable[int], sign: int) -> None:
        change = sign * self.resident_bytes.get(model, 0)
        for gpu_id in gpu_ids:
            if gpu_id in self._taken:
                self._taken[gpu_id] += change


MOST_WEIGHED = 8
"""Alternatives that are told of one decision: the best, and among them the chosen one."""


def places_weighed(
    scores: Iterable[tuple[tuple[int, ...], float]], chosen: tuple[int, ...], unit: str
) -> tuple[Alternative, ...]:
    """Places for one model, the best first."""
    named = ((f"GPUs {list(gang)}", score, gang == chosen) for gang, score in scores)
    return weighed(named, unit)


def weighed(scores: Iterable[tuple[str, float, bool]], unit: str) -> tuple[Alternative, ...]:
    """What could have been done, and whether it was; the best first."""
    ranked = sorted(scores, key=lambda one: (-one[1], not one[2], one[0]))
    told = ranked[:MOST_WEIGHED]
    told += [one for one in ranked[MOST_WEIGHED:] if one[2]]
    return tuple(Alternative(what=what, score=round(score, 6), unit=unit, chosen=chosen) for what, score, chosen in told)
