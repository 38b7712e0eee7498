"""The plan: what is wanted, and how it is made so. Asks the policy, and carries its word or the operator's out.

What a policy decides loses no request: a replica that is no longer wanted drains, and what waited for it is brought again.
An order of the operator's holds until the policy decides anew, which goes on from what then stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec.structs import replace

from chimera.core.model import ModelSpec
from chimera.core.placement import Placement, Seat
from chimera.core.request import Request
from chimera.core.snapshot import Snapshot
from chimera.errors import ConfigError
from chimera.msg.actions import Action, Deactivate, Reject, RejectCode
from chimera.msg.events import AgentJoined, LoadWanted, PlacementChanged, PolicyChosen, ResizeWanted, UnloadWanted
from chimera.sched.balance import Balance
from chimera.sched.cells import Cell, Cells
from chimera.sched.cost import CostTable
from chimera.sched.dispatch import Dispatcher
from chimera.sched.fleet import Fleet
from chimera.sched.lives import Lives
from chimera.sched.places import PlaceState
from chimera.sched.policies import policy_named
from chimera.sched.policies.board import Board
from chimera.sched.policies.policy import Decision, Question, WarmRules
from chimera.sched.stays import Stays

SnapshotOf = Callable[[float, Cell | None], Snapshot]

SOON_S = 0.02
"""Reviews that events ask for are at least so far apart."""
LOOK_S = 0.04
"""And those that nothing asks for, of all cells together, on average: so there is always one free for what happens."""


class Plan:
    """`filed` is what the operator wrote: where every policy begins, and where `static` stays."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, lives: Lives, filed: Placement, warm: WarmRules) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._lives = lives
        self.filed = filed
        self.warm = warm
        self.stays = Stays(fleet)
        self.resting: dict[str, tuple[Seat, ...]] = {}
        """Where models stood that were let go because their last requests said so, and come back with the next: only
        under a policy that would not bring them back by itself."""
        self.cells = Cells(fleet)
        self.balance = Balance(fleet, dispatcher, self.cells)
        self.reviews: dict[int, float] = {}
        """When the policy is asked next, of each cell of which something is to be asked."""
        self.reviewed_s: float | None = None
        self.review_s: float | None = None
        """When the next of them is due: one after the other, with a pause between."""

    # The policy's word.

    def policy_chosen(self, event: PolicyChosen, now: float) -> Iterator[Action]:
        """Another policy goes on from what stands. Only `static` knows where the file put things, and goes back to it."""
        fleet = self._fleet
        before = fleet.local
        if event.local is not None:
            fleet.order_locally(event.local)
        if event.policy is not None:
            fleet.policy = policy_named(event.policy)
            numbers = range(self.cells.count if fleet.policy.on_demand else 1)
            self.revive(dict.fromkeys(numbers, now), None)
        if fleet.local != before:
            for agent in fleet.agents.values():
                if agent.present:
                    yield self._lives.queue_by(agent.name)

    def note_stir(self, now: float) -> None:
        """Asks soon if something has happened that the policy should hear of."""
        fleet = self._fleet
        if fleet.crowded_models:
            if not self.cells.divided:  # a cell among others is looked at every few seconds anyway
                fleet.stirred_models |= fleet.crowded_models
            fleet.crowded_models.clear()
        if not fleet.stirred_models and not fleet.stirred_agents:
            return
        stirred = {self.cells.of_model(model) for model in sorted(fleet.stirred_models)}
        stirred |= {self.cells.of_agent(agent) for agent in fleet.stirred_agents}
        for gone in fleet.stirred_models - fleet.models.keys():
            self.cells.forget(gone)
        fleet.stirred_models, fleet.stirred_agents = set(), set()
        if not fleet.policy.on_demand or not any(agent.present for agent in fleet.agents.values()):
            return
        soon = now if self.reviewed_s is None else max(now, self.reviewed_s + SOON_S)
        for number in stirred:
            self._ask_at(number, min(self.reviews.get(number, soon), soon))

    def _ask_at(self, number: int, at_s: float) -> None:
        self.reviews[number] = at_s
        self.revive(self.reviews, self.reviewed_s)

    def revive(self, reviews: dict[int, float], reviewed_s: float | None) -> None:
        self.reviews, self.reviewed_s = reviews, reviewed_s
        soonest = min(reviews.values(), default=None)
        pause_s = -math.inf if reviewed_s is None else reviewed_s + SOON_S
        self.review_s = None if soonest is None else max(soonest, pause_s)

    def is_due(self, now: float) -> bool:
        return self.review_s is not None and self.review_s <= now

    def review(self, snapshot: SnapshotOf, now: float) -> Iterator[Action]:
        """Asks the policy, and makes what it wants what is wanted."""
        number = min(self.reviews, key=lambda number: (self.reviews[number], number))
        del self.reviews[number]
        self.revive(self.reviews, now)
        if self.cells.divided and self._fleet.policy.on_demand:
            yield from self._end_moves(number, now)
            yield from self._review(self.cells.cell(number), number, snapshot, now)
            yield from self._even_out(snapshot, now)
        else:  # `static` repeats what the operator wrote of all
            yield from self._review(None, number, snapshot, now)

    def _review(self, cell: Cell | None, number: int, snapshot: SnapshotOf, now: float) -> Iterator[Action]:
        decision = self.ask(snapshot, cell, now)
        if math.isfinite(decision.again_s):
            pause_s = SOON_S if self._is_waited_for(number) else LOOK_S * self.cells.count
            self._ask_at(number, now + max(pause_s, decision.again_s))
        yield from self._want(decision, now, cell)

    def _is_waited_for(self, number: int) -> bool:
        """Whether somebody waits there for a model without a seat."""
        waiting = self._dispatcher.waiting()
        return any(self.cells.of_model(model) == number and not self._fleet.wanted_of(model) for model in waiting)

    def ask(self, snapshot: SnapshotOf, cell: Cell | None, now: float) -> Decision:
        fleet = self._fleet
        if fleet.costs is not None:
            return fleet.policy.decide(self._question(snapshot, cell, fleet.costs, now))
        if fleet.policy.on_demand:
            raise ConfigError.single("policy", f"{fleet.policy.name} needs a cost table")
        return Decision(placement=self.filed, again_s=math.inf)

    def _question(self, snapshot: SnapshotOf, cell: Cell | None, costs: CostTable, now: float) -> Question:
        return Question(
            snapshot=self._as_asked(self._free_of_strangers(snapshot(now, cell))),
            filed=self.filed,
            wanted=self._fleet.wanted if cell is None else cell.wanted,
            costs=costs,
            warm=self.warm,
        )

    # Between cells.

    def _even_out(self, snapshot: SnapshotOf, now: float) -> Iterator[Action]:
        """A model finds a home in another cell, and is served where it was until it serves there."""

        def board_of(number: int) -> Board:
            costs = self._fleet.costs
            assert costs is not None
            return Board(self._question(snapshot, self.cells.cell(number), costs, now))

        move = self.balance.look(now, board_of)
        if move is not None:
            self.cells.house(move.model, move.to)
            board = board_of(move.to)
            board.add(self._fleet.models[move.model], move.gpu_ids, move.reason)
            yield from self._want(board.decision(), now, self.cells.cell(move.to))

    def _end_moves(self, number: int, now: float) -> Iterator[Action]:
        """Whoever serves in its cell need not stand elsewhere; who stands elsewhere only is at home there."""
        fleet, cells = self._fleet, self.cells
        leaving: list[Seat] = []
        for model, elsewhere in cells.astray(number).items():
            seats = fleet.wanted_of(model)
            here = (fleet.places.get(seat.replica) for seat in seats if seat not in elsewhere)
            if any(place is not None and place.state is PlaceState.SERVING for place in here):
                leaving += elsewhere
            elif len(elsewhere) == len(seats):
                cells.house(model, cells.of_seat(elsewhere[0]) or 0)
        if leaving:
            cell = cells.cell(number)
            reasons = dict.fromkeys((seat.replica for seat in leaving), f"its model is served in cell {number} now")
            staying = tuple(seat for seat in cell.wanted.seats if seat not in leaving)
            yield from self._want(Decision(placement=Placement(staying), reasons=reasons), now, cell)

    def _free_of_strangers(self, snapshot: Snapshot) -> Snapshot:
        """GPUs as large as what others leave of them."""
        strangers = self._fleet.strangers
        if not any(strangers.values()):
            return snapshot
        gpus = (replace(gpu, capacity_bytes=max(0, gpu.capacity_bytes - strangers.get(gpu.gpu_id, 0))) for gpu in snapshot.gpus)
        return replace(snapshot, gpus=tuple(gpus))

    def _as_asked(self, snapshot: Snapshot) -> Snapshot:
        """Models with what their last requests said of their stay."""
        if not self.stays.asked:
            return snapshot
        return replace(snapshot, models=tuple(map(self.stays.as_asked, snapshot.models)))

    def _want(self, decision: Decision, now: float, cell: Cell | None = None) -> Iterator[Action]:
        """`cell`: what it was decided about; `None` is everything."""
        fleet = self._fleet
        change = decision.placement.diff(fleet.wanted if cell is None else cell.wanted)
        if cell is None:
            fleet.wanted = decision.placement
        elif change:
            fleet.wanted = self.cells.whole(cell.number, decision.placement)
        for seat in change.stop:
            reason = decision.reasons.get(seat.replica, f"the {fleet.policy.name} policy wants it elsewhere")
            yield from self._lives.retire(seat.replica, reason, now, decision.alternatives.get(seat.replica, ()))
        for seat in change.resize:
            yield from self._lives.resize(seat, decision.reasons.get(seat.replica, "its KV memory has another limit"), now)
        for model in dict.fromkeys(seat.replica.model for seat in change.start):
            self.resting.pop(model, None)
            yield from self._lives.settle(model, now, decision)
        for model in self._dispatcher.waiting():
            if cell is None or self.cells.of_model(model) == cell.number:
                # `static` gives some of them no place. A cell has others beside it, and is not asked again at once.
                yield from self._dispatcher.refuse_held(model, now, insist=cell is None)

    # A request's word.

    def asked_for(self, request: Request, now: float) -> Iterable[Action]:
        """A model that was let go comes back to where it stood."""
        self.stays.heard(request)
        seats = self.resting.pop(request.model, ())
        if not seats:
            return ()
        reasons = dict.fromkeys((seat.replica for seat in seats), "it had been let go, and a request has come for it")
        wanted = Placement((*self._fleet.wanted.seats, *seats))
        return self._want(Decision(placement=wanted, reasons=reasons), now)

    def end_stays(self, now: float) -> Iterator[Action]:
        for model in self.stays.ending(now):
            seats = list(self._fleet.wanted_of(model))
            if self._fleet.models[model].pin or not seats:
                continue
            reason = f"nobody has used it for {self.stays.asked[model].for_s:g} s, as its last request asked"
            others = tuple(seat for seat in self._fleet.wanted.seats if seat.replica.model != model)
            reasons = dict.fromkeys((seat.replica for seat in seats), reason)
            yield from self._want(Decision(placement=Placement(others), reasons=reasons), now)
            if not self._fleet.policy.on_demand:
                self.resting[model] = tuple(seats)

    # The operator's word.

    def agent_joined(self, event: AgentJoined, now: float) -> Iterator[Action]:
        if event.agent not in self._fleet.agents:
            yield from self._adopt(event.standing, now)
        yield from self._lives.agent_joined(event, now)
        divided = self.cells.divided
        self.cells.joined(event.agent)
        if self.cells.divided != divided:
            self._fleet.stirred_agents.update(self._fleet.agents)

    def _adopt(self, standing: Sequence[Seat], now: float) -> Iterator[Action]:
        """What stands where this control has never been was wanted there by an earlier one, its operator's word included."""
        fleet = self._fleet
        filed = {seat.replica: seat for seat in fleet.wanted.seats}
        found = {
            seat.replica: seat
            for seat in standing
            if seat.replica.model in fleet.models and (seat.replica not in filed or filed[seat.replica].gpu_ids != seat.gpu_ids)
        }
        if found:
            others = (seat for seat in fleet.wanted.seats if seat.replica not in found)
            reasons = dict.fromkeys(found, "it stood there when control began")
            yield from self._want(Decision(placement=Placement((*others, *found.values())), reasons=reasons), now)

    def sampled(self, gpu_id: int) -> None:
        """A GPU has been looked at: what is free there may be more or less than before."""
        holder = self._fleet.holder(gpu_id)
        if holder is not None:
            self._fleet.stirred_agents.add(holder.name)

    def removed(self, model: str, now: float) -> Iterator[Action]:
        """Its seats go with it: should the name come back, it may be another model's."""
        self.stays.forget(model)
        self.resting.pop(model, None)
        yield from self._lives.removed(model, now)
        self._fleet.wanted, self.filed = (
            Placement(tuple(seat for seat in placement.seats if seat.replica.model != model))
            for placement in (self._fleet.wanted, self.filed)
        )

    def placement_changed(self, event: PlacementChanged, now: float) -> Iterator[Action]:
        """What the operator did not touch stays as it is, whoever decided it."""
        for name in event.removed:
            yield from self.removed(name, now)
        for model in event.models:
            yield from self._lives.registered(model, now)
        touched = {*event.unseated, *(seat.replica for seat in event.seats)}

        def changed(placement: Placement) -> Placement:
            return Placement((*(seat for seat in placement.seats if seat.replica not in touched), *event.seats))

        for replica in event.unseated:
            self.resting.pop(replica.model, None)
        self.filed = changed(self.filed)
        decision = Decision(placement=changed(self._fleet.wanted), reasons=dict.fromkeys(touched, event.reason))
        yield from self._want(decision, now)
        self._fleet.stirred_agents.update(self._fleet.agents)

    def load_wanted(self, event: LoadWanted, now: float) -> Iterator[Action]:
        fleet = self._fleet
        model = fleet.models.get(event.replica.model)
        if model is None:
            reason = f"no model is registered as {event.replica.model}"
            yield _refuse_order(event, RejectCode.MODEL_NOT_FOUND, reason)
            return
        seat = self._seat_for(event, model)
        if seat is None:
            where = f"GPUs {list(event.gpu_ids)}" if event.gpu_ids else f"{model.tp_size} GPUs"
            yield _refuse_order(event, RejectCode.MODEL_UNAVAILABLE, f"no agent is here with {where} for {event.replica}")
            return
        if event.replica in fleet.places:
            self._lives.try_again(fleet.places[event.replica], now)
        self.cells.follow(seat)
        others = [other for other in fleet.wanted.seats if other.replica != event.replica]
        decision = Decision(placement=Placement((*others, seat)), reasons={event.replica: "the operator wants it loaded"})
        yield from self._want(decision, now)
        yield from self._lives.settle(event.replica.model, now, decision)

    def unload_wanted(self, event: UnloadWanted, now: float) -> Iterator[Action]:
        if event.model not in self._fleet.models:
            yield _refuse_order(event, RejectCode.MODEL_NOT_FOUND, f"no model is registered as {event.model}")
            return
        seats = self._fleet.wanted.seats
        leaving = [
            seat.replica for seat in seats if seat.replica.model == event.model and event.index in (None, seat.replica.index)
        ]
        self.resting.pop(event.model, None)
        placement = Placement(tuple(seat for seat in seats if seat.replica not in leaving))
        reasons = dict.fromkeys(leaving, "the operator wants it unloaded")
        for action in self._want(Decision(placement=placement, reasons=reasons), now):
            if isinstance(action, Deactivate) and event.drain_s is not None:
                yield replace(action, drain_s=event.drain_s)
            else:
                yield action

    def resize_wanted(self, event: ResizeWanted, now: float) -> Iterator[Action]:
        """Also where it stands in the file: whoever brings the replica up again shall not forget it."""

        def is_meant(seat: Seat) -> bool:
            return seat.replica.model == event.model and event.index in (None, seat.replica.index)

        def resized(placement: Placement) -> Placement:
            seats = placement.seats
            return Placement(tuple(replace(s, kv_limit_bytes=event.kv_limit_bytes) if is_meant(s) else s for s in seats))

        meant = [seat.replica for seat in self._fleet.wanted.seats if is_meant(seat)]
        if not meant:
            copy = "" if event.index is None else f" {event.index}"
            yield _refuse_order(event, RejectCode.MODEL_NOT_LOADED, f"no replica{copy} of {event.model} is wanted")
            return
        self.filed = resized(self.filed)
        reasons = dict.fromkeys(meant, "the operator gives its KV memory another limit")
        yield from self._want(Decision(placement=resized(self._fleet.wanted), reasons=reasons), now)

    def _seat_for(self, event: LoadWanted, model: ModelSpec) -> Seat | None:
        """Where the operator says; else where it is wanted or was filed; else on the emptiest GPUs of one agent."""
        known = [seat for seat in (*self._fleet.wanted.seats, *self.filed.seats) if seat.replica == event.replica]
        kv_limit = event.kv_limit_bytes if event.kv_limit_bytes or not known else known[0].kv_limit_bytes
        gpu_ids = event.gpu_ids or (known[0].gpu_ids if known else self._emptiest(model.tp_size))
        seat = Seat(replica=event.replica, gpu_ids=gpu_ids, kv_limit_bytes=kv_limit)
        return seat if len(gpu_ids) == model.tp_size and self._fleet.owner(seat) is not None else None

    def _emptiest(self, count: int) -> tuple[int, ...]:
        fleet = self._fleet
        free = {gpu.gpu_id: gpu.capacity_bytes for gpu in fleet.gpus()}
        for seat in fleet.wanted.seats:
            for gpu_id in seat.gpu_ids:
                if gpu_id in free and seat.replica.model in fleet.models:
                    free[gpu_id] -= fleet.models[seat.replica.model].weight_bytes
        groups = [
            sorted(agent.gpus, key=lambda gpu: (-free[gpu.gpu_id], gpu.gpu_id))[:count]
            for agent in fleet.agents.values()
            if agent.present and len(agent.gpus) >= count
        ]
        best = max(groups, key=lambda group: sum(free[gpu.gpu_id] for gpu in group), default=[])
        return tuple(gpu.gpu_id for gpu in best)


def _refuse_order(order: LoadWanted | UnloadWanted | ResizeWanted, code: RejectCode, reason: str) -> Reject:
    return Reject(request_id=order.order, front=order.front, code=code, reason=reason)
