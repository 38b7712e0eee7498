"""Where everything stands before anybody has asked."""

from __future__ import annotations

from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.sim.placing import evenly, gangs, gpus_of
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sched.builders import costs, model

COSTS = costs()


def paper(number: int, tp_size: int, weight_bytes: int) -> ModelSpec:
    return replace(model(f"m{number}", tp_size=tp_size), weight_bytes=weight_bytes)


@given(st.lists(st.tuples(st.sampled_from([1, 1, 2]), st.integers(1, 40)), max_size=12), st.integers(2, 5))
def test_each_model_goes_where_the_most_is_free_the_largest_first(asked: list[tuple[int, int]], count: int) -> None:
    unit = COSTS.engine_bytes + COSTS.stripe_bytes
    models = [paper(number, size, weight * unit) for number, (size, weight) in enumerate(asked)]
    gpus = gpus_of(count, 60 * unit)
    placed = evenly(models, gpus, COSTS, reserved=False)
    free = {gpu.gpu_id: gpu.capacity_bytes for gpu in gpus}
    expected: list[Seat] = []
    for spec in sorted(models, key=lambda m: (-m.weight_bytes * m.tp_size, m.name)):
        room = {gang: min(free[g] for g in gang) for gang in gangs(gpus, spec.tp_size)}
        best = min(room, key=lambda gang: (-room[gang], gang))
        if room[best] < COSTS.resident_bytes(spec) + COSTS.stripe_bytes:
            continue
        expected += [seat for seat in placed.seats if seat.replica.model == spec.name and seat.gpu_ids == best]
        for gpu_id in best:
            free[gpu_id] -= COSTS.resident_bytes(spec)
    assert list(placed.seats) == expected
