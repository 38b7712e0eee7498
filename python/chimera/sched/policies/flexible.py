"""`flexible`: ours, and the default. Whichever placement promises the most requests within their SLO, at a price worth paying.

For each GPU the forecast says what would be kept; a change is made when it promises more by a margin that covers its price
and the doubt about the rates (hysteresis), and only so many at a time. Where promises are missed, another replica is
weighed, with whoever would have to make room for it; a replica leaves when more is promised without it. A move is both, in
that order, so somebody always serves. A GPU on which nobody is asked for is put to use by whoever has requests that overlap.
Models that nobody asks for stay warm while they are in nobody's way.
"""

from __future__ import annotations

import msgspec

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.record import Alternative
from chimera.sched.policies.board import Board, places_weighed, weighed
from chimera.sched.policies.changes import Change, Changes
from chimera.sched.policies.forecast import Forecast
from chimera.sched.policies.outlook import Outlook
from chimera.sched.policies.policy import CALM_S, TICK_S, Decision, Question

PROMISED = "requests a second that keep their SLO, more than now"
OVERLAP = "requests that are under way at once on each of its replicas"


class Flexible(msgspec.Struct, frozen=True):
    name: str = "flexible"
    on_demand: bool = True
    margin: float = 0.08
    """A change has to promise so much more of the rates it touches."""
    least_gain_per_s: float = 0.02
    least_lost: float = 0.01
    """A GPU that keeps the promises of all but so much of what it is asked for is left as it is."""
    settle_s: float = 4.0
    """A replica stays at least this long, whatever the forecast."""
    overlap: float = 0.25
    """So many requests at once on each replica, on average, deserve one more where nobody is asked for."""
    own_share: float = 0.5
    """A model that is waited for comes up at once if, all in all, so much of what it is asked for is gained."""
    patience_s: float = 30.0
    """Else it comes up once somebody has waited so long."""
    idle_s: float = 1.0
    """An idle model leaves for one that is waited for after this long."""
    spare: float = 0.2
    """The part of a GPU left to caches before a model is brought in that nobody waits for."""
    looked_at: int = 3
    """The GPUs on which the most is lost are looked at."""

    def decide(self, question: Question) -> Decision:
        board = Board(question)
        outlook = Outlook(board)
        changes = Changes(outlook, self.settle_s)
        for model in board.seatless():
            self._bring_in(outlook, changes, model)
        self._warm_up(outlook)
        self._put_to_use(outlook)
        stirring = any(d.open or d.waiting for d in question.snapshot.demands.values())
        pressed = self._pressed(outlook) if stirring else []
        if pressed:
            self._relieve(outlook, changes, pressed)
            self._withdraw(outlook)
        board.keep_house()
        return board.decision(TICK_S if pressed or board.seatless() else CALM_S)

    def _bring_in(self, outlook: Outlook, changes: Changes, model: ModelSpec) -> None:
        """Somebody waits: where it promises the most, for itself and for those that it disturbs or sends away.

        What had no replica is late already, so where others are hard pressed it may as well wait for a better moment.
        """
        found = changes.arrivals(model, self.idle_s) or changes.arrivals(model, 0.0)
        best = max(found, key=lambda change: change.gain, default=None)
        if best is None:
            return
        promising = best.gain >= self.own_share * outlook.rates[model.name]
        if promising or outlook.board.demand(model.name).waited_s >= self.patience_s:
            options = places_weighed(((c.gang, c.gain) for c in found), best.gang, PROMISED)
            waiting = outlook.board.demand(model.name).waiting
            reason = f"{waiting} requests wait; GPUs {list(best.gang)} promise the most for it"
            self._make(outlook.board, best, reason, options)

    def _make(self, board: Board, change: Change, reason: str, options: tuple[Alternative, ...]) -> None:
        for seat in change.evicted:
            board.remove(seat, f"nobody uses it now, and {change.model.name} needs the room", options)
        board.add(change.model, change.gang, reason, options)

    def _warm_up(self, outlook: Outlook) -> None:
        """While there is room, every model stands somewhere: the first request then finds it there."""
        board = outlook.board
        absent = [m for m in board.models.values() if not board.seats_of(m.name) and m.keep_alive_s is None]
        absent = [m for m in absent if not board.is_away(m.name)]
        for model in sorted(absent, key=lambda m: (-board.demand(m.name).requests_per_s_minute, -m.weight_bytes, m.name)):
            spare_bytes = self.spare * min((gpu.capacity_bytes for gpu in board.gpus.values()), default=0)
            gains = {
                g: outlook.gain(((model, g),)) for g in board.gangs(model) if board.fits(model, g, spare_bytes=spare_bytes)
            }
            gang = max(gains, key=lambda g: (gains[g], min(board.free_bytes(i) for i in g), [-i for i in g]), default=None)
            if gang is not None and gains[gang] >= 0:
                board.add(model, gang, f"GPUs {list(gang)} have room to keep it warm")

    def _put_to_use(self, outlook: Outlook) -> None:
        """A GPU on which nobody is asked for helps whoever has requests that overlap: none of them waits for another there."""
        board = outlook.board
        idle = [gpu_id for gpu_id in board.gpus if not any(outlook.rates[seat.replica.model] for seat in board.on_gpu(gpu_id))]
        if not idle:
            return
        crowds = {name: outlook.crowd(name) for name in board.models if outlook.rates[name] and board.seats_of(name)}
        for name in sorted((n for n in crowds if crowds[n] >= self.overlap), key=lambda n: (-crowds[n], n)):
            model = board.models[name]
            gangs = [gang for gang in board.gangs(model) if set(gang) <= set(idle) and board.fits(model, gang)]
            if gangs:
                gang = min(gangs, key=lambda gang: (-min(board.free_bytes(g) for g in gang), gang))
                reason = f"nobody is asked for on GPUs {list(gang)}, and {crowds[name]:.1f} of its requests overlap"
                scores = ((f"{n} on GPUs {list(gang)}", crowd, n == name) for n, crowd in crowds.items() if crowd > 0)
                board.add(model, gang, reason, weighed((*scores, ("leave it as it is", 0.0, False)), OVERLAP))
                return

    def _pressed(self, outlook: Outlook) -> list[int]:
        """GPUs on which enough is lost to be worth a change, those that lose most first."""
        lost = {gpu_id: now.lost_per_s for gpu_id in outlook.board.gpus if self._loses(now := outlook.on(gpu_id))}
        return sorted(lost, key=lambda g: (-lost[g], g))

    def _loses(self, now: Forecast) -> bool:
        asked_per_s = now.lost_per_s + now.attained_per_s
        return now.lost_per_s >= max(self.least_gain_per_s, self.least_lost * asked_per_s)

    def _relieve(self, outlook: Outlook, changes: Changes, pressed: list[int]) -> None:
        """The change that promises the most, if it is worth it."""

        def price(model: ModelSpec, gang: tuple[int, ...]) -> float:
            return self._price(outlook, model, gang)

        found = list(changes.reliefs(pressed[: self.looked_at], price))
        worth = [c for c in found if c.gain >= price(c.model, c.gang)]
        best = max(worth, key=lambda change: change.gain, default=None)
        if best is not None:
            scores = ((f"{c.model.name} on GPUs {list(c.gang)}", c.gain, c is best) for c in found)
            options = weighed((*scores, ("leave it as it is", 0.0, False)), PROMISED)
            reason = f"with a replica on GPUs {list(best.gang)}, {best.gain:.2f} more requests a second keep their SLO"
            self._make(outlook.board, best, reason, options)

    def _price(self, outlook: Outlook, model: ModelSpec, gang: tuple[int, ...]) -> float:
        """What a change has to promise: a part of what it touches, more the longer it takes to come about."""
        board = outlook.board
        touched = outlook.rates[model.name] + sum(outlook.rates[seat.replica.model] for g in gang for seat in board.on_gpu(g))
        seconds = board.costs.of(model).activation_s
        return max(self.least_gain_per_s, self.margin * touched * min(1.0, seconds / self.settle_s + 0.5))

    def _withdraw(self, outlook: Outlook) -> None:
        """The replica whose leaving promises the most; its model has another that serves."""
        board = outlook.board
        best: tuple[float, Seat] | None = None
        seen: list[tuple[float, Seat]] = []
        for seat in board.seats():
            others = [s for s in board.seats_of(seat.replica.model) if s is not seat and board.serves(s)]
            model = board.models[seat.replica.model]
            if not others or model.pin or not board.serves(seat) or board.since_s(seat.replica) < self.settle_s:
                continue
            price = self._price(outlook, model, seat.gpu_ids)
            if outlook.lost_on(seat.gpu_ids) < price:
                continue  # no more can be gained
            gain = outlook.gain(leaves=(seat,))
            seen.append((gain, seat))
            if gain >= price and (best is None or gain > best[0]):
                best = (gain, seat)
        if best is not None:
            gain, seat = best
            scores = ((f"without {s.replica} on GPUs {list(s.gpu_ids)}", score, s is seat) for score, s in seen)
            options = weighed((*scores, ("leave it as it is", 0.0, False)), PROMISED)
            reason = f"without it on GPUs {list(seat.gpu_ids)}, {gain:.2f} more requests a second keep their SLO"
            board.remove(seat, reason, options)
